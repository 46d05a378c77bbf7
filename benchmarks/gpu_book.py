"""The results of `benchmarks/gpu.py`: its parts, run one at a time, in one file."""

import argparse
import contextlib
import dataclasses
import io
import json
import subprocess
from collections.abc import Sequence

from benchmarks import report
from benchmarks.report import RESULTS, Row


class Book:
    """Rows and notes of all parts, saved as they come.

    Args:
        args: `part` and what `report.parser` gives.
        parts: all that may stand in the file.
    """

    def __init__(self, args: argparse.Namespace, parts: Sequence[str]):
        self.args, self.own = args, f"{args.part}: "
        rows, notes = kept(args)
        self.rows = [row for row in rows if not row.claim.startswith(self.own)]
        heads = tuple(f"{part}: " for part in parts if part != args.part)
        self.notes = [note for note in notes if note.startswith(heads)]
        self.notes.insert(0, f"Driver {driver()}.")
        self.title = "One GPU, ResNet-50 at 224, bf16"
        if args.quick:
            self.title += ": tiny sizes, only to see that it runs"

    def add(self, made: Row | str) -> None:
        """Note a line, tell it, save."""
        if isinstance(made, str):
            self.notes.append(f"{self.own}{made}.")
            print(self.notes[-1], flush=True)
        else:
            self.rows.append(dataclasses.replace(made, claim=self.own + made.claim))
            peer = f" ({made.against}: {report.number(made.peer)})" if made.peer else ""
            print(
                f"{self.rows[-1].claim}: {report.number(made.ours)} {made.unit}{peer}", flush=True
            )
        with contextlib.redirect_stdout(io.StringIO()):
            self.publish()

    def publish(self) -> None:
        """Print and write all of it."""
        report.publish("gpu", self.title, self.rows, self.args, ("kornia",), self.notes)


def kept(args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Rows and notes that the file of results holds already, if they are of this machine."""
    try:
        result = json.loads((args.out or RESULTS / "gpu.json").read_text())
        now = report.machine()
        if any(result["machine"].get(key) != now.get(key) for key in ("gpu", "processor")):
            return [], []
        return [Row(**row) for row in result["rows"]], result["notes"]
    except (OSError, ValueError, LookupError, TypeError):
        return [], []


def driver() -> str:
    """Version of the GPU's driver, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return told.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return "none"

"""Runs the checks of a part, several at a time, each in its own process, and reports them."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.fault import tiny
from tests.fault.damage import Tally
from tests.fault.figures import Figure, keep
from tests.fault.machine import NEEDS, cannot, has
from tests.fault.tiny import Setup

Check = Callable[[Setup, Path, bool], list[Figure]]
"""(setup, folder to work in, whether it is the long lane) -> the rows of the table."""


def figure_of(number: int, fault: str, tally: Tally, note: str = "") -> Figure:
    """One row of the table."""
    faults = tuple(tally.faults)
    return Figure(number, fault, tally.tries, tally.tries - len(faults), note, faults)


def run(checks: dict[str, Check], is_long: bool, jobs: int, names: list[str]) -> list[Figure]:
    """The figures of the checks, `jobs` of them at a time."""
    root = Path(tempfile.mkdtemp(prefix="clsa-fault-"))
    root.chmod(0o755)  # one check reads the pictures as another user
    try:
        setup, running, waiting = tiny.set_up(root), dict[int, str](), list(names)
        while running or waiting:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[
                    tiny.start(_job(setup, name, checks[name], is_long), root / f"{name}.log")
                ] = name
            for pid in list(running):
                if (code := tiny.ended(pid)) is not None:
                    name = running.pop(pid)
                    said = (root / f"{name}.log").read_text(errors="replace")
                    print(said if not code else f"{name} broke: {said}", flush=True)
            time.sleep(0.05)
        found = [root / f"{name}.json" for name in names]
        rows = [row for path in found if path.exists() for row in json.loads(path.read_text())]
        missing = [path.stem for path in found if not path.exists()]
        broken = [Figure(0, name, 1, 0, "", ("the check itself broke",)) for name in missing]
        return [Figure(*row[:5], faults=tuple(row[5])) for row in rows] + broken
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _job(setup: Setup, name: str, check: Check, is_long: bool) -> Callable[[], int]:
    def body() -> int:
        begun, place = time.monotonic(), setup.at(name)
        rows = check(setup._replace(root=place), place, is_long)
        (setup.root / f"{name}.json").write_text(json.dumps(rows))
        print("\n".join(map(str, rows)), f"\n  {time.monotonic() - begun:.0f} s", sep="")
        return 0

    return body


def main(part: str, checks: dict[str, Check], args: list[str]) -> int:
    """`short` or `long`, then `--jobs N`, `--json FILE`, and names of checks (default: all)."""
    is_long = args[:1] == ["long"]
    values = {args[i]: args[i + 1] for i in range(len(args) - 1) if args[i].startswith("--")}
    names = [name for name in args[1:] if name in checks] or list(checks)
    torch.set_num_threads(1)
    lacking = [need for need in NEEDS if need != "strace" and not has(need)]
    unnamed = [need for need in lacking if need not in cannot()]
    begun = time.monotonic()
    figures = run(checks, is_long, int(values.get("--jobs", 1)), names)
    if is_long:
        keep(part, figures, time.monotonic() - begun, len(names) == len(checks))
    if "--json" in values:
        Path(values["--json"]).write_text(json.dumps([figures, unnamed]))
    for need in unnamed:
        what = f"this machine lacks {need}: {NEEDS[need]}"
        print(f"error: {what} - checks need it - list it in CLSA_CANNOT", file=sys.stderr)
    print(f"{time.monotonic() - begun:.0f} s")
    failed = [figure for figure in figures if figure.survived < figure.tries or figure.faults]
    return int(bool(failed) or bool(unnamed and os.environ.get("CI")))

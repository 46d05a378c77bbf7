"""Shared by all benchmarks: rows, the clock, facts about the machine, results as JSON.

    python -m benchmarks.report        # docs/benchmarks.md from benchmarks/results/*.json

Each benchmark is a file of its own. It measures ours and the peer in turn, makes `Row`s and passes
them to `publish`, which prints them, writes NAME.json to the results and renders the page again.
Results of another machine (a GPU, say) stay on the page as long as their JSON stays in the folder.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import page
from clsa.system.errors import ClsaError
from clsa.system.machine import num_cores

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
OURS = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg")
INSTALL = "`make bench` installs it; or: pip install --no-deps -c constraints.txt PACKAGE"


@dataclass(frozen=True)
class Row:
    """One measured line.

    Attributes:
        claim: what is measured, with its sizes.
        ours, peer: the two figures in `unit`; either may be missing.
        unit: unit of both figures: "images/s", "ms", "MB", "%".
        ratio: how many times better ours is than the peer.
        budget: the limit to meet, as text: ">= 8x", "<= 7 %"; empty for none.
        met: whether the budget is met; None without a budget.
        against: what the peer is.
        spread: lowest and highest ratio of the single rounds.
    """

    claim: str
    ours: float | None
    peer: float | None = None
    unit: str = ""
    ratio: float | None = None
    budget: str = ""
    met: bool | None = None
    against: str = ""
    spread: tuple[float, float] | None = None


def versus(
    claim: str,
    ours: float,
    peer: float,
    unit: str,
    against: str,
    at_least: float | None = None,
    less_is_better: bool = False,
    rounds: Sequence[float] = (),
) -> Row:
    """A comparison; `at_least` is the budget of the ratio, `rounds` the ratios of single rounds."""
    over, under = (peer, ours) if less_is_better else (ours, peer)
    ratio = over / under if under > 0 else None  # a figure too small to measure has no ratio
    budget = "" if at_least is None else f">= {at_least:g}x"
    met = None if at_least is None else over >= at_least * under
    spread = (min(rounds), max(rounds)) if rounds else None
    return Row(claim, ours, peer, unit, ratio, budget, met, against, spread)


def share(
    claim: str,
    part: float,
    whole: float,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """A row with a part in percent of a whole; the budgets are fractions."""
    value, budget, met = part / whole, "", None
    if at_least is not None:
        budget, met = f">= {100 * at_least:g} %", value >= at_least
    if at_most is not None:
        budget, met = f"<= {100 * at_most:g} %", value <= at_most
    return Row(claim, 100 * value, unit="%", budget=budget, met=met)


# ---- the clock


def seconds(call: Callable[[], object], one_core: bool = False) -> float:
    """Wall time of one call; with `one_core`, the processor time of all threads if it is longer."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    return max(wall, processor) if one_core else wall


def alternate(
    sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, one_core: bool = False
) -> dict[str, list[float]]:
    """Seconds of every call; sides take turns so that a slow minute affects all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + repeats):
        for name, side in sides.items():
            gc.collect()
            taken = seconds(side, one_core)
            if number >= warmup:
                times[name].append(taken)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each side."""
    return {name: statistics.median(taken) for name, taken in times.items()}


# ---- the machine


def machine(peers: Sequence[str], threads: int) -> dict[str, Any]:
    """What the figures depend on: processor, cores, threads, GPU, versions.

    Args:
        peers: names of packages whose versions are listed besides our own.
        threads: number of threads that each process computes with.
    """
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": num_cores(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (*OURS, *peers)},
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = (driver or "unknown").splitlines()[0]
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    flags = named.get("flags", "").split()
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return ", ".join([named.get("model name", platform.machine()), *units])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def said(*command: str) -> str:
    """The output of a command, run only once; empty if the command fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """Short name of the checked-out commit, with "+dirty" if files other than results differ."""
    name = said("git", "rev-parse", "--short", "HEAD")
    written = ":!benchmarks/results", ":!docs/benchmarks.md"
    differs = said("git", "status", "--porcelain", "--", ".", *written)
    return f"{name}+dirty" if name and differs else name


def require(*modules: str) -> None:
    """Raise an error that says in one line which peers are missing and how to install them.

    Raises:
        ClsaError: 2 if a peer is not installed.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ClsaError(f"{', '.join(missing)} missing", "this benchmark compares with it", INSTALL)


# ---- running


def parser(description: str | None, threads: int | None = None) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks: --quick, --out, and --threads if it may vary."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes, only to show that it runs")
    told = "folder for the results (default: benchmarks/results; none with --quick)"
    made.add_argument("--out", type=Path, help=told)
    if threads is not None:
        made.add_argument(
            "--threads", type=int, default=threads, help=f"threads of torch ({threads})"
        )
    made.set_defaults(started=time.monotonic(), commit=commit())
    return made


def run(main: Callable[[], None]) -> None:
    """Call `main`; print an error that the user can fix in one line."""
    try:
        main()
    except ClsaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.code))


def record(
    name: str,
    title: str,
    rows: Sequence[Row],
    args: argparse.Namespace,
    about: str | None,
    threads: int,
    peers: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write rows and machine to the results; return what was written.

    With --quick nothing is written unless --out names a folder, since tiny sizes are no result.

    Args:
        name: the results go to NAME.json.
        title: heading of the section.
        args: arguments parsed by `parser`.
        about: a docstring; its first paragraph after title and commands opens the section.
        threads: number of threads that each process computed with.
        peers: packages whose versions are listed.
        notes: paragraphs of Markdown below the table.
    """
    result = {
        "title": title,
        "about": first_paragraph(about or ""),
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "seconds": round(time.monotonic() - args.started, 1),
        "machine": machine(peers, threads),
        "rows": [asdict(row) for row in rows],
        "notes": list(notes),
    }
    folder = destination(args)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def destination(args: argparse.Namespace) -> Path | None:
    """The folder for the results, or None if they are not written."""
    return args.out or (None if args.quick else RESULTS)


def publish(
    name: str, title: str, rows: Sequence[Row], args: argparse.Namespace, *facts: Any, **others: Any
) -> None:
    """`record`, print the section, and render the page if the results went to its folder."""
    print(page.section(record(name, title, rows, args, *facts, **others)))
    folder = destination(args)
    if folder and folder.resolve() == RESULTS.resolve():
        PAGE.write_text(page.render(RESULTS))


def first_paragraph(docstring: str) -> str:
    """The paragraph after the title and indented commands, or else the title, as one line."""
    title, *others = inspect.cleandoc(docstring).split("\n\n")
    plain = [other for other in others if not other.startswith("    ")]
    return " ".join((plain[0] if plain else title).split())


def main() -> None:
    """Render the page from the results."""
    argparse.ArgumentParser(description="Render docs/benchmarks.md from the results.").parse_args()
    PAGE.write_text(page.render(RESULTS))
    print(os.path.relpath(PAGE))


if __name__ == "__main__":
    run(main)

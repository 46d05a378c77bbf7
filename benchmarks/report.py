"""What every benchmark shares: rows, clocks, the machine, results as JSON, the page of them all.

    python -m benchmarks.report        # docs/benchmarks.md from benchmarks/results/*.json

A benchmark is one file a claim. It measures ours and the peer in turn, makes `Row`s and hands them
to `publish`, which prints them, writes `benchmarks/results/NAME.json` and renders the page anew.
Results of another machine (a GPU, say) stay in the page as long as their JSON stays in the folder.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clsa.errors import ClsaError
from clsa.host import num_cores

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
ORDER = ("input", "augment", "loss", "step", "gpu", "scale")  # of the sections; others follow
OURS = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg")
COUNTED = ("cores", "threads")
INSTALL = "`make bench` installs it; or: pip install --no-deps -c constraints.txt, and its name"
HEADER = """# Benchmarks

Written by `make bench` from `benchmarks/results/*.json`; do not edit. Each figure was measured on
the machine named below its table, ours and the peer in the same run, one after the other. A ratio
says how many times better ours is: times as fast, or times less memory.
"""


@dataclass(frozen=True)
class Row:
    """One measured line.

    Attributes:
        claim: what is measured, with its sizes.
        ours, peer: the two figures in `unit`; either may be missing.
        unit: of both: "images/s", "ms", "MB", "%".
        ratio: how many times better ours is than the peer.
        budget: what it must reach, in words: ">= 8x", "<= 7 %"; empty for none.
        met: whether it does; None without a budget.
        against: what the peer is.
    """

    claim: str
    ours: float | None
    peer: float | None = None
    unit: str = ""
    ratio: float | None = None
    budget: str = ""
    met: bool | None = None
    against: str = ""


def versus(
    claim: str,
    ours: float,
    peer: float,
    unit: str,
    against: str,
    at_least: float | None = None,
    less_is_better: bool = False,
) -> Row:
    """A row that compares; `at_least` is the budget of its ratio."""
    ratio = peer / ours if less_is_better else ours / peer
    budget = "" if at_least is None else f">= {at_least:g}x"
    met = None if at_least is None else ratio >= at_least
    return Row(claim, ours, peer, unit, ratio, budget, met, against)


def share(
    claim: str,
    part: float,
    whole: float,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """A row in percent of a whole; the budgets are fractions."""
    value, budget, met = part / whole, "", None
    if at_least is not None:
        budget, met = f">= {at_least:.0%}", value >= at_least
    if at_most is not None:
        budget, met = f"<= {at_most:.0%}", value <= at_most
    return Row(claim, 100 * value, unit="%", budget=budget.replace("%", " %"), met=met)


# ---- clocks


def alternate(
    sides: dict[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, the sides taken in turn so that a slow minute hits all alike."""
    for _ in range(warmup):
        for side in sides.values():
            side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            gc.collect()
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each side."""
    return {name: statistics.median(taken) for name, taken in times.items()}


# ---- the machine


def machine(peers: Sequence[str] = (), threads: int | None = None) -> dict[str, Any]:
    """What the figures depend on: processor, cores, threads, GPU, versions.

    Args:
        peers: names of packages whose versions are told besides our own.
        threads: of torch; what it uses now if not given.
    """
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": num_cores(),
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (*OURS, *peers)},
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
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


def require(*modules: str) -> None:
    """Say in one line which peers are missing and how to get them.

    Raises:
        ClsaError: 2 when one is not installed.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ClsaError(f"{', '.join(missing)} missing", "the peer of this benchmark", INSTALL)


# ---- running


def parser(description: str | None, threads: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have: --quick, --threads, --out."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    made.add_argument("--threads", type=int, default=threads, help=f"of torch ({threads})")
    told = "JSON file of the results (default: benchmarks/results/NAME.json; none with --quick)"
    made.add_argument("--out", type=Path, help=told)
    return made


def run(main: Callable[[], None]) -> None:
    """Call `main`; what the user can mend is told in one line."""
    try:
        main()
    except ClsaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.code))


def publish(
    name: str,
    title: str,
    rows: Sequence[Row],
    args: argparse.Namespace,
    peers: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Print the rows and write them, with the machine, to the results; render the page.

    With --quick nothing is written unless --out names a file: tiny sizes are no result.

    Args:
        name: of the benchmark's module; the results go to NAME.json.
        title: heading of its section.
        args: of `parser`; `--out` elsewhere than in the results leaves the page alone.
        peers: packages whose versions are told.
        notes: paragraphs of Markdown below the table.
    """
    result = {
        "title": title,
        "command": " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(peers, getattr(args, "threads", None)),
        "rows": [asdict(row) for row in rows],
        "notes": list(notes),
    }
    print(section(result))
    quick, out = getattr(args, "quick", False), getattr(args, "out", None)
    if quick and out is None:
        return
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    if path.parent.resolve() == RESULTS:
        PAGE.write_text(render(RESULTS))


# ---- the page


def number(value: float | None) -> str:
    """Three digits or so, thousands marked; a dash for none."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


def _cells(row: dict[str, Any]) -> str:
    ratio = "-" if row["ratio"] is None else f"{number(row['ratio'])}x"
    met = {True: "met", False: "**missed**", None: ""}[row["met"]]
    budget = " ".join(word for word in (row["budget"], met) if word) or "-"
    told = [row["claim"], number(row["ours"]), number(row["peer"]), row["unit"], ratio, budget]
    return (
        "| "
        + " | ".join(cell.replace("|", "\\|") for cell in [*told, row["against"] or "-"])
        + " |"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows (as dicts) as a Markdown table."""
    head = (
        "| claim | ours | peer | unit | ratio | budget | peer is |\n|---|--:|--:|---|--:|---|---|"
    )
    return "\n".join([head, *map(_cells, rows)])


def section(result: dict[str, Any]) -> str:
    """One benchmark as Markdown: table, notes, machine, command."""
    facts = result["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    gpu = f"{facts['gpu']} (CUDA {facts['cuda']}); " if "gpu" in facts else ""
    counts = [f"{facts[what]} {what[: None if facts[what] > 1 else -1]}" for what in COUNTED]
    where = f"{gpu}{facts['processor']}; {', '.join(counts)}"
    told = (
        f"`{result['command']}`, {result['date']}: {where}; Python {facts['python']}, {versions}."
    )
    paragraphs = [f"## {result['title']}", table(result["rows"]), *result["notes"], told]
    return "\n\n".join(paragraphs) + "\n"


def render(folder: Path) -> str:
    """The page: a summary of every budget, then a section a file of results."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    names = [name for name in ORDER if name in found]
    results = [found[name] for name in [*names, *(name for name in found if name not in ORDER)]]
    judged = [row for result in results for row in result["rows"] if row["met"] is not None]
    summary = f"## Budgets: {sum(row['met'] for row in judged)} of {len(judged)} met\n\n"
    return "\n".join([HEADER, summary + table(judged) + "\n", *map(section, results)])


def main() -> None:
    """Render the page from the results."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "").parse_args()
    PAGE.write_text(render(RESULTS))
    print(os.path.relpath(PAGE))


if __name__ == "__main__":
    run(main)

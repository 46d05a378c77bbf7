"""Renders docs/benchmarks.md from the results that `report.publish` wrote."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.on_paper import on_paper

SECTIONS = (  # in this order; all others come after them
    *("input", "augment", "loss", "step"),
    *("gpu-steps", "gpu-compiled", "gpu-views", "gpu-loss", "gpu-loader"),
    *("start", "start-small", "work", "memory", "processes", "refresh"),
)
# Command that measures a budget -> start of the claim -> budget. The page lists those not measured.
BUDGETS = {
    "python -m benchmarks.input": {
        "500x375: JPEG to uint8 crops": ">= 8x",
        "500x375: `clsa pack` shards to uint8 crops": ">= 10x",
    },
    "python -m benchmarks.loss": {
        "CLSA 5x5, B 128, K 65,536, D 128: time": ">= 5x",
        "CLSA 5x5, B 128, K 65,536, D 128: extra peak memory": ">= 10x",
    },
    "python -m benchmarks.step": {
        "`moco-v2-small`, whole steps, batch 256": ">= 4x",
        "`moco-v2-small`, batch 256: encoder alone, of the step": ">= 90 %",
        "`clsa-small`, batch 256: encoder alone, of the step": ">= 90 %",
        "`clsa-multi-small`, batch 256: encoder alone, of the step": ">= 90 %",
    },
    "bash benchmarks/gpu.sh": {
        "steps: moco-v2, batch 256, plain: whole step": ">= 0.9x",
        "steps: clsa, batch 256, plain: whole step": ">= 0.9x",
        "steps: clsa, batch 256, plain: outside the encoder": "<= 7 %",
        "steps: clsa-multi, batch 256, plain: whole step": ">= 0.9x",
        "steps: clsa-multi, batch 256, plain: outside the encoder": "<= 10 %",
        "loss: clsa, batch 256: of its step": "<= 2 %",
        "loss: clsa-multi, batch 256: of its step": "<= 2 %",
    },
    "python -m benchmarks.scale --parts start --files 1000000": {
        "first step, 1,000,000 files, listed anew": "<= 60 s",
        "first step, 1,000,000 files, cached listing": "<= 5 s",
    },
    "python -m benchmarks.scale --parts memory": {
        "tiny resident run, main process": "<= 2 %",
        "tiny streamed run, main process": "<= 2 %",
        "tiny streamed run, worker": "<= 2 %",
    },
}
HEADER = """# Benchmarks

Written by `make bench` from `benchmarks/results/*.json`; do not edit. Each figure was measured on
the machine named below its table, ours and the peer in the same run, one after the other. A ratio
says how many times better ours is: how many times as fast, or how many times less memory. The
lowest and the highest ratio of the single rounds follow in brackets.

- B: pictures per batch. K: length of the queue. D: length of a projection.
- W x S: weak and strong queries of each picture. One more weak view gives the key, so 5x5 means
  11 views.
- Encoder alone: only forward and backward of the same networks, with projector, on views of the
  same shapes.
- `-small`: the recipe of that name at 32 px, encoder resnet10-w32 (one block per stage, width 32),
  queue 4,096.
"""
HEAD = """| claim | ours | peer | unit | ratio | budget | peer is |
|---|--:|--:|---|--:|---|---|"""


def number(value: float | None) -> str:
    """About three digits, with commas for thousands; a dash for None."""
    if value is None:
        return "-"
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows (as dicts) as a Markdown table."""
    return "\n".join([HEAD, *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    ratio = "-" if row["ratio"] is None else f"{number(row['ratio'])}x"
    if row.get("spread"):
        low, high = map(number, row["spread"])
        ratio += f" ({low} to {high})"
    budget = row["budget"] or "-"
    if row["met"] is not None:
        budget += " met" if row["met"] else " **missed**"
    cells = [row["claim"], number(row["ours"]), number(row["peer"]), row["unit"], ratio, budget]
    cells.append(row["against"] or "-")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def section(result: dict[str, Any]) -> str:
    """One benchmark as Markdown: what it compares, table, notes, command, machine."""
    facts = result["machine"]
    where = [facts["processor"]]
    if "gpu" in facts:
        driver = f", driver {facts['driver']}" if "driver" in facts else ""
        where.insert(0, f"{facts['gpu']} (CUDA {facts['cuda']}{driver})")
    where += [_counted(facts["cores"], "core"), _counted(facts["threads"], "thread")]
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    footer = f"`{result['command']}`, {result['date']}"
    if result["commit"]:
        footer += f", commit {result['commit']}"
    footer += (
        f", {result['seconds']:,.0f} s: {'; '.join(where)}; Python {facts['python']}, {versions}."
    )
    parts = [
        f"## {result['title']}",
        result["about"],
        table(result["rows"]),
        *result["notes"],
        footer,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def summary(results: Sequence[dict[str, Any]]) -> str:
    """All budgets: first those of `BUDGETS`, measured or not, then any other judged row."""
    judged = [row for result in results for row in result["rows"] if row["met"] is not None]
    listed, missing = [], []
    for command, budgets in BUDGETS.items():
        for claim, budget in budgets.items():
            found = [row for row in judged if row["claim"].startswith(claim)]
            listed += found
            if not found:
                missing.append(f"| {claim} | {budget} | `{command}` |")
    listed += [row for row in judged if row not in listed]
    met, count = sum(row["met"] for row in listed), len(listed) + len(missing)
    parts = [f"## Budgets: {met} of {count} met", table(listed)]
    if missing:
        head = "| not measured | budget | what measures it |\n|---|---|---|"
        parts.append("\n".join([head, *missing]))
    return "\n\n".join(parts) + "\n"


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All results by name, in the order of the page."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    names = [name for name in SECTIONS if name in found]
    return {name: found[name] for name in [*names, *(name for name in found if name not in names)]}


def render(folder: Path) -> str:
    """The page: all budgets, one section per file of results, and the calculated section."""
    results = list(load(folder).values())
    return "\n".join([HEADER, summary(results), *map(section, results), on_paper(results)])

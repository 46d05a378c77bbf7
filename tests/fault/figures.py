"""Stores results of checks as JSON, one file per part, and shows them in docs/reliability.md."""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from tests.fault.machine import NEEDS, cannot

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"
FEW = 10
BEGIN, END = "<!-- figures: written by tests/fault/figures.py -->", "<!-- end of figures -->"


class Figure(NamedTuple):
    """One row of the table."""

    check: int
    fault: str
    """What was injected."""
    tries: int
    survived: int
    """Tries after which everything was as promised; for bad savers, those that were caught."""
    note: str = ""
    faults: tuple[str, ...] = ()
    """What went wrong; printed, not stored."""

    @property
    def bound(self) -> str:
        """Upper bound of the failure rate at 95 %: 3/n; empty after a failure or if n < `FEW`."""
        if self.survived < self.tries or self.tries < FEW:
            return ""
        return f"{300 / self.tries:.1f} %"

    def __str__(self) -> str:
        bad = f"; {len(self.faults)} faults: {self.faults[0]}" if self.faults else ""
        note = f" ({self.note})" if self.note else ""
        return f"check {self.check} {self.fault}: {self.survived} of {self.tries}{note}{bad}"


def keep(part: str, figures: list[Figure], seconds: float, is_whole: bool = True) -> None:
    """Store the figures of a part and update the page.

    Args:
        seconds: duration of the checks.
        is_whole: whether these are all figures of the part; if not, the other stored ones stay.
    """
    rows = [figure._asdict() for figure in figures]
    for row in rows:
        del row["faults"]
    path = RESULTS / f"{part}.json"
    if not is_whole and path.exists():
        before = json.loads(path.read_text("utf-8"))
        fresh = {(row["check"], row["fault"]): row for row in rows}
        rows = [fresh.pop((row["check"], row["fault"]), row) for row in before["rows"]]
        rows = sorted([*rows, *fresh.values()], key=lambda row: row["check"])
        seconds += 60 * before["minutes"]
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round(seconds / 60, 1),
        "cores": len(os.sched_getaffinity(0)),
        "cannot": cannot(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")
    tell()


def tell() -> None:
    """Rewrite the table of docs/reliability.md from the stored figures of all parts."""
    text = DOCS.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(f"{before}{BEGIN}\n\n{table()}\n{END}{after}", "utf-8")


def table() -> str:
    """The figures of all parts as Markdown."""
    lines = [
        "| check | fault injected | tries | as promised | failure rate below (95 %) | note |",
        "|---:|---|---:|---:|---:|---|",
    ]
    told = []
    for path in sorted(RESULTS.glob("*.json")):
        facts = json.loads(path.read_text("utf-8"))
        for row in facts["rows"]:
            figure = Figure(**row)
            lines.append(
                f"| {path.stem}{figure.check} | {figure.fault} | {figure.tries} | "
                f"{figure.survived} | {figure.bound} | {figure.note} |"
            )
        missing = "; ".join(f"{need} ({NEEDS[need]})" for need in facts["cannot"]) or "nothing"
        told.append(
            f"Part {path.stem}: {facts['date']}, {facts['minutes']} minutes on {facts['cores']} "
            f"cores. Missing on this machine: {missing}."
        )
    return "\n".join([*lines, "", *told]) + "\n"

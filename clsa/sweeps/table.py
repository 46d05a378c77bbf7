"""Collects the outcomes of a sweep's runs; makes its table of means and deviations over seeds."""

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Column, Table
from rich.text import Text

from clsa.evaluate.results.records import Record
from clsa.options.config import Config
from clsa.options.protocols import CARDS
from clsa.runs.folder import RunFolder
from clsa.sweeps.grid import Cell, Grid, words
from clsa.system import files
from clsa.system.errors import RESUMABLE, ClsaError, Exit, first_line

NOTE = "note"
LEGEND = """\
Mean ± sample standard deviation over the seeds; the best mean of each accuracy is bold.
Accuracies are top-1 in percent (VOC07: mAP) after the last epoch; a gain is the accuracy of the
trained encoder minus that of the random encoder of the same seed.
ms per picture: wall-clock time of training, with loading and clustering, without judging and
saving. Pictures seen: steps times batch size, however many views each picture gives."""


class Outcome(Config):
    """The outcome of one run, as stored in table.json."""

    run: str
    """Name of the run's folder."""
    row: dict[str, str]
    seed: int
    code: int = 0
    """See `errors.Exit`."""
    reason: str = "not run yet"
    """finished, max_steps, max_minutes, or the error that ended the run early."""
    step: int = 0
    epoch: float = 0.0
    epochs: int
    """Length of the whole schedule."""
    max_minutes: float | None = None
    """The limit it ran under."""
    pictures_seen: int = 0
    ms_per_picture: float | None = None
    records: tuple[Record, ...] = ()
    """Records of the encoder in the run's folder."""

    def headline(self, protocol: str, encoder: str = "trained") -> float | None:
        """The card's headline metric in percent, after the last epoch; None if not judged."""
        metric = CARDS[protocol].headline
        for record in self.records:
            if (record.protocol, record.metric, record.encoder) == (protocol, metric, encoder):
                return record.value
        return None

    def gain(self, protocol: str) -> float | None:
        """Headline of the trained minus that of the random encoder, in points."""
        trained, random = self.headline(protocol), self.headline(protocol, "random")
        return None if trained is None or random is None else trained - random

    @property
    def note(self) -> str:
        """What the table says about a run that did not finish."""
        if self.reason == "finished":
            return ""
        if self.code and self.code not in RESUMABLE:
            return f"seed {self.seed} failed: {self.reason}"
        why = "interrupted" if self.code else self.reason
        if not self.step:
            return f"seed {self.seed} {why}"
        where = f"step {self.step}, epoch {self.epoch:.3g} of {self.epochs}"
        return f"seed {self.seed} stopped at {where}: {why}"


def outcome_of(
    cell: Cell, records: list[Record] | None = None, error: Exception | None = None
) -> Outcome:
    """Read a run's outcome from its folder, after judging gave `records` or `error` ended it."""
    options, folder = cell.options, RunFolder(cell.options.out)
    facts: dict[str, Any] = {
        "run": options.out.name,
        "row": cell.row,
        "seed": options.seed,
        "epochs": options.epochs,
        "max_minutes": options.max_minutes,
    }
    if records is not None or error is not None:
        status = next(iter(read_lines(folder.status_file)), {})
        lines = read_lines(folder.metrics)
        logged = [line for line in lines if "images_per_s" in line]
        steps = [0, *(int(line["step"]) for line in logged)]
        rates = [float(line["images_per_s"]) for line in logged]
        seconds = sum(
            (after - before) * options.batch_size / max(rate, 1e-9)
            for (before, after), rate in zip(itertools.pairwise(steps), rates, strict=True)
        ) + sum(float(line.get("refresh_s", 0)) for line in lines)
        facts |= {
            "reason": status.get("reason", "") if error is None else first_line(error),
            "step": status.get("step", 0),
            "epoch": logged[-1]["epoch"] if logged else 0.0,
            "pictures_seen": status.get("step", 0) * options.batch_size,
            "ms_per_picture": 1000 * seconds / (steps[-1] * options.batch_size) if rates else None,
            "records": tuple(records or ()),
        }
    if error is not None:
        facts["code"] = int(error.code if isinstance(error, ClsaError) else Exit.BUG)
    return Outcome(**facts)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete JSON lines of a file; none if the file is missing."""
    found = []
    with suppress(OSError):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


class Mean(NamedTuple):
    """Mean and deviation over the seeds that have a value."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for a single value."""
    n: int

    def text(self, sign: str = "-") -> str:
        """As the table shows it; `sign` "+" puts a plus before a positive gain."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.mean:{sign}.2f}{spread}"


def mean_of(values: Iterable[float | None]) -> Mean | None:
    """Mean and sample standard deviation of the values that are not None; None if all are."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    deviation = statistics.stdev(there) if len(there) > 1 else None
    return Mean(statistics.fmean(there), deviation, len(there))


def by_row(outcomes: list[Outcome]) -> list[list[Outcome]]:
    """Group the outcomes by row, in the order of the rows."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault(json.dumps(outcome.row), []).append(outcome)
    return list(rows.values())


def accuracies(grid: Grid, seeds: list[Outcome]) -> dict[str, Mean | None]:
    """The accuracy columns of one row."""
    columns = {}
    for protocol in grid.protocol:
        columns[protocol] = mean_of(outcome.headline(protocol) for outcome in seeds)
        columns[f"{protocol} gain"] = mean_of(outcome.gain(protocol) for outcome in seeds)
    return columns


class Sheet(NamedTuple):
    """A table as text."""

    titles: list[str]
    lines: list[list[str]]
    best: set[tuple[int, int]]
    """(line, column) of the best means."""


def sheet_of(grid: Grid, outcomes: list[Outcome]) -> Sheet:
    """The table of a sweep, finished or not."""
    rows = by_row(outcomes)
    found = [accuracies(grid, seeds) for seeds in rows]
    axes = list(outcomes[0].row)
    best = set()
    for column, name in enumerate(found[0], len(axes)):
        means = {
            place: round(mean.mean, 2) for place, row in enumerate(found) if (mean := row[name])
        }
        highest = max(means.values(), default=None)
        best |= {(place, column) for place, mean in means.items() if mean == highest}
    lines = []
    for seeds, columns in zip(rows, found, strict=True):
        judged = [outcome for outcome in seeds if outcome.records]
        speed = mean_of(outcome.ms_per_picture for outcome in judged)
        seen = sorted({outcome.pictures_seen for outcome in judged})
        lines.append(
            [
                *seeds[0].row.values(),
                *(
                    mean.text("+" if name.endswith(" gain") else "-") if mean else ""
                    for name, mean in columns.items()
                ),
                f"{len(judged)} of {len(seeds)}" if len(judged) < len(seeds) else str(len(seeds)),
                "" if speed is None else speed.text(),
                " to ".join(f"{count:,}" for count in dict.fromkeys([*seen[:1], *seen[-1:]])),
                "; ".join(outcome.note for outcome in seeds if outcome.note),
            ]
        )
    titles = [*axes, *found[0], "seeds", "ms per picture", "pictures seen", NOTE]
    if not any(line[-1] for line in lines):
        titles, lines = titles[:-1], [line[:-1] for line in lines]
    return Sheet(titles, lines, best if len(rows) > 1 else set())


def heading(grid: Grid, outcomes: list[Outcome]) -> str:
    """The sweep's question, and the standard error of a single figure."""
    records = [record for outcome in outcomes for record in outcome.records]
    judges = dict.fromkeys((record.n, record.split) for record in records)
    judged_on = [
        f"Judged on {n:,} pictures ({kind}): the standard error of one run is up to "
        f"{50 / math.sqrt(n):.1f} points."
        for n, kind in judges
    ]
    return "\n".join(filter(None, [words(grid.about) if grid.about else "", *judged_on]))


def markdown(grid: Grid, outcomes: list[Outcome]) -> str:
    """The text of table.md."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def plain(text: str) -> str:
        return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)

    sheet = sheet_of(grid, outcomes)
    bold = [
        [f"**{text}**" if (i, j) in sheet.best else plain(text) for j, text in enumerate(cells)]
        for i, cells in enumerate(sheet.lines)
    ]
    rule = line("---" for _ in sheet.titles)
    table = [line(map(plain, sheet.titles)), rule, *map(line, bold)]
    parts = [
        f"# {plain(words(grid.name))}",
        plain(heading(grid, outcomes)),
        "\n".join(table),
        LEGEND,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def printed(grid: Grid, outcomes: list[Outcome]) -> Table:
    """The table for a terminal, with the notes below it."""
    sheet = sheet_of(grid, outcomes)
    kept = [name for name in sheet.titles if name != NOTE]
    title = "\n".join(filter(None, [words(grid.name), heading(grid, outcomes)]))
    notes = "\n".join(f"{outcome.run}: {outcome.note}" for outcome in outcomes if outcome.note)
    table = Table(
        *(Column(Text(name), overflow="fold") for name in kept),
        title=Text(title), title_justify="left", caption=Text(notes), caption_justify="left",
    )  # fmt: skip
    for i, cells in enumerate(sheet.lines):
        styles = ["bold" if (i, j) in sheet.best else "" for j in range(len(kept))]
        table.add_row(*map(Text, cells, styles))
    return table


def write_tables(out: Path, grid: Grid, outcomes: list[Outcome]) -> None:
    """Write `table.md`, for reading, and `table.json`, with every record of every run."""
    files.write_text(out / "table.md", markdown(grid, outcomes))
    rows = [
        {"row": seeds[0].row, **{name: mean and mean._asdict() for name, mean in columns.items()}}
        for seeds in by_row(outcomes)
        for columns in [accuracies(grid, seeds)]
    ]
    runs = [
        {**outcome.model_dump(), "records": [record._asdict() for record in outcome.records]}
        for outcome in outcomes
    ]
    whole = {"name": grid.name, "about": grid.about, "rows": rows, "runs": runs}
    files.write_text(out / "table.json", json.dumps(whole, indent=1) + "\n")


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """The outcomes that an earlier start wrote to table.json, by run."""
    try:
        entries = json.loads(path.read_text("utf-8"))["runs"]
        outcomes = [Outcome.parse(entry, str(path)) for entry in entries]
    except (OSError, ValueError, LookupError, TypeError, ClsaError):
        return {}  # missing or damaged: all runs are judged again
    return {outcome.run: outcome for outcome in outcomes}

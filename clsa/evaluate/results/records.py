"""Results of an evaluation: accuracies, the records of results.json, and their table."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from rich.table import Table
from torch import Tensor

from clsa.system import files
from clsa.system.errors import ClsaError, Exit

MIN_CLASSES_TOP5 = 5


class Found(NamedTuple):
    """One number that a protocol found."""

    metric: str
    value: float
    """In percent."""
    chosen: str = ""
    """last or best: the epoch it belongs to; empty if there are no epochs."""
    epoch: int | None = None
    """Counted from 1."""


class Record(NamedTuple):
    """One number and everything it depends on."""

    protocol: str
    card: str
    """Hash of the protocol's card with all changes (`Card.hash`)."""
    settings: str
    """Changes to the card, as words `field=value`; empty if there are none."""
    metric: str
    value: float
    """In percent."""
    chosen: str
    """last or best: the epoch it belongs to; the best is chosen on the pictures it is judged on."""
    epoch: int | None
    encoder: str
    """random: the run's initial encoder; trained: its final one."""
    split: str
    """val: the set's own test pictures; holdout: a fifth of the labelled pictures; val-holdout: the
    same of `--val`; or the name of a list."""
    n: int
    """Number of pictures judged."""
    bank: int
    """Number of labelled pictures to learn from, or to compare with."""
    seed: int
    encoder_digest: str
    encoder_digest_after: str
    """Equal to `encoder_digest` for frozen protocols."""
    data_digest: str
    leaked: int | None
    """How many of the judged pictures the run learned from; None if not searched."""

    def key(self) -> tuple:
        """All fields but the results; records with equal keys answer the same question."""
        return tuple(
            self._replace(value=0, n=0, bank=0, epoch=None, encoder_digest_after="", leaked=None)
        )


def accuracies(predicted: Int64[Tensor, "n"], labels: Int64[Tensor, "n"]) -> dict[str, float]:
    """`top1`, the share of right predictions, and `balanced`, the mean of each class's share.

    Both are in percent. A class without pictures does not count in `balanced`.
    """
    right = (predicted == labels).double()
    _, place = labels.unique(return_inverse=True)
    balanced = torch.bincount(place, right) / torch.bincount(place)
    return {"top1": 100 * right.mean().item(), "balanced": 100 * balanced.mean().item()}


def accuracies_of(scores: Float[Tensor, "n C"], labels: Int64[Tensor, "n"]) -> dict[str, float]:
    """`accuracies` of the highest scores, and `top5` if there are at least five classes.

    Among equal scores the first class counts as higher.

    Raises:
        ClsaError: 76 if a score is not finite.
    """
    require_finite(scores)
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    place = ((scores > own) | ((scores == own) & before)).sum(1)
    found = accuracies(scores.argmax(1), labels)
    if scores.shape[1] >= MIN_CLASSES_TOP5:
        found["top5"] = 100 * (place < 5).double().mean().item()
    return found


def require_finite(scores: Float[Tensor, "n C"]) -> None:
    """Raise ClsaError 76 if a score is not finite: it cannot be ranked."""
    if not torch.isfinite(scores).all():
        why = "its scores are not finite: it has diverged"
        raise ClsaError("a classifier", why, "lower its rate by --change lr=...", Exit.UNHEALTHY)


def findings(values: dict[str, float], chosen: str = "", epoch: int | None = None) -> list[Found]:
    """`Found` for each number; `chosen` and `epoch` stay empty if there are no epochs."""
    return [Found(metric, value, chosen, epoch) for metric, value in values.items()]


def last_and_best(epochs: list[dict[str, float]], headline: str = "top1") -> list[Found]:
    """Numbers after the last epoch, and after the first epoch with the highest `headline`."""
    best = max(range(len(epochs)), key=lambda place: epochs[place][headline])
    last = findings(epochs[-1], "last", len(epochs))
    return last + findings(epochs[best], "best", best + 1)


def results_path(run: Path) -> Path:
    """Path of results.json: in the run folder, or next to an encoder's file."""
    return (run if run.is_dir() else run.parent) / "results.json"


def read_records(path: Path) -> list[Record]:
    """The records of a results.json; none if there is no such file.

    Raises:
        ClsaError: 65 if the file holds something else.
    """
    try:
        return [Record(**entry) for entry in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        why = f"not a list of results, or one of an earlier version ({type(error).__name__})"
        raise ClsaError(str(path), why, "move or rename it", Exit.BAD_DATA) from None


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a results.json in one step; they replace older records with the same key."""
    merged = {record.key(): record for record in [*read_records(path), *records]}
    entries = [record._asdict() for record in merged.values()]
    files.write_text(path, json.dumps(entries, indent=1) + "\n")


def table(records: Iterable[Record]) -> Table:
    """Random against trained encoder, one row per metric, differences in percentage points."""
    rows: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        name = f"{record.metric} ({record.chosen})" if record.chosen else record.metric
        key = (record.protocol, record.settings, name, record.split)
        rows.setdefault(key, {})[record.encoder] = record
    result = Table("protocol", "metric", "pictures")
    for title in ("random %", "trained %", "difference"):
        result.add_column(title, justify="right")
    before = ""
    for (protocol, settings, metric, split), found in rows.items():
        random, trained = (
            found[name].value if name in found else None for name in ("random", "trained")
        )
        difference = None if random is None or trained is None else f"{trained - random:+.2f}"
        shown = ["" if value is None else f"{value:.2f}" for value in (random, trained)]
        n = next(iter(found.values())).n
        heading = f"{protocol} ({settings})" if settings else protocol
        if heading != before:
            result.add_section()
        name = heading if heading != before else ""
        result.add_row(name, metric, f"{n:,} {split}", *shown, difference or "")
        before = heading
    return result

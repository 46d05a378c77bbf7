"""What an evaluation found: accuracies, the records of results.json, and their table."""

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
    """last or best: which epoch's; nothing where there are no epochs."""
    epoch: int | None = None
    """Counted from 1."""


class Record(NamedTuple):
    """One number and all that it depends on."""

    protocol: str
    card: str
    """Hash of the protocol's card (`Card.hash`), departures from it included."""
    settings: str
    """Departures from the card, as `field=value` words; nothing: as it stands."""
    metric: str
    value: float
    """In percent."""
    chosen: str
    """last or best: which epoch's; the best is chosen on the pictures it is judged on."""
    epoch: int | None
    encoder: str
    """random: as the run started; trained: as it ended."""
    split: str
    """val: the set's own test pictures; holdout: a fifth of the labelled ones; or a list's name."""
    n: int
    """Number of pictures judged."""
    bank: int
    """Number of labelled pictures learned from, or compared with."""
    seed: int
    encoder_digest: str
    encoder_digest_after: str
    """The same for frozen protocols."""
    data_digest: str
    leaked: int | None
    """How many of the judged pictures the run learned from; None: not looked."""

    def key(self) -> tuple:
        """What makes two records answers to one question: all but what was found."""
        return tuple(
            self._replace(value=0, n=0, bank=0, epoch=None, encoder_digest_after="", leaked=None)
        )


def accuracies(predicted: Int64[Tensor, "n"], labels: Int64[Tensor, "n"]) -> dict[str, float]:
    """`top1`, the share of right predictions, and `balanced`, the mean of each class's share.

    A class without pictures does not count in `balanced`. Both in percent.
    """
    right = (predicted == labels).double()
    _, place = labels.unique(return_inverse=True)
    balanced = torch.bincount(place, right) / torch.bincount(place)
    return {"top1": 100 * right.mean().item(), "balanced": 100 * balanced.mean().item()}


def accuracies_of(scores: Float[Tensor, "n C"], labels: Int64[Tensor, "n"]) -> dict[str, float]:
    """`accuracies` of the highest scores, and from five classes on `top5`; of equals the first.

    Raises:
        ClsaError: 76 when a score is not finite.
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
    """Refuse to rank by what is no number."""
    if not torch.isfinite(scores).all():
        why = "its scores are not finite: it has diverged"
        raise ClsaError("a classifier", why, "lower its rate by --change lr=...", Exit.UNHEALTHY)


def findings(values: dict[str, float], chosen: str = "", epoch: int | None = None) -> list[Found]:
    """Numbers of one epoch, or of none."""
    return [Found(metric, value, chosen, epoch) for metric, value in values.items()]


def last_and_best(epochs: list[dict[str, float]], headline: str = "top1") -> list[Found]:
    """Numbers after the last epoch, and after the first of those with the highest headline."""
    best = max(range(len(epochs)), key=lambda place: epochs[place][headline])
    last = findings(epochs[-1], "last", len(epochs))
    return last + findings(epochs[best], "best", best + 1)


def results_path(run: Path) -> Path:
    """results.json of a run folder, or beside an encoder's file."""
    return (run if run.is_dir() else run.parent) / "results.json"


def read_records(path: Path) -> list[Record]:
    """The records of a results.json, none when there is no such file.

    Raises:
        ClsaError: 65 when the file holds something else.
    """
    try:
        return [Record(**entry) for entry in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        why = f"not a list of results, or an earlier version's ({type(error).__name__})"
        raise ClsaError(str(path), why, "move it out of the way", Exit.BAD_DATA) from None


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a results.json in one step; an older one of the same key is replaced."""
    merged = {record.key(): record for record in [*read_records(path), *records]}
    entries = [record._asdict() for record in merged.values()]
    files.write_text(path, json.dumps(entries, indent=1) + "\n")


def table(records: Iterable[Record]) -> Table:
    """Random against trained encoder, one row a metric, difference in percentage points."""
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

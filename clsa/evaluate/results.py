"""What an evaluation found: accuracies, the records of results.json, and their table."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from rich.table import Table
from torch import Tensor

from clsa import files
from clsa.errors import ClsaError, Exit


class Record(NamedTuple):
    """One number and all that it depends on."""

    protocol: str
    metric: str
    value: float
    """In percent."""
    encoder: str
    """random: as the run started; trained: as it ended."""
    split: str
    """val: the set's own test pictures; holdout: a fifth of the labelled ones."""
    n: int
    """Number of pictures judged."""
    seed: int
    settings: str
    """Options of the protocol, as `name=value` words."""
    encoder_digest: str
    data_digest: str

    def key(self) -> tuple:
        """What makes two records answers to one question: all but value and n."""
        return tuple(self._replace(value=0, n=0))


def accuracies(predicted: Int64[Tensor, "n"], labels: Int64[Tensor, "n"]) -> dict[str, float]:
    """`top1`, the share of right predictions, and `balanced`, the mean of each class's share.

    A class without pictures does not count in `balanced`. Both in percent.
    """
    right = (predicted == labels).double()
    _, place = labels.unique(return_inverse=True)
    balanced = torch.bincount(place, right) / torch.bincount(place)
    return {"top1": 100 * right.mean().item(), "balanced": 100 * balanced.mean().item()}


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
        why = f"not a list of results ({type(error).__name__})"
        raise ClsaError(str(path), why, "move it out of the way", Exit.BAD_DATA) from None


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a results.json in one step; an older one of the same key is replaced."""
    merged = {record.key(): record for record in [*read_records(path), *records]}
    entries = [record._asdict() for record in merged.values()]
    files.write_text(path, json.dumps(entries, indent=1) + "\n")


def table(records: Iterable[Record]) -> Table:
    """Random against trained encoder, one row a metric, difference in percentage points."""
    rows: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        rows.setdefault((record.protocol, record.metric, record.split), {})[record.encoder] = record
    result = Table("protocol", "metric", "pictures")
    for title in ("random %", "trained %", "difference"):
        result.add_column(title, justify="right")
    for (protocol, metric, split), found in rows.items():
        random, trained = (
            found[name].value if name in found else None for name in ("random", "trained")
        )
        difference = None if random is None or trained is None else f"{trained - random:+.2f}"
        shown = ["" if value is None else f"{value:.2f}" for value in (random, trained)]
        n = next(iter(found.values())).n
        result.add_row(protocol, metric, f"{n} {split}", *shown, difference or "")
    return result

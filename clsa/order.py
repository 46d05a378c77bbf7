"""Which picture a step shows: the order of the epochs, and what stands in for unreadable ones.

Both are pure functions of (seed, epoch, index): there is no position to save.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from clsa import dist, rng
from clsa.decode import DecodeError
from clsa.errors import ClsaError, Exit
from clsa.sources import Source

MAX_REPLACEMENTS = 64
# Of `decode.DecodeError`. Processes exchange positions in it, so new ones go to the end.
REASONS = (
    *("empty", "not-an-image", "truncated", "too-large"),
    *("unsupported", "broken", "unreadable"),
)


@dataclass(frozen=True)
class Order:
    """Which pictures each step takes: a new permutation an epoch, without its partial last batch.

    Args:
        count: number of pictures.
        batch_size: global, over all processes.

    Raises:
        ClsaError: 2 when the batch is larger than the set.
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size > self.count:
            what = f"batch_size {self.batch_size}"
            why = f"larger than the set of {self.count} pictures"
            raise ClsaError(what, why, f"set batch_size to at most {self.count}")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.count // self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch that a step (counted from 0 over the run) belongs to."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> Int64[np.ndarray, " B"]:
        """Pictures of the global batch of a step."""
        start = step % self.steps_per_epoch * self.batch_size
        order = _permutation(self.seed, self.epoch(step), self.count)
        return order[start : start + self.batch_size]


class Rows(NamedTuple):
    """Pictures that stand in a batch."""

    index: Int64[np.ndarray, " b"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """Numbers of the pictures."""
    drawn: Int64[np.ndarray, " b"]
    """What the draws of their views are hashed from; another number, another view."""


class Companions(ABC):
    """Pictures that stand in each batch after those of the order: labelled ones, neighbours.

    Their draws must not be those of the order's pictures: numbers from `order.count` on.

    Attributes:
        count: how many a step, over all processes.
    """

    count: int

    @abstractmethod
    def rows(self, order: Order, step: int) -> Rows:
        """The companions of a step, the same on every process."""


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Int64[np.ndarray, " N"]:
    return rng.permutation(seed, epoch, count)


def _reason(source: Source, i: int) -> str:
    """Why a picture cannot be read, or an empty string."""
    try:
        source.read(i)
    except DecodeError as error:
        return error.reason
    return ""


class Quarantine:
    """Pictures that could not be read, with their reasons; too many end the run.

    Args:
        known: paths or names that an earlier start of the run could not read. They are tried
            again, so that mended pictures count no more.

    Attributes:
        reasons: reason by number in the source.

    Raises:
        ClsaError: 65 when the known ones alone are too many.
    """

    def __init__(self, source: Source, known: Collection[str] = ()):
        self.source = source
        self.reasons: dict[int, str] = {}
        self.budget = max(10, len(source) // 1000)
        if known:
            tried = {i: _reason(source, i) for i, name in enumerate(source.ids) if name in known}
            self.add({i: reason for i, reason in tried.items() if reason})

    def add(self, reasons: dict[int, str]) -> None:
        """Note unreadable pictures.

        Raises:
            ClsaError: 65 when more than max(10, 0.1 %) are known, or all of them.
        """
        self.reasons |= reasons
        if len(self.reasons) > self.budget or len(self.reasons) == len(self.source):
            raise self.error()

    def share(self, device: torch.device | None = None) -> None:
        """Take over what the other processes found; all of them call this together.

        Afterwards the same is known everywhere, so one budget holds for the run and it ends with
        the same error on every rank.

        Args:
            device: where processes exchange tensors, the CPU if not given (nccl needs a GPU).

        Raises:
            ClsaError: as `add`.
        """
        codes = torch.zeros(len(self.source), dtype=torch.uint8)
        for i, reason in self.reasons.items():
            codes[i] = 1 + REASONS.index(reason)
        codes = dist.all_max(codes.to(device)).cpu()
        self.add({i: REASONS[codes[i] - 1] for i in codes.nonzero().flatten().tolist()})

    def by_id(self) -> dict[str, str]:
        """Reasons by path or name, in the order of the source."""
        return {self.source.ids[i]: self.reasons[i] for i in sorted(self.reasons)}

    def error(self) -> ClsaError:
        """The error that names the first ten."""
        first = sorted(self.reasons)[:10]
        named = ", ".join(f"{self.source.ids[i]} ({self.reasons[i]})" for i in first)
        what = f"{len(self.reasons)} unreadable pictures among {len(self.source)}"
        return ClsaError(what, f"first: {named}", "repair or remove them", Exit.BAD_DATA)


def candidates(order: Order, epoch: int, i: int) -> Iterator[int]:
    """Picture `i`, then those that replace it, in turn, where it cannot be read.

    Replacements are hashed from (seed, epoch, i, attempt): no neighbour is favoured.
    """
    yield i
    attempts = np.arange(MAX_REPLACEMENTS)
    bits = rng.hash_bits(order.seed, epoch, np.array([i]), rng.REPLACEMENT, attempts)
    yield from (bits[0] % order.count).tolist()

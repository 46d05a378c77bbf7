"""Decides which pictures each step shows, and which pictures replace unreadable ones.

Both are pure functions of (seed, epoch, index), so there is no position to save.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from clsa.system.errors import ClsaError
from clsa.views import rng

MAX_REPLACEMENTS = 64


@dataclass(frozen=True)
class Order:
    """Which pictures each step takes: a new permutation every epoch, without a partial last batch.

    Args:
        count: number of pictures.
        batch_size: of the global batch, over all processes.

    Raises:
        ClsaError: 2 if the batch is larger than the set.
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
    """The pictures of a batch."""

    index: Int64[np.ndarray, " b"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """Numbers of the pictures."""
    drawn: Int64[np.ndarray, " b"]
    """Numbers from which the draws of their views are hashed; another number gives another view."""


class Companions(ABC):
    """Pictures appended to each batch after those of the order: labelled ones, or neighbours.

    Their `drawn` numbers must start at `order.count`, to differ from those of the order's pictures.

    Attributes:
        count: number of companions per step, over all processes.
    """

    count: int

    @abstractmethod
    def rows(self, order: Order, step: int) -> Rows:
        """The companions of a step, the same on every process."""


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Int64[np.ndarray, " N"]:
    return rng.permutation(seed, epoch, count)


def candidates(order: Order, epoch: int, i: int) -> Iterator[int]:
    """Picture `i`, then its replacements, to be tried in turn if it cannot be read.

    Replacements are hashed from (seed, epoch, i, attempt), so no neighbour is favoured.
    """
    yield i
    attempts = np.arange(MAX_REPLACEMENTS)
    bits = rng.hash_bits(order.seed, epoch, np.array([i]), rng.REPLACEMENT, attempts)
    yield from (bits[0] % order.count).tolist()

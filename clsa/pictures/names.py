"""Paths of very many pictures in little memory."""

import os
from collections.abc import Iterable, Iterator
from typing import SupportsIndex, final

import numpy as np
from jaxtyping import Int64


def as_text(path: str) -> str:
    """A path for a table or a listing; bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@final
class Names:
    """Paths as one block of bytes, which forked workers share for good.

    Of a list of strings each worker makes its own copy little by little, since looking at a string
    counts a reference inside it: 78 MB a worker over a million paths, where this takes none.

    Args:
        block: paths as the file system has them; a NUL between two where `starts` is not given.
        starts, ends: where each begins and ends in `block`.
    """

    def __init__(
        self,
        block: bytes,
        starts: Int64[np.ndarray, " N"] | None = None,
        ends: Int64[np.ndarray, " N"] | None = None,
    ):
        if starts is None or ends is None:
            nuls = np.flatnonzero(np.frombuffer(block, np.uint8) == 0)
            outer = np.array([len(block)] if block else [], np.int64)
            ends = np.concatenate([nuls, outer])
            starts = np.concatenate([0 * outer, nuls + 1])
        self._block, self._starts, self._ends = block, starts, ends

    @staticmethod
    def of(paths: Iterable[str]) -> "Names":
        """These paths; the same object where they are `Names` already."""
        if isinstance(paths, Names):
            return paths
        parts = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64) - 1
        starts = ends - np.array([len(part) for part in parts], np.int64)
        return Names(b"\0".join(parts), starts, ends)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: SupportsIndex) -> str:
        return os.fsdecode(self._block[self._starts[place] : self._ends[place]])

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), 4096):  # all at once would be the list
            part = slice(first, first + 4096)
            places = zip(self._starts[part].tolist(), self._ends[part].tolist(), strict=True)
            yield from (os.fsdecode(self._block[start:end]) for start, end in places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names | list) and list(self) == list(other)

    def take(self, rows: Int64[np.ndarray, " M"]) -> "Names":
        """The paths of these rows, in this order; shares the block."""
        return Names(self._block, self._starts[rows], self._ends[rows])

    @property
    def joined(self) -> bytes:
        """All paths, a NUL between two."""
        starts, ends = self._starts, self._ends
        if np.array_equal(starts[1:], ends[:-1] + 1):  # they lie one after the other
            return self._block[starts[0] : ends[-1]] if len(self) else b""
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        return b"\0".join([self._block[start:end] for start, end in pairs])

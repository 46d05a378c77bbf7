"""Stores the paths of very many pictures in little memory."""

import os
from collections.abc import Iterable, Iterator
from typing import SupportsIndex, final

import numpy as np
from jaxtyping import Int64


def as_text(path: str) -> str:
    """A path as text for a table or a list; bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@final
class Names:
    """Paths as one block of bytes, which forked workers share without ever copying it.

    A list of strings would gradually be copied in each worker, because reading a string changes
    its reference count: 78 MB per worker for a million paths, against none here.

    Args:
        block: the file system's bytes of all paths, separated by NUL if `starts` is not given.
        starts, ends: where each path begins and ends in `block`.
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
        """Make `Names` of these paths; `Names` are returned as they are."""
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
        for first in range(0, len(self), 4096):  # in parts, so as not to build the whole list
            part = slice(first, first + 4096)
            places = zip(self._starts[part].tolist(), self._ends[part].tolist(), strict=True)
            yield from (os.fsdecode(self._block[start:end]) for start, end in places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names | list) and list(self) == list(other)

    def take(self, rows: Int64[np.ndarray, " M"]) -> "Names":
        """The paths of these rows, in this order. The block is shared, not copied."""
        return Names(self._block, self._starts[rows], self._ends[rows])

    @property
    def joined(self) -> bytes:
        """All paths, separated by NUL."""
        starts, ends = self._starts, self._ends
        if np.array_equal(starts[1:], ends[:-1] + 1):  # already contiguous in the block
            return self._block[starts[0] : ends[-1]] if len(self) else b""
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        return b"\0".join([self._block[start:end] for start, end in pairs])

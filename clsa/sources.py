"""Pictures in a fixed order: names, labels, one picture at a time.

No source unpickles, extracts or runs anything, and none decides how pictures become batches.
"""

import contextlib
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final, Self, SupportsIndex, final

import numpy as np
from jaxtyping import Int64, UInt8

from clsa.decode import DecodeError, Picture, open_picture

MAX_FILE_BYTES = 1 << 30


@final
class Names:
    """Paths as one block of bytes, which forked workers share for good.

    Of a list of strings each worker makes its own copy little by little, since looking at a string
    counts a reference inside it: 78 MB a worker over a million paths, where this takes none.

    Args:
        block: paths as the file system has them, a NUL between two.
        starts, ends: where each begins and ends in `block`, for some of them or another order;
            empty paths are possible only with these.
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

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: SupportsIndex) -> str:
        return os.fsdecode(self._block[self._starts[place] : self._ends[place]])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):  # all at once would be the list
            part = slice(start, start + 4096)
            joined = Names(self._block, self._starts[part], self._ends[part]).joined
            yield from os.fsdecode(joined).split("\0")

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


class Source(ABC):
    """Pictures in a fixed order.

    Attributes:
        ids: path or name of each picture.
        labels: position of each picture's class in `classes`, -1 where unknown.
        classes: names of the classes.
    """

    ids: list[str] | Names
    labels: Int64[np.ndarray, " N"]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def open(self, i: int) -> Picture:
        """Picture number `i`, its size known; raises DecodeError where it cannot be read."""

    def read(self, i: int) -> UInt8[np.ndarray, "H W 3"]:
        """The pixels of picture number `i`; raises DecodeError where it cannot be read."""
        return self.open(i).pixels()

    @abstractmethod
    def encoded(self, i: int) -> bytes | None:
        """Picture number `i` as the bytes of an image file; None where it lies there decoded.

        Raises:
            DecodeError: where it cannot be read.
        """

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 (hex) of what the source holds; equal digests mean the same data."""

    @abstractmethod
    def subset(self, rows: Int64[np.ndarray, " M"]) -> Self:
        """The source of these pictures only, in this order; classes stay as they are."""

    def with_classes(self, classes: list[str]) -> Self:
        """The same pictures, labels renumbered by name; a class not in `classes` becomes -1."""
        position = {name: k for k, name in enumerate(classes)}
        numbers = np.array([position.get(name, -1) for name in self.classes] + [-1], np.int64)
        source = self.subset(np.arange(len(self)))
        source.labels, source.classes = (numbers[self.labels], list(classes))  # label -1: the last
        return source

    def _names_digest(self) -> "hashlib._Hash":
        digest = hashlib.sha256("\n".join([*self.classes, ""]).encode(errors="surrogateescape"))
        if isinstance(self.ids, Names):
            digest.update(self.ids.joined)
        else:
            digest.update("\0".join(self.ids).encode(errors="surrogateescape"))
        digest.update(self.labels.tobytes())
        return digest


@final
class Folder(Source):
    """Image files below one folder, decoded when read.

    Args:
        root: the folder.
        ids: their paths relative to `root`.
        sizes: of the files in bytes, -1 where unknown; looked up for `digest` if not given.
    """

    def __init__(
        self,
        root: str,
        ids: list[str] | Names,
        labels: Int64[np.ndarray, " N"],
        classes: list[str],
        sizes: Int64[np.ndarray, " N"] | None = None,
    ):
        self.root: Final = root
        self.ids, self.labels, self.classes = ids, labels, classes
        self._sizes = sizes

    def open(self, i: int) -> Picture:
        return open_picture(self.encoded(i))

    def encoded(self, i: int) -> bytes:
        try:
            # Non-blocking, as opening a FIFO would otherwise wait for ever.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            with open(os.open(os.path.join(self.root, self.ids[i]), flags), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise DecodeError("unreadable", "not a regular file")
                if status.st_size > MAX_FILE_BYTES:
                    raise DecodeError("too-large", "a file over 1 GiB")
                return file.read()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise DecodeError("unreadable", getattr(error, "strerror", None) or "") from None

    def digest(self) -> str:
        """SHA-256 of relative paths, file sizes (bytes), labels and classes, not of contents."""
        if self._sizes is None:
            self._sizes = np.array([self._size(name) for name in self.ids], np.int64)
        digest = self._names_digest()
        digest.update(self._sizes.astype("<i8").tobytes())
        return digest.hexdigest()

    def _size(self, name: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return os.stat(os.path.join(self.root, name)).st_size
        return -1

    def subset(self, rows: Int64[np.ndarray, " M"]) -> Self:
        ids = self.ids.take(rows) if isinstance(self.ids, Names) else [self.ids[i] for i in rows]
        sizes = None if self._sizes is None else self._sizes[rows]
        return type(self)(self.root, ids, self.labels[rows], self.classes, sizes)


@final
class Pictures(Source):
    """Pictures of one size, held in memory.

    Args:
        images: gray pictures (one channel) become three equal channels.
        ids: defaults to 0, 1, 2, ...
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "N H W C"],
        labels: Int64[np.ndarray, " N"],
        classes: list[str],
        ids: list[str] | None = None,
    ):
        self._stored: Final = images
        self.images: Final = np.broadcast_to(images, (*images.shape[:3], 3))
        self.labels, self.classes = labels, classes
        self.ids = ids if ids is not None else [str(i) for i in range(len(images))]

    def open(self, i: int) -> Picture:
        return Picture.of(self.images[i].copy())

    def encoded(self, i: int) -> None:
        return None

    def digest(self) -> str:
        """SHA-256 of pixels, names, labels and classes."""
        digest = self._names_digest()
        digest.update(str(self.images.shape).encode())
        for image in self.images:
            digest.update(image.tobytes())
        return digest.hexdigest()

    def subset(self, rows: Int64[np.ndarray, " M"]) -> Self:
        whole = np.array_equal(rows, np.arange(len(self)))
        images = self._stored if whole else self._stored[rows]
        return type(self)(images, self.labels[rows], self.classes, [self.ids[i] for i in rows])

"""Sources: pictures in a fixed order, with names and labels, read one at a time.

A source never unpickles, extracts or runs anything, and does not decide how batches are formed.
"""

import contextlib
import hashlib
import os
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Final, Self, final

import numpy as np
from jaxtyping import Int64, UInt8

from clsa.pictures.decode import DecodeError, Picture, ValueRange, open_picture
from clsa.pictures.names import Names

MAX_FILE_BYTES = 1 << 30


class Source(ABC):
    """Pictures in a fixed order.

    Attributes:
        ids: path or name of each picture.
        labels: position of each picture's class in `classes`, -1 if unknown.
        classes: names of the classes.
        taken: lines for the user about how the pictures were found (splits, links, files left
            out); empty for a subset.
        value_range: values that become black and white, for gray of more than 8 bits (`decode`).
    """

    taken: tuple[str, ...] = ()
    value_range: ValueRange | None = None
    ids: Names
    labels: Int64[np.ndarray, " N"]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def open(self, i: int) -> Picture:
        """Open picture number `i`, so that its size is known; raises DecodeError if unreadable."""

    def read(self, i: int) -> UInt8[np.ndarray, "H W 3"]:
        """The pixels of picture number `i`; raises DecodeError if it cannot be read."""
        return self.open(i).pixels()

    @abstractmethod
    def encoded(self, i: int) -> bytes | None:
        """Picture number `i` as the bytes of an image file; None if it is stored as pixels.

        Raises:
            DecodeError: if it cannot be read.
        """

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 (hex) of what the source holds; equal digests mean the same data."""

    @abstractmethod
    def marks(self) -> Int64[np.ndarray, " N"]:
        """One number per picture that changes with its content, as far as `digest` covers content.

        Only used to name the pictures that have changed; `digest` decides whether any has.
        """

    @abstractmethod
    def subset(self, rows: Int64[np.ndarray, " M"]) -> Self:
        """A source with only these pictures, in this order; classes stay as they are."""

    def scale_from(self, value_range: ValueRange | None) -> Self:
        """Scale gray pictures of more than 8 bits from `value_range`, from now on."""
        self.value_range = value_range
        return self

    def with_classes(self, classes: list[str]) -> Self:
        """The same pictures, labels renumbered by name; a class not in `classes` becomes -1."""
        position = {name: k for k, name in enumerate(classes)}
        numbers = np.array([position.get(name, -1) for name in self.classes] + [-1], np.int64)
        source = self.subset(np.arange(len(self)))
        source.labels, source.classes = (numbers[self.labels], list(classes))  # label -1: the last
        return source

    def _names_digest(self) -> "hashlib._Hash":
        digest = hashlib.sha256("\n".join([*self.classes, ""]).encode(errors="surrogateescape"))
        digest.update(self.ids.joined)
        digest.update(self.labels.tobytes())
        return digest


@final
class Folder(Source):
    """Image files below one folder, decoded when read.

    Args:
        root: the folder.
        ids: paths of the files relative to `root`.
        sizes: of the files in bytes, -1 if unknown; if not given, `digest` looks them up.
    """

    def __init__(
        self,
        root: str,
        ids: Iterable[str],
        labels: Int64[np.ndarray, " N"],
        classes: list[str],
        sizes: Int64[np.ndarray, " N"] | None = None,
    ):
        self.root: Final = root
        self.ids, self.labels, self.classes = Names.of(ids), labels, classes
        self._sizes = sizes

    def open(self, i: int) -> Picture:
        return open_picture(self.encoded(i), self.value_range)

    def encoded(self, i: int) -> bytes:
        try:
            # Non-blocking, because opening a FIFO would otherwise wait forever.
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
        """SHA-256 of relative paths, file sizes (bytes), labels and classes; not of contents."""
        digest = self._names_digest()
        digest.update(self.marks().astype("<i8").tobytes())
        return digest.hexdigest()

    def marks(self) -> Int64[np.ndarray, " N"]:
        """The files' sizes in bytes."""
        if self._sizes is None:
            self._sizes = np.array([self._size(name) for name in self.ids], np.int64)
        return self._sizes

    def _size(self, name: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return os.stat(os.path.join(self.root, name)).st_size
        return -1

    def subset(self, rows: Int64[np.ndarray, " M"]) -> Self:
        sizes = None if self._sizes is None else self._sizes[rows]
        ids = self.ids.take(rows)
        source = type(self)(self.root, ids, self.labels[rows], self.classes, sizes)
        return source.scale_from(self.value_range)


@final
class Joined(Source):
    """Pictures of several sources with the same classes, one source after the other.

    Args:
        parts: at least one source.
        rows: numbers of the pictures to take, counted over all parts; all if not given.
    """

    def __init__(self, parts: Sequence[Source], rows: Int64[np.ndarray, " N"] | None = None):
        ends = np.cumsum([len(part) for part in parts])
        rows = np.arange(ends[-1]) if rows is None else rows
        self.parts, self._rows = parts, rows
        self._owner = np.searchsorted(ends, rows, side="right")
        self._place = rows - (ends - [len(part) for part in parts])[self._owner]
        names = Names.of(name for part in parts for name in part.ids)
        self.ids = names.take(rows)
        self.labels = np.concatenate([part.labels for part in parts])[rows]
        self.classes = parts[0].classes
        self.value_range = parts[0].value_range

    def scale_from(self, value_range: ValueRange | None) -> Self:
        for part in self.parts:
            part.scale_from(value_range)
        return super().scale_from(value_range)

    def open(self, i: int) -> Picture:
        return self.parts[self._owner[i]].open(int(self._place[i]))

    def encoded(self, i: int) -> bytes | None:
        return self.parts[self._owner[i]].encoded(int(self._place[i]))

    def digest(self) -> str:
        """SHA-256 of the parts' digests, the chosen rows, names, labels and classes."""
        digest = self._names_digest()
        for part in self.parts:
            digest.update(part.digest().encode())
        digest.update(self._rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def marks(self) -> Int64[np.ndarray, " N"]:
        return np.concatenate([part.marks() for part in self.parts])[self._rows]

    def subset(self, rows: Int64[np.ndarray, " M"]) -> Self:
        source = type(self)(self.parts, self._rows[rows])
        source.labels, source.classes = self.labels[rows], self.classes
        return source


def joined(parts: Sequence[Source]) -> Source:
    """Join sources with the same classes; in-memory sources of one size stay in memory."""
    if len(parts) == 1:
        return parts[0]
    held = [part.images for part in parts if isinstance(part, Pictures)]
    if len(held) < len(parts) or len({images.shape[1:] for images in held}) > 1:
        return Joined(parts)
    names = [name for part in parts for name in part.ids]
    labels = np.concatenate([part.labels for part in parts])
    return Pictures(np.concatenate(held), labels, parts[0].classes, names)


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
        ids: Iterable[str] | None = None,
    ):
        self._stored: Final = images
        self.images: Final = np.broadcast_to(images, (*images.shape[:3], 3))
        self.labels, self.classes = labels, classes
        self.ids = Names.of(map(str, range(len(images))) if ids is None else ids)

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

    def marks(self) -> Int64[np.ndarray, " N"]:
        """Checksums of the pixels."""
        return np.array([zlib.crc32(image.tobytes()) for image in self._stored], np.int64)

    def subset(self, rows: Int64[np.ndarray, " M"]) -> Self:
        whole = np.array_equal(rows, np.arange(len(self)))
        images = self._stored if whole else self._stored[rows]
        return type(self)(images, self.labels[rows], self.classes, self.ids.take(rows))

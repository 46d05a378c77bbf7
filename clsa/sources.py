"""What is in a folder, a list or a known data set: names, labels, one picture at a time.

No source unpickles, extracts or runs anything, and none decides how pictures become batches.
"""

import contextlib
import hashlib
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self, final

import numpy as np
from jaxtyping import Int64, UInt8
from numpy.lib.npyio import NpzFile

from clsa.archives import NAMED, Split
from clsa.config import nearest
from clsa.decode import DecodeError, decode
from clsa.errors import ClsaError, Exit
from clsa.options import DataOptions

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_FILE_BYTES = 1 << 30


class Source(ABC):
    """Pictures in a fixed order.

    Attributes:
        ids: path or name of each picture.
        labels: position of each picture's class in `classes`, -1 where unknown.
        classes: names of the classes.
    """

    ids: list[str]
    labels: Int64[np.ndarray, " N"]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def read(self, i: int) -> UInt8[np.ndarray, "H W 3"]:
        """Picture number `i`; raises DecodeError where it cannot be read."""

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
        digest.update("\0".join(self.ids).encode(errors="surrogateescape"))
        digest.update(self.labels.tobytes())
        return digest


@final
class Folder(Source):
    """Image files below one folder, decoded when read.

    Args:
        root: the folder.
        ids: their paths relative to `root`.
    """

    def __init__(
        self, root: str, ids: list[str], labels: Int64[np.ndarray, " N"], classes: list[str]
    ):
        self.root: Final = root
        self.ids, self.labels, self.classes = ids, labels, classes

    def read(self, i: int) -> UInt8[np.ndarray, "H W 3"]:
        try:
            # Non-blocking, as opening a FIFO would otherwise wait for ever.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            with open(os.open(os.path.join(self.root, self.ids[i]), flags), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise DecodeError("unreadable", "not a regular file")
                if status.st_size > MAX_FILE_BYTES:
                    raise DecodeError("too-large", "a file over 1 GiB")
                data = file.read()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise DecodeError("unreadable", getattr(error, "strerror", None) or "") from None
        return decode(data)

    def digest(self) -> str:
        """SHA-256 of relative paths, file sizes (bytes), labels and classes, not of contents."""
        digest = self._names_digest()
        for name in self.ids:
            size = -1
            with contextlib.suppress(OSError, ValueError):
                size = os.stat(os.path.join(self.root, name)).st_size
            digest.update(size.to_bytes(8, "little", signed=True))
        return digest.hexdigest()

    def subset(self, rows: Int64[np.ndarray, " M"]) -> Self:
        return type(self)(self.root, [self.ids[i] for i in rows], self.labels[rows], self.classes)


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

    def read(self, i: int) -> UInt8[np.ndarray, "H W 3"]:
        return self.images[i].copy()

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


def open_source(spec: str, split: Split, options: DataOptions) -> Source:
    """The pictures that `spec` names (see `DataOptions.data`), in an order that never changes.

    `split` chooses a half where the set has two (named sets; folders with `train` and `val`), and
    is ignored elsewhere. `options.class_list` selects and orders the classes of both splits,
    `options.num_images` then shortens `train`.

    Raises:
        ClsaError: 66 when there is nothing to read, 65 when a file is damaged, 2 on a wrong value.
    """
    source = _open(spec, split)
    if options.class_list is not None:
        source = _selected(source, options.class_list, split)
    if split == "train" and options.num_images is not None:
        source = source.subset(np.arange(min(options.num_images, len(source))))
    if not len(source):
        of = f" of the classes in {options.class_list}" if options.class_list else ""
        hint = f"give some ({' '.join(SUFFIXES)}; links to folders are not followed)"
        raise ClsaError(spec, f"holds no pictures{of}", hint, Exit.NO_INPUT)
    return source


def open_val(options: DataOptions, classes: list[str]) -> Source | None:
    """Pictures to evaluate on: `options.val`, or else the set's own test split; None without one.

    Labels are numbered as in `classes`, those of the training pictures; -1 for a class they lack.
    With no `classes` (unlabelled training pictures) its own stay.
    """
    own = _name(options.data) in NAMED or _has_splits(options.data)
    spec = options.val or (options.data if own else None)
    if not spec:
        return None
    source = open_source(spec, "val", options)
    return source.with_classes(classes) if classes else source


def _name(spec: str) -> str:
    return spec.partition(":")[0]


def _open(spec: str, split: Split) -> Source:
    name, _, path = spec.partition(":")
    if name in NAMED:
        return Pictures(*NAMED[name](path, split))
    if os.path.isdir(spec):
        return _folder(os.path.join(spec, split) if _has_splits(spec) else spec)
    suffix = Path(spec).suffix.lower()
    if os.path.exists(spec) and suffix in (".txt", ".npz"):
        return _list(Path(spec)) if suffix == ".txt" else _npz(Path(spec))
    forms = f"a folder, a .txt list, an .npz, or one of {', '.join(NAMED)}"
    if not spec:
        raise ClsaError("no pictures given", "the data option is empty", f"give {forms}")
    if os.path.exists(spec):
        hint = "its folder" if suffix in SUFFIXES else forms
        raise ClsaError(spec, "a single file, neither .txt nor .npz", f"give {hint}")
    close = nearest(name, list(NAMED))
    hint = f"did you mean {close}?" if close else f"give {forms}"
    raise ClsaError(spec, "no such folder, file or data set", hint, Exit.NO_INPUT)


def _has_splits(spec: str) -> bool:
    return all(os.path.isdir(os.path.join(spec, split)) for split in ("train", "val"))


def _walk(root: str) -> Iterator[str]:
    """Relative paths of the image files below `root`, in the byte order of their names.

    Hidden names, links to folders (loops, ways out) and anything but regular files are passed over.
    """
    pending = [("", True)]
    while pending:
        relative, is_folder = pending.pop()
        if not is_folder:
            yield relative
            continue
        try:
            with os.scandir(os.path.join(root, relative)) as entries:
                found = sorted(entries, key=lambda entry: os.fsencode(entry.name), reverse=True)
        except OSError as error:
            path, why = os.path.join(root, relative), error.strerror or str(error)
            raise ClsaError(path, why, "make it readable or move it out", Exit.NO_INPUT) from None
        for entry in found:
            is_folder = entry.is_dir(follow_symlinks=False)
            is_image = entry.name.lower().endswith(SUFFIXES) and _is_file(entry)
            if not entry.name.startswith(".") and (is_folder or is_image):
                pending.append((os.path.join(relative, entry.name), is_folder))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def _folder(root: str) -> Folder:
    """Label = first-level subfolder, where two or more of them hold images; else all are -1.

    Images that lie beside such subfolders are -1.
    """
    ids = list(_walk(root))
    first = [name.split(os.sep, 1)[0] if os.sep in name else "" for name in ids]
    classes = sorted({*first} - {""}, key=os.fsencode)
    return Folder(root, ids, *_numbered(first, classes if len(classes) > 1 else []))


def _list(path: Path) -> Folder:
    """Lines of `PATH`, `PATH<tab>LABEL` or `PATH LABEL`, relative to the folder of the list."""
    ids, names = [], []
    for line in filter(None, map(str.strip, _text(path).split("\n"))):
        name, label = line, ""
        if "\t" in line:
            name, label = line.rsplit("\t", 1)
        elif " " in line and not line.lower().endswith(SUFFIXES):
            name, label = line.rsplit(" ", 1)
        ids.append(name.strip())
        names.append(label.strip())
    known = {name for name in names if name}
    numeric = all(name.removeprefix("-").isdecimal() for name in known)
    classes = sorted(known, key=int if numeric else os.fsencode)
    if numeric:
        classes = [name for name in classes if int(name) >= 0]
    return Folder(str(path.parent), ids, *_numbered(names, classes))


def _npz(path: Path) -> Pictures:
    """Arrays `images`, `x` or `arr_0` (N,H,W[,C]) uint8; labels in `labels` or `y` if present."""
    try:
        with open(path, "rb") as file, NpzFile(file, allow_pickle=False) as arrays:
            key = next((key for key in ("images", "x", "arr_0") if key in arrays), None)
            if key is None:
                why = f"no array `images`, `x` or `arr_0` (found: {', '.join(arrays) or 'none'})"
                raise ClsaError(str(path), why, "np.savez(path, images=..., labels=...)")
            images = np.asarray(arrays[key])  # a member that is no array comes as bytes
            values = next((arrays[key] for key in ("labels", "y") if key in arrays), None)
            values = None if values is None else np.asarray(values)
    except OSError as error:
        why = error.strerror or str(error)
        raise ClsaError(str(path), why, "make it readable", Exit.NO_INPUT) from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        why = str(error).splitlines()[0]
        if "Object arrays" in why:
            raise ClsaError(str(path), why, "save plain uint8 arrays with np.savez") from None
        raise ClsaError(str(path), f"damaged: {why}", "save it again", Exit.BAD_DATA) from None
    fits = images.ndim >= 3 and images.shape[3:] in ((), (1,), (3,))
    if images.dtype != np.uint8 or not fits:
        why = f"`{key}` is {images.dtype} {images.shape}"
        raise ClsaError(str(path), why, "save uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
    images = images[..., None] if images.ndim == 3 else images
    if values is None:
        return Pictures(images, np.full(len(images), -1, np.int64), [])
    if values.dtype.kind not in "iuU" or values.shape != (len(images),):
        why = f"labels are {values.dtype} {values.shape} for {len(images)} pictures"
        raise ClsaError(str(path), why, "save one integer or name for each picture")
    known = [value for value in np.unique(values).tolist() if isinstance(value, str) or value >= 0]
    names = [str(value) for value in values.tolist()]
    return Pictures(images, *_numbered(names, [str(value) for value in known]))


def _numbered(names: list[str], classes: list[str]) -> tuple[Int64[np.ndarray, " N"], list[str]]:
    """Position of each name in `classes` (-1 where it is not there), and `classes`."""
    position = {name: k for k, name in enumerate(classes)}
    return np.array([position.get(name, -1) for name in names], np.int64), classes


def _selected(source: Source, path: Path, split: Split) -> Source:
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    wanted = list(dict.fromkeys(lines))
    unknown = next((name for name in wanted if name not in source.classes), None)
    if unknown is not None and split == "train":  # a test split may lack some
        close = nearest(unknown, source.classes)
        hint = f"did you mean {close}?" if close else "name class folders of the set"
        raise ClsaError(f"{path}: {unknown}", "no such class in the set", hint)
    source = source.with_classes(wanted)
    return source.subset(np.flatnonzero(source.labels >= 0))


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="surrogateescape")
    except OSError as error:
        why = error.strerror or str(error)
        raise ClsaError(str(path), why, "check the path", Exit.NO_INPUT) from None

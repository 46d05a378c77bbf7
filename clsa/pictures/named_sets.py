"""Reads known data sets into arrays, from the binary files in which they are published.

Files are parsed as plain bytes: nothing is extracted, unpickled or run.
"""

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from clsa.pictures.decode import decode
from clsa.system.errors import ClsaError, Exit
from clsa.system.files import ASSETS

CLIPART = ASSETS / "clipart.tar"
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
FASHION = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
MAX_MEMBER_BYTES = 1 << 32

Split = Literal["train", "val"]


class Arrays(NamedTuple):
    """A whole split: pictures of one size, labels (-1 unknown), class names, picture names."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int64[np.ndarray, " N"]
    classes: list[str]
    ids: list[str] | None = None


def _clipart(path: str, split: Split) -> Arrays:
    """The embedded drawings, 64x64: train = train/CLASS and unlabelled, val = val/CLASS."""
    if path:
        raise ClsaError(f"clipart:{path}", "clipart takes no path", "write clipart")
    folders = ("val",) if split == "val" else ("train", "unlabelled")
    with tarfile.open(CLIPART) as tar:
        members = {member.name: member for member in tar if member.isfile()}
        names = sorted(name for name in members if name.split("/")[0] in folders)
        # One thread: for pictures this small, two are slower (0.90 s instead of 0.64 s).
        images = [decode(_bytes(tar.extractfile(members[name]))) for name in names]
    classes = sorted({name.split("/")[1] for name in members if name.startswith("train/")})
    position = {name: k for k, name in enumerate(classes)}
    labels = [position.get(name.split("/")[1], -1) for name in names]
    return Arrays(np.stack(images), np.array(labels, np.int64), classes, names)


def _fashion_mnist(path: str, split: Split) -> Arrays:
    folder, prefix = Path(path or FASHION_MNIST), "t10k" if split == "val" else "train"
    if not folder.is_dir():
        hint = "apt install dataset-fashion-mnist, or give fashion-mnist:FOLDER"
        raise ClsaError(str(folder), "no such folder", hint, Exit.NO_INPUT)
    images = _idx(folder / f"{prefix}-images-idx3-ubyte", 3)
    labels = _idx(folder / f"{prefix}-labels-idx1-ubyte", 1)
    return _checked(folder, images[..., None], labels, FASHION)


def _idx(path: Path, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """Read an IDX file of bytes, `PATH.gz` or the unpacked `PATH`.

    It contains 0x0800 + dimensions and the sizes, all big-endian uint32, then the values.
    """
    packed = path.with_name(f"{path.name}.gz")
    try:
        data = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(packed, str(error)) from None
    except OSError as error:
        why, hint = error.strerror or str(error), "give the folder that holds it, or its .gz"
        raise ClsaError(str(path), why, hint, Exit.NO_INPUT) from None
    header = 4 + 4 * dimensions
    if len(data) < header or int.from_bytes(data[:4], "big") != 0x0800 + dimensions:
        raise _damaged(path, f"not an IDX file of {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(data[4:header], ">u4"))
    values = np.frombuffer(data, np.uint8, offset=header)
    if values.size != np.prod(shape, dtype=object):
        raise _damaged(path, f"{values.size} values for the shape {shape}")
    return values.reshape(shape)


def _cifar10(path: str, split: Split) -> Arrays:
    train = [f"data_batch_{k}.bin" for k in range(1, 6)]
    files = ["test_batch.bin"] if split == "val" else train
    found = _members("cifar10", path, "cifar-10-batches-bin", files, "batches.meta.txt")
    rows = _records(path, found, files, 1 + 3072)
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _checked(path, images, rows[:, 0], _class_names(found, "batches.meta.txt", 10))


def _cifar100(path: str, split: Split) -> Arrays:
    """Records hold a coarse label, a fine label and the picture; the fine one is used."""
    files = ["test.bin" if split == "val" else "train.bin"]
    found = _members("cifar100", path, "cifar-100-binary", files, "fine_label_names.txt")
    rows = _records(path, found, files, 2 + 3072)
    images = rows[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _checked(path, images, rows[:, 1], _class_names(found, "fine_label_names.txt", 100))


def _stl10(path: str, split: Split) -> Arrays:
    """train = unlabeled (-1), then train; val = test. The files count labels from 1."""
    images_of = ["test_X.bin"] if split == "val" else ["unlabeled_X.bin", "train_X.bin"]
    labels_of = "test_y.bin" if split == "val" else "train_y.bin"
    found = _members("stl10", path, "stl10_binary", [*images_of, labels_of], "class_names.txt")
    rows = _records(path, found, images_of, 3 * 96 * 96)
    images = rows.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # stored column by column
    known = np.frombuffer(found[labels_of], np.uint8).astype(np.int64) - 1
    labels = np.full(len(images), -1, np.int64)
    if len(known) > len(labels):
        raise _damaged(path, f"{len(known)} labels for {len(labels)} pictures")
    labels[len(labels) - len(known) :] = known
    return _checked(path, images, labels, _class_names(found, "class_names.txt", 10))


NAMED: dict[str, Callable[[str, Split], Arrays]] = {
    "clipart": _clipart,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "stl10": _stl10,
}


def _members(name: str, path: str, folder: str, files: list[str], names: str) -> dict[str, bytes]:
    """Read the wanted files of a published archive, from its tar or its unpacked folder.

    The file of class names, `names`, may be missing. Tar members are read as a stream.
    """
    if not path:
        hint = f"write {name}:PATH, the folder {folder} or its .tar.gz"
        raise ClsaError(name, "no path given", hint)
    found: dict[str, bytes] = {}
    try:
        if Path(path).is_dir():
            nested = Path(path) / folder
            base = nested if nested.is_dir() else Path(path)
            for file in (*files, names):
                if (base / file).is_file():
                    found[file] = (base / file).read_bytes()
        else:
            for file, data in _tar_files(path):
                if file in (*files, names):
                    found[file] = _bytes(data)
                if len(found) == len(files) + 1:
                    break
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise ClsaError(path, why, f"give {folder} or its .tar.gz", Exit.NO_INPUT) from None
    missing = [file for file in files if file not in found]
    if missing:
        hint = f"give {folder} (the binary version) or its .tar.gz"
        raise ClsaError(path, f"{missing[0]} is missing", hint, Exit.NO_INPUT)
    return found


def _tar_files(path: str) -> Iterator[tuple[str, IO[bytes] | None]]:
    with tarfile.open(path, "r|*") as tar:
        for member in tar:
            if member.isreg() and not member.issparse() and member.size <= MAX_MEMBER_BYTES:
                yield member.name.split("/")[-1], tar.extractfile(member)


def _bytes(file: IO[bytes] | None) -> bytes:
    return file.read() if file else b""


def _records(
    path: str, found: dict[str, bytes], files: list[str], size: int
) -> UInt8[np.ndarray, "N size"]:
    for file in files:
        if not found[file] or len(found[file]) % size:
            raise _damaged(f"{path}: {file}", f"not a whole number of {size}-byte records")
    rows = [np.frombuffer(found[file], np.uint8).reshape(-1, size) for file in files]
    return np.concatenate(rows)


def _class_names(found: dict[str, bytes], file: str, count: int) -> list[str]:
    names = found.get(file, b"").decode("utf-8", "replace").split()
    return names if len(names) == count else [str(k) for k in range(count)]


def _checked(
    path: Path | str,
    images: UInt8[np.ndarray, "N H W C"],
    labels: Integer[np.ndarray, " M"],
    classes: list[str],
) -> Arrays:
    if len(images) != len(labels):
        raise _damaged(path, f"{len(labels)} labels for {len(images)} pictures")
    if len(labels) and int(labels.max()) >= len(classes):
        raise _damaged(path, f"label {labels.max()} for {len(classes)} classes")
    return Arrays(images, labels.astype(np.int64), classes)


def _damaged(path: Path | str, why: str) -> ClsaError:
    return ClsaError(str(path), f"damaged: {why}", "download the file again", Exit.BAD_DATA)

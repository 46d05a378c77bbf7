"""Reads packed sets: pictures in tar shards, found through an index (`clsa pack` writes both)."""

import contextlib
import functools
import io
import json
import os
import stat
import tarfile
from pathlib import Path
from typing import IO, Any, Final, Self, final

import numpy as np
from jaxtyping import Int64, UInt8
from numpy.lib.npyio import NpzFile

from clsa.pictures.decode import MAX_PIXELS, DecodeError, Picture, ValueRange, open_picture
from clsa.pictures.names import Names
from clsa.pictures.sources import MAX_FILE_BYTES, Source
from clsa.system.errors import ClsaError, Exit, first_line

INDEX = "index.npz"
UNFINISHED = ".packing"  # folder inside a packed set; removed once the index is written
VERSION = 1
MAX_OPEN_SHARDS = 256
_KEY = "clsa_pack"  # the member that marks an .npz as written by clsa

# Columns of `places`: shard number, offset and length in bytes; upright size of the original.
SHARD, OFFSET, LENGTH, HEIGHT, WIDTH = range(5)
UNREADABLE = (0, 0, 0, 1, 1)  # place of an unreadable picture: it reads as empty


def shard_name(k: int) -> str:
    """File name of shard number `k`."""
    return f"shard-{k:06d}.tar"


def write_arrays(file: IO[bytes], meta: dict[str, Any], **arrays: np.ndarray) -> None:
    """Write an .npz of arrays, with `meta` as JSON in one of them; equal input, equal bytes."""
    text = np.frombuffer(json.dumps({"version": VERSION, **meta}).encode(), np.uint8)
    buffer = io.BytesIO()  # `np.savez` needs a file that is readable, too
    members: dict[str, Any] = {_KEY: text, **arrays}
    np.savez(buffer, **members)
    file.write(buffer.getvalue())


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Read what `write_arrays` wrote; None if the file is missing or an .npz of another program.

    Raises:
        ClsaError: 66 if it cannot be read, 65 if it is damaged or has another version.
    """
    hint = "pack the pictures again, or move this file away if clsa pack did not write it"
    try:
        with open(path, "rb") as file, NpzFile(file, allow_pickle=False) as members:
            # Check before reading: a compressed member may expand to any size.
            assert members.zip is not None
            unfolded = sum(info.file_size for info in members.zip.infolist())
            if _KEY not in members:
                return None
            if unfolded > path.stat().st_size:
                raise ValueError("its members are larger than the file")
            arrays = {name: np.asarray(members[name]) for name in members}
        meta = json.loads(arrays.pop(_KEY).tobytes())
        version = meta["version"]
    except FileNotFoundError:
        return None
    except OSError as error:
        why = error.strerror or str(error)
        raise ClsaError(str(path), why, "make it readable", Exit.NO_INPUT) from None
    except Exception as error:  # zipfile and NumPy raise nearly anything on hostile bytes
        why = f"damaged ({first_line(error)})"
        raise ClsaError(str(path), why, hint, Exit.BAD_DATA) from None
    if version != VERSION:
        why = f"format {version!r}, this clsa reads format {VERSION}"
        raise ClsaError(str(path), why, "pack the pictures again", Exit.BAD_DATA)
    return meta, arrays


class ShardWriter:
    """Writes a tar member by member. Equal input gives equal bytes, whoever writes it and when.

    Attributes:
        length: bytes written so far.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self.length = file, 0

    def add(self, key: str, suffix: str, data: bytes, label: int) -> int:
        """Write one picture as KEY.suffix and, if it has a label, KEY.cls.

        Returns:
            Where the picture's data starts in the file.
        """
        start = self._member(f"{key}.{suffix}", data)
        if label >= 0:
            self._member(f"{key}.cls", str(label).encode())
        return start

    def finish(self) -> None:
        """Write the end of the tar: two empty blocks, padded to a whole record."""
        end = 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(end + -(self.length + end) % tarfile.RECORDSIZE))

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        head = info.tobuf(tarfile.USTAR_FORMAT)
        start = self.length + len(head)
        for piece in (head, data, bytes(-len(data) % tarfile.BLOCKSIZE)):
            self._file.write(piece)
            self.length += len(piece)
        return start


def index_meta(root: Path) -> dict[str, Any] | None:
    """How the set in `root` was packed; None if `root` has no index of clsa.

    Raises:
        ClsaError: as `read_arrays`.
    """
    found = read_arrays(root / INDEX)
    return None if found is None else found[0]


def open_shards(root: str) -> "Shards | None":
    """Open the packed set in a folder; None if there is none.

    Raises:
        ClsaError: 65 if the index is damaged, a shard is missing or has another size, the format
            has another version, or packing has not finished; 66 if the index cannot be read.
    """
    path = Path(root) / INDEX
    found = read_arrays(path)
    if found is None:
        if os.path.isdir(os.path.join(root, UNFINISHED)):
            step = "run the same clsa pack command again to finish it"
            raise ClsaError(root, "packing has not finished", step, Exit.BAD_DATA)
        return None
    try:
        shards = Shards(root, *_checked(*found)).scale_from(_value_range(found[0]))
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        why, step = f"damaged ({first_line(error)})", "pack the pictures again"
        raise ClsaError(str(path), why, step, Exit.BAD_DATA) from None
    for k, (size, _) in enumerate(shards.shards):
        _require_shard(os.path.join(root, shard_name(k)), size)
    return shards


def _checked(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """Arguments of `Shards` except `root`. Raises any exception if they do not fit together."""
    places, labels, ids = (arrays[name] for name in ("places", "labels", "ids"))
    classes = [str(name) for name in meta["classes"]]
    shards = [(int(shard["size"]), str(shard["sha256"])) for shard in meta["shards"]]
    count = len(labels)
    for name, array, dtype, shape in (
        ("places", places, np.int64, (count, 5)),
        ("labels", labels, np.int64, (count,)),
        ("ids", ids, np.uint8, (ids.size,)),
    ):
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} {array.shape}")
    names = Names(ids.tobytes())
    if len(names) != count:
        raise ValueError(f"{len(names)} names for {count} pictures")
    shard, offset, length, height, width = places.T
    if np.any((shard < 0) | (shard >= len(shards))):
        raise ValueError("a shard that is not listed")
    sizes = np.array([size for size, _ in shards], np.int64)[shard]
    inside = (offset >= 0) & (length >= 0) & (length <= MAX_FILE_BYTES) & (offset <= sizes - length)
    if not inside.all():
        raise ValueError("a picture outside its shard")
    if np.any((height < 1) | (width < 1) | (height > MAX_PIXELS // np.maximum(width, 1))):
        raise ValueError("a picture of an impossible size")
    if np.any((labels < -1) | (labels >= len(classes))):
        raise ValueError("a label without a class")
    return shards, places, names, labels, classes


def _value_range(meta: dict[str, Any]) -> ValueRange | None:
    """The range that was given when the set was packed; small pictures keep their own values."""
    given = meta.get("value_range")
    return (float(given[0]), float(given[1])) if given else None


def _require_shard(path: str, size: int) -> None:
    found = None
    with contextlib.suppress(OSError):
        status = os.stat(path)
        found = status.st_size if stat.S_ISREG(status.st_mode) else -1
    if found != size:
        why = "missing" if found is None else f"damaged: {found} bytes, its index says {size}"
        step = "copy it again, or delete the folder and pack the pictures again"
        raise ClsaError(path, why, step, Exit.BAD_DATA)


class _File:
    """A file descriptor that threads may share; it is closed when its last user is gone."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(maxsize=MAX_OPEN_SHARDS)
def _opened(path: str, _sha256: str) -> _File:
    """An open shard. The SHA-256 tells apart shards packed again under the same name."""
    return _File(path)


def _reduced(packed: Picture, scale: float, reduction: int) -> UInt8[np.ndarray, "h w 3"]:
    """`Picture.pixels` for a picture that packing has already reduced by `scale`."""
    fits = [further for further in (1, 2, 4, 8) if further * scale <= reduction]
    return packed.pixels(max(fits, default=1))


@final
class Shards(Source):
    """Pictures packed by `clsa pack`, each read with one positioned read.

    Heights and widths are those of the original pictures, so that a crop has the same box as before
    packing. The packed picture may have fewer pixels.

    Args:
        root: folder of the shards.
        shards: size in bytes and SHA-256 of each shard.
        places: columns `SHARD`, `OFFSET`, `LENGTH`, `HEIGHT`, `WIDTH` of each picture.
    """

    def __init__(
        self,
        root: str,
        shards: list[tuple[int, str]],
        places: Int64[np.ndarray, "N 5"],
        ids: Names,
        labels: Int64[np.ndarray, " N"],
        classes: list[str],
    ):
        self.root: Final = root
        self.shards, self.places = shards, places
        self.ids, self.labels, self.classes = ids, labels, classes

    def open(self, i: int) -> Picture:
        height, width = self.places[i, HEIGHT:].tolist()
        packed = open_picture(self.encoded(i), self.value_range)
        scale = min(height, width) / min(packed.height, packed.width)
        return Picture(height, width, packed.held, functools.partial(_reduced, packed, scale))

    def encoded(self, i: int) -> bytes:
        shard, offset, length = self.places[i, :HEIGHT].tolist()
        try:
            file = _opened(os.path.join(self.root, shard_name(shard)), self.shards[shard][1])
            data = os.pread(file.descriptor, length, offset)
        except (OSError, ValueError) as error:
            raise DecodeError("unreadable", getattr(error, "strerror", None) or "") from None
        if len(data) < length:
            raise DecodeError("unreadable", "the shard ends before the picture")
        return data

    def digest(self) -> str:
        """SHA-256 of names, labels, classes, places and the shards' sizes and SHA-256."""
        digest = self._names_digest()
        digest.update(self.places.tobytes())
        digest.update(json.dumps(self.shards).encode())
        return digest.hexdigest()

    def marks(self) -> Int64[np.ndarray, " N"]:
        """Lengths and sizes, mixed into one number; positions in the shards do not count."""
        length, height, width = self.places[:, LENGTH:].T
        return (length * MAX_PIXELS + height) * MAX_PIXELS + width

    def subset(self, rows: Int64[np.ndarray, " M"]) -> Self:
        places, ids, labels = self.places[rows], self.ids.take(rows), self.labels[rows]
        source = type(self)(self.root, self.shards, places, ids, labels, self.classes)
        return source.scale_from(self.value_range)

"""Lists the image files below a folder with their sizes, and caches the listing of large folders.

A listing of more than `MIN_CACHED` files is saved as one file in the cache folder: $CLSA_CACHE, or
else $XDG_CACHE_HOME/clsa, or else ~/.cache/clsa (CLSA_CACHE=off: no cache). The cached listing is
used as long as the times of every folder are unchanged, to the nanosecond, and a fixed sample of
1,000 files has unchanged sizes. Overwriting a file outside the sample in place is not noticed,
because it does not change the times of its folder. If anything is wrong with the cache, the folder
is listed again.
"""

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from clsa.pictures.names import Names
from clsa.system import files
from clsa.system.errors import ClsaError, Exit

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MIN_CACHED = 20_000
RACY_NS = 2_000_000_000  # two changes within one tick of a file system's clock look like one
NUM_SAMPLED = 1000

_SUFFIXES = tuple(suffix.encode() for suffix in SUFFIXES)
_SEP = os.fsencode(os.sep)
_FORMAT = b"clsa listing 1\n"


class Listing(NamedTuple):
    """The image files below a folder, in the byte order of their names, folder by folder."""

    names: Names
    """Paths relative to the folder."""
    sizes: Int64[np.ndarray, " N"]
    """Bytes; -1 if the system cannot say."""
    folders: list[str]
    """All folders that were searched, as relative paths; first the top one, an empty string."""
    owners: Int64[np.ndarray, " N"]
    """For each file, the position of its folder in `folders`."""


class _Walk(NamedTuple):
    """A listing with the times that show whether it is still valid."""

    listing: Listing
    times: Int64[np.ndarray, "F 2"]
    """Modification and status change time of each folder (st_mtime_ns, st_ctime_ns)."""


def list_images(root: str) -> Listing:
    """The image files below `root`, from the cache if it is still valid.

    Skips hidden names, links to folders (they may form loops or lead out of `root`) and everything
    that is not a regular file.

    Raises:
        ClsaError: 66 if a folder cannot be read.
    """
    cache = _cache_path(root)
    known = None if cache is None else _load(cache)
    if known is not None and _holds(root, known):
        return known.listing
    start = time.time_ns()
    walk = _walk(os.fsencode(root))
    settled = walk.times.max(initial=0) < start - RACY_NS
    if cache is not None and settled and len(walk.listing.sizes) > MIN_CACHED:
        with suppress(ClsaError, OSError):  # without a writable cache, work uncached
            cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.write_atomic(cache, lambda file: file.write(_packed(walk)))
    return walk.listing


# ---- the folder


def _walk(root: bytes) -> _Walk:
    names: list[bytes] = []
    sizes: list[int] = []
    owners: list[int] = []
    folders: list[bytes] = []
    times: list[tuple[int, int]] = []
    pending: list[tuple[int, Iterator[tuple[bytes, int | None]]]] = []

    def enter(folder: bytes) -> None:
        path = os.path.join(root, folder)
        try:
            times.append(_times(path))  # before listing: changes during it must show
            pending.append((len(folders), iter(_entries(path, folder and folder + _SEP))))
            folders.append(folder)
        except OSError as error:
            why = error.strerror or str(error)
            hint = "make it readable or move it out"
            raise ClsaError(os.fsdecode(path), why, hint, Exit.NO_INPUT) from None

    enter(b"")
    while pending:
        owner, entries = pending[-1]
        for name, size in entries:
            if size is None:
                enter(name)
                break
            names.append(name)
            sizes.append(size)
            owners.append(owner)
        else:
            pending.pop()
    numbers = np.array(sizes, np.int64), [*map(os.fsdecode, folders)], np.array(owners, np.int64)
    return _Walk(Listing(Names(b"\0".join(names)), *numbers), np.array(times, np.int64))


def _entries(path: bytes, prefix: bytes) -> list[tuple[bytes, int | None]]:
    """Image files (path, size) and folders (path, None) directly in a folder, in byte order."""
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(b"."):
                continue
            if entry.is_dir(follow_symlinks=False):
                found.append((prefix + name, None))
            elif name.lower().endswith(_SUFFIXES) and (size := _size(entry)) is not None:
                found.append((prefix + name, size))
    found.sort()
    return found


def _size(entry: os.DirEntry[bytes]) -> int | None:
    """Bytes of a regular file, -1 if the system cannot say; None for anything else."""
    try:
        if not entry.is_file():
            return None
    except OSError:  # a link to itself
        return None
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def _times(path: str | bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ctime_ns


# ---- the cache


def _cache_path(root: str) -> Path | None:
    """Where the listing of `root` is cached; None if caching is off or there is no home folder."""
    given = os.environ.get("CLSA_CACHE")
    if given is None:
        base = os.environ.get("XDG_CACHE_HOME", "")
        base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
        given = os.path.join(base, "clsa") if os.path.isabs(base) else ""
    if given in ("", "off"):
        return None
    key = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()
    return Path(given, f"listing-{key}")


def _packed(walk: _Walk) -> bytes:
    """Format, SHA-256 of the rest; F, N, bytes of the F folders; times, sizes, owners; names."""
    names, sizes, folders, owners = walk.listing
    text = os.fsencode("\0".join(folders))
    counts = np.array([len(folders), len(sizes), len(text)])
    numbers = np.concatenate([counts, walk.times.ravel(), sizes, owners]).astype("<i8")
    body = numbers.tobytes() + text + names.joined
    return _FORMAT + hashlib.sha256(body).digest() + body


def _load(path: Path) -> _Walk | None:
    """Read what `_packed` wrote; None for anything that `_packed` cannot have written."""
    head = len(_FORMAT) + hashlib.sha256().digest_size
    try:
        if not path.is_file():
            return None
        content = memoryview(path.read_bytes())
    except (OSError, ValueError, MemoryError):
        return None
    body = content[head:]
    if content[:head] != _FORMAT + hashlib.sha256(body).digest() or len(body) < 3 * 8:
        return None
    num_folders, count, text = np.frombuffer(body, "<i8", 3).tolist()
    end = 8 * (3 + 2 * num_folders + 2 * count)
    if num_folders < 1 or count < 1 or text < 0 or end + text > len(body):
        return None
    numbers = np.frombuffer(body[24:end], "<i8").astype(np.int64)
    times, sizes, owners = np.split(numbers, [2 * num_folders, 2 * num_folders + count])
    folders = os.fsdecode(bytes(body[end : end + text])).split("\0")
    joined = bytes(body[end + text :])
    names = Names(joined)
    fits = len(folders) == num_folders and folders[0] == "" and len(names) == count
    known = owners.min() >= 0 and owners.max() < num_folders
    below = os.fsencode("\0".join(folders[1:]))
    if not (fits and known and _is_inside(joined) and (_is_inside(below) or num_folders == 1)):
        return None
    return _Walk(Listing(names, sizes, folders, owners), times.reshape(num_folders, 2))


def _is_inside(joined: bytes) -> bool:
    """Whether each of these paths stays below the folder and has no hidden part."""
    text = np.frombuffer(b"\0" + joined + b"\0", np.uint8)
    first = text[1:][(text[:-1] == 0) | (text[:-1] == ord(_SEP))]  # first byte of each part
    return not any((first == byte).any() for byte in b"\0." + _SEP)


def _holds(root: str, known: _Walk) -> bool:
    """Whether every folder and the sizes of the sampled files are unchanged."""
    names, sizes, folders, _ = known.listing
    try:
        now = [_times(os.path.join(root, folder)) for folder in folders]
    except (OSError, ValueError):
        return False
    if not np.array_equal(np.array(now), known.times):
        return False
    drawn = hashlib.shake_256(b"sample").digest(8 * NUM_SAMPLED)
    for row in np.unique(np.frombuffer(drawn, "<u8") % len(sizes)).tolist():
        size = -1
        with suppress(OSError, ValueError):
            status = os.stat(os.path.join(root, names[row]))
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
        if size != sizes[row]:
            return False
    return True

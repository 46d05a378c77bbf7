"""Lists the image files below a folder with their sizes, and caches the listing of large folders.

A listing of more than `MIN_CACHED` files is saved as one file in the cache folder: $CLSA_CACHE, or
else $XDG_CACHE_HOME/clsa, or else ~/.cache/clsa (CLSA_CACHE=off: no cache). The cached listing is
used as long as the times of every folder are unchanged, to the nanosecond, and a fixed sample of
1,000 files has unchanged sizes. Overwriting a file outside the sample in place is not noticed,
because it does not change the times of its folder. If anything is wrong with the cache, the folder
is listed again.
"""

import hashlib
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from clsa.pictures.names import Names
from clsa.system import files
from clsa.system.errors import ClsaError, Exit

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".avif", ".jp2"),
)
SYSTEM_FOLDERS = frozenset(  # thumbnails, waste and remains that file systems and servers keep
    b"@eadir #recycle #snapshot $recycle.bin __macosx lost+found".split()
)
MIN_CACHED = 20_000
RACY_NS = 2_000_000_000  # two changes within one tick of a file system's clock look like one
NUM_SAMPLED = 1000

_SUFFIXES = tuple(suffix.encode() for suffix in SUFFIXES)
_SEP = os.fsencode(os.sep)
_FORMAT = b"clsa listing 2\n"


class LeftOut(NamedTuple):
    """What a walk over a folder met and did not take as pictures, and the links that it followed.

    Names are relative paths, for people to read.
    """

    endings: dict[str, int]
    """Files by ending, in lower case; an empty string for files without one."""
    hidden: int
    """Files and folders whose names begin with a point."""
    system: list[str]
    """Folders that a file system or a server keeps for itself."""
    followed: list[str]
    """Links to folders, whose pictures are taken."""
    passed: list[str]
    """Links to folders that are listed anyway, or that contain the folder of the link."""


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
    left: LeftOut = LeftOut({}, 0, [], [], [])


class _Walk(NamedTuple):
    """A listing with the times that show whether it is still valid."""

    listing: Listing
    times: Int64[np.ndarray, "F 2"]
    """Modification and status change time of each folder (st_mtime_ns, st_ctime_ns)."""


def list_images(root: str) -> Listing:
    """The image files below `root`, from the cache if it is still valid.

    A link to a folder is followed once: not if its target lies in `root`, holds it, or has been
    reached by another link. Hidden names, system folders and everything that is not a regular file
    are left out and counted.

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
    seen = _Seen(os.path.realpath(root))

    def enter(folder: bytes) -> None:
        path = os.path.join(root, folder)
        try:
            times.append(_times(path))  # before listing: changes during it must show
            pending.append((len(folders), iter(_entries(path, folder and folder + _SEP, seen))))
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
    listing = Listing(Names(b"\0".join(names)), *numbers, seen.left_out())
    return _Walk(listing, np.array(times, np.int64))


class _Seen:
    """What a walk has met beside pictures, and where its links have led."""

    def __init__(self, root: bytes):
        self.roots = [root]
        self.endings: Counter[bytes] = Counter()
        self.hidden = 0
        self.system: list[bytes] = []
        self.followed: list[bytes] = []
        self.passed: list[bytes] = []

    def follows(self, path: bytes, name: bytes) -> bool:
        """Whether to enter the linked folder `name`, which stands at `path`."""
        target = os.path.realpath(path)
        known = any(_holds_path(root, target) or _holds_path(target, root) for root in self.roots)
        (self.passed if known else self.followed).append(name)
        if not known:
            self.roots.append(target)
        return not known

    def left_out(self) -> LeftOut:
        """All of it, as text."""
        lists = [[*map(os.fsdecode, some)] for some in (self.system, self.followed, self.passed)]
        order = sorted(self.endings.items(), key=lambda pair: (-pair[1], pair[0]))
        endings = {os.fsdecode(ending): count for ending, count in order}
        return LeftOut(endings, self.hidden, *lists)


def _holds_path(folder: bytes, path: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(_SEP) + _SEP)


def _entries(path: bytes, prefix: bytes, seen: _Seen) -> list[tuple[bytes, int | None]]:
    """Image files (path, size) and folders (path, None) directly in a folder, in byte order."""
    found, links = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(b"."):
                seen.hidden += 1
            elif entry.is_dir(follow_symlinks=False):
                if name.lower() in SYSTEM_FOLDERS:
                    seen.system.append(prefix + name)
                else:
                    found.append((prefix + name, None))
            elif name.lower().endswith(_SUFFIXES) and (size := _size(entry)) is not None:
                found.append((prefix + name, size))
            elif _is_folder(entry):
                links.append(name)
            else:
                seen.endings[os.path.splitext(name)[1].lower()] += 1
    for name in sorted(links):
        if name.lower() not in SYSTEM_FOLDERS and seen.follows(path + _SEP + name, prefix + name):
            found.append((prefix + name, None))
    found.sort()
    return found


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether a link leads to a folder."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


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
    """Format, SHA-256 of the rest; F, N, two lengths; folders; what was left out; numbers; names.

    The numbers are times, sizes and owners.
    """
    names, sizes, folders, owners, left = walk.listing
    texts = [os.fsencode("\0".join(folders)), json.dumps(left).encode()]
    counts = np.array([len(folders), len(sizes), *map(len, texts)])
    numbers = np.concatenate([counts, walk.times.ravel(), sizes, owners]).astype("<i8")
    body = numbers.tobytes() + b"".join(texts) + names.joined
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
    if content[:head] != _FORMAT + hashlib.sha256(body).digest() or len(body) < 4 * 8:
        return None
    num_folders, count, text, notes = np.frombuffer(body, "<i8", 4).tolist()
    end = 8 * (4 + 2 * num_folders + 2 * count)
    if num_folders < 1 or count < 1 or min(text, notes) < 0 or end + text + notes > len(body):
        return None
    numbers = np.frombuffer(body[32:end], "<i8").astype(np.int64)
    times, sizes, owners = np.split(numbers, [2 * num_folders, 2 * num_folders + count])
    folders = os.fsdecode(bytes(body[end : end + text])).split("\0")
    joined = bytes(body[end + text + notes :])
    names = Names(joined)
    fits = len(folders) == num_folders and folders[0] == "" and len(names) == count
    known = owners.min() >= 0 and owners.max() < num_folders
    below = os.fsencode("\0".join(folders[1:]))
    if not (fits and known and _is_inside(joined) and (_is_inside(below) or num_folders == 1)):
        return None
    try:
        left = LeftOut(*json.loads(bytes(body[end + text : end + text + notes])))
    except (ValueError, TypeError):
        return None
    return _Walk(Listing(names, sizes, folders, owners, left), times.reshape(num_folders, 2))


def _is_inside(joined: bytes) -> bool:
    """Whether each of these paths stays below the folder and has no hidden part."""
    text = np.frombuffer(b"\0" + joined + b"\0", np.uint8)
    first = text[1:][(text[:-1] == 0) | (text[:-1] == ord(_SEP))]  # first byte of each part
    return not any((first == byte).any() for byte in b"\0." + _SEP)


def _holds(root: str, known: _Walk) -> bool:
    """Whether every folder and the sizes of the sampled files are unchanged."""
    names, sizes, folders, *_ = known.listing
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

"""Writing files so that no reader ever sees a half-written one."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from clsa.system.errors import ClsaError, Exit

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
ASSETS = Path(__file__).parents[1] / "assets"
"""Files that come with the package."""
LEFTOVER = re.compile(r"\..+\.tmp-(\d+)")


class _Hashing:
    """Write-only file object that computes the sha256 and the length of the data written."""

    def __init__(self, file: IO[bytes]):
        self._file, self._hash, self.size = file, hashlib.sha256(), 0
        self.refusal: OSError | None = None

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += memoryview(data).nbytes
        try:
            return self._file.write(data)
        except OSError as error:
            self.refusal = error
            raise

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> tuple[str, int]:
    """Have `write` fill a temporary file next to `path`, flush it to disk, rename it to `path`.

    Returns:
        sha256 and length in bytes of what was written.

    Raises:
        ClsaError: 73 when the folder cannot be written, 74 when the disk is full or fails. No
            temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with output_errors(path):
        temporary.unlink(missing_ok=True)  # left by a killed process that had our pid
        try:
            with open(temporary, "xb") as file:
                hashing = _Hashing(file)
                try:
                    write(hashing)  # pyright: ignore[reportArgumentType]
                except RuntimeError as error:
                    # torch.save hides a disk error, Ctrl-C or the death of a worker in one.
                    hidden = error.__context__
                    stopped = hidden if isinstance(hidden, (KeyboardInterrupt, ClsaError)) else None
                    raise stopped or hashing.refusal or error from None
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return hashing.sha256, hashing.size


def write_text(path: Path, text: str) -> None:
    """`write_atomic` for a text in UTF-8; undecodable bytes of file names are preserved."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error in writing `path` into a `ClsaError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in FULL
        step = "free some space and run again" if full else "choose another --out"
        code = Exit.IO if full else Exit.CANNOT_WRITE
        why = error.strerror or "I/O error"
        raise ClsaError(f"cannot write {path}", why, step, code) from error


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, and flush them so that they survive a crash.

    Raises:
        ClsaError: 73 or 74, as `write_atomic`.
    """
    with output_errors(path):
        if not path.is_dir():
            make_folder(path.parent)
            path.mkdir(exist_ok=True)
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush `folder`, so that renames inside it survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_alive(pid: int) -> bool:
    """Whether a process with this pid runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def is_leftover(path: Path) -> bool:
    """Whether `path` is a temporary file of `write_atomic` that no other living process writes."""
    match = LEFTOVER.fullmatch(path.name)
    return bool(match) and (int(match[1]) == os.getpid() or not is_alive(int(match[1])))


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed processes in `folder`; call this before writing there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(path):
            with suppress(OSError):
                path.unlink()


def describe_room(folder: Path, num_bytes: int, refusal: OSError) -> str:
    """Why `folder` refused a file of `num_bytes`; for a full disk, the room free and needed."""
    free = shutil.disk_usage(folder).free
    if refusal.errno in FULL and free < num_bytes:
        return f"{free / 1e6:.1f} MB free, {num_bytes / 1e6:.1f} MB needed"
    return f"{refusal.strerror or 'I/O error'} ({num_bytes / 1e6:.1f} MB needed)"


def require_room(folder: Path, num_bytes: int) -> None:
    """Check that a file of `num_bytes` fits in `folder`, by reserving the room and freeing it.

    Raises:
        ClsaError: 73 when it does not fit.
    """
    probe = folder / f".room.tmp-{os.getpid()}"
    try:
        try:
            with open(probe, "xb") as file:
                _reserve(file.fileno(), num_bytes)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        why, step = (
            describe_room(folder, num_bytes, error),
            "free some space or choose another --out",
        )
        raise ClsaError(f"cannot write {folder}", why, step, Exit.CANNOT_WRITE) from error


def _reserve(handle: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(handle, 0, num_bytes)
    except AttributeError:  # macOS has no posix_fallocate
        pass
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not supported by the file system
            raise

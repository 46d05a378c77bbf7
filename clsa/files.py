"""Writing files so that no reader ever sees half of one."""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from clsa.errors import ClsaError, Exit

LOCK_WAIT_S = 15.0  # workers of a killed process hold its lock until they notice


class _Hashing:
    """Write-only file object that keeps the sha256 and the length of what went through."""

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
    """Have `write` fill a temporary file beside `path`, flush it to the disk, rename it to `path`.

    Returns:
        sha256 and length in bytes of what was written.

    Raises:
        ClsaError: 73 when the folder refuses, 74 when the disk does; no temporary file stays.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with output_errors(path):
        temporary.unlink(missing_ok=True)  # of a killed process that had our number
        try:
            with open(temporary, "xb") as file:
                hashing = _Hashing(file)
                try:
                    write(hashing)  # pyright: ignore[reportArgumentType]
                except RuntimeError as error:  # torch.save hides the disk's refusal behind one
                    raise hashing.refusal or error from None
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return hashing.sha256, hashing.size


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of a text in UTF-8; undecodable bytes of file names survive."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into a `ClsaError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        step = "free some space and run again" if full else "choose another --out"
        code = Exit.IO if full else Exit.CANNOT_WRITE
        why = error.strerror or "I/O error"
        raise ClsaError(f"cannot write {path}", why, step, code) from error


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if it is missing, against other processes that ask for it so.

    Raises:
        ClsaError: 2 when another process holds it, 73 when it cannot be made.
    """
    import fcntl  # not everywhere

    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        give_up = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    why = "another process is writing it"
                    step = "wait for its end, or choose another --out"
                    raise ClsaError(str(folder), why, step) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

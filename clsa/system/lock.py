"""One writer per folder: a locked file in the folder names the writing process and its start."""

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from clsa.system import files
from clsa.system.errors import ClsaError

NAME = ".in-use"
WAIT_S = 15.0  # workers of a killed process hold its lock until they notice
SETTLE_S = 0.2  # without locks: a process that took over at the same moment writes its name too


class Holder(NamedTuple):
    """The process that writes a folder."""

    pid: int
    host: str
    since: str
    """Hour and minute."""

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host} since {self.since}"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if it is missing, so that no other process can hold it meanwhile.

    The lock of a killed process is taken over, and a line says so. Folders that were made here and
    stayed empty are removed at the end.

    Raises:
        ClsaError: 2 when another process holds the folder, 73 when it cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    files.make_folder(folder)
    path = folder / NAME
    with files.output_errors(path):
        handle, before = _take(path)
    if before is not None:
        print(f"note: {folder} is taken over from {before}, which has ended", file=sys.stderr)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock is released: afterwards another process may own it
        os.close(handle)
        with suppress(OSError):
            for path in made:  # succeeds only if they are empty
                path.rmdir()


def _take(path: Path) -> tuple[int, Holder | None]:
    """The locked file, open, and the holder of the stale lock in it, if there was one."""
    import fcntl  # does not exist on every system

    give_up = time.monotonic() + WAIT_S
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(handle)
            os.close(handle)
            if (holder and _is_alive(holder)) or time.monotonic() > give_up:
                raise _refusal(path, holder) from None
            time.sleep(0.05)
            continue
        except OSError:  # a file system without locks
            os.close(handle)
            return _take_unlocked(path)
        if _is_same(handle, path):
            before = _read(handle)
            _sign(handle)
            return handle, before
        os.close(handle)  # its holder removed it and ended just before we locked it


def _take_unlocked(path: Path) -> tuple[int, Holder | None]:
    """As `_take`, on a file system where only creating a file is certain to be exclusive."""
    before, waited = None, False
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            with suppress(FileNotFoundError):
                before = _parsed(path.read_bytes()) or before
                if before is None and not waited:  # its creator may be about to sign it
                    waited = True
                    time.sleep(SETTLE_S)
                    continue
                if before and _is_alive(before) and before.pid != os.getpid():
                    raise _refusal(path, before) from None
                path.unlink()
            continue
        _sign(handle)
        time.sleep(SETTLE_S)
        if _is_same(handle, path):
            return handle, before
        os.close(handle)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    os.ftruncate(handle, 0)
    text = f"{os.getpid()} {socket.gethostname()} {time.strftime('%H:%M')}\n"
    os.pwrite(handle, text.encode(), 0)


def _read(handle: int) -> Holder | None:
    return _parsed(os.pread(handle, 1000, 0))


def _parsed(text: bytes) -> Holder | None:
    match = re.fullmatch(rb"(\d+) (\S+) (\d\d:\d\d)\n", text)
    return (
        Holder(int(match[1]), match[2].decode(errors="replace"), match[3].decode())
        if match
        else None
    )


def _is_alive(holder: Holder) -> bool:
    return holder.host != socket.gethostname() or files.is_alive(holder.pid)


def _refusal(path: Path, holder: Holder | None) -> ClsaError:
    what = f"{path.parent} in use by {holder or 'another process'}"
    hint = "wait for it, or choose another --out"
    if holder and holder.host != socket.gethostname():
        hint += f"; if that process has ended, remove {path}"
    return ClsaError(what, "only one process may write it at a time", hint)

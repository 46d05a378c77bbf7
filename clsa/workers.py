"""Processes that decode: how many there are, what they listen to, and how their ends are told."""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from clsa.errors import ClsaError, Exit
from clsa.host import num_cores

MAX_WORKERS = 8
TIMEOUT_S = 300

_failed = threading.Event()


def num_workers(given: int | None) -> int:
    """Workers of this process: `given`, or else its share of the cores less one, from 1 to 8."""
    if given is not None:
        return given
    share = num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(share - 1, 1), MAX_WORKERS)


def start(_: int) -> None:
    """One thread, and deaf to the signals of the process group: only the parent ends a worker."""
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def results(
    dataset: Dataset, numbers: range, count: int, prefetch: int, pinned: bool = False
) -> Iterator[Any]:
    """`dataset[number]` for each of `numbers`, in order, computed by `count` processes (0: here).

    Args:
        dataset: its `__getitem__` should hold a `deadline`.
        numbers: what to ask for.
        count: of processes.
        prefetch: results that each process is ahead.
        pinned: hand tensors over in memory that a GPU copies from while the host goes on.

    Raises:
        ClsaError: 74 when a worker fails.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=count,
        prefetch_factor=prefetch if count else None,
        timeout=2 * TIMEOUT_S if count else 0,  # after the worker's own deadline
        collate_fn=_as_it_is,
        worker_init_fn=start,
        pin_memory=pinned,
        multiprocessing_context="fork" if count and sys.platform == "linux" else None,
        generator=torch.Generator(),  # its own, so that the caller's draws stay as they are
    )
    with failures():
        stream = iter(loader)
        if count:
            name_deaths()
        yield from stream


def _as_it_is(item: Any) -> Any:
    return item


@contextmanager
def deadline() -> Iterator[None]:
    """In a worker: die of SIGALRM when the inside takes over `TIMEOUT_S`.

    A worker that hangs is deaf to the parent's SIGTERM too, and the parent would wait for it.
    """
    if get_worker_info() is None or not hasattr(signal, "alarm"):
        yield
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(TIMEOUT_S)
    try:
        yield
    finally:
        signal.alarm(0)


@contextmanager
def failures() -> Iterator[None]:
    """Turn what DataLoader and the operating system say of workers into a `ClsaError` (74)."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        lines = str(error).strip().split("\n")
        if isinstance(error, RuntimeError) and not lines[0].startswith("DataLoader"):
            raise
        if isinstance(error.__cause__, ClsaError):  # DataLoader met our `_on_death` as it waited
            raise error.__cause__ from None
        _failed.set()
        last = lines[-1].rstrip(". ")  # of a worker's traceback, or all there is
        why = last or type(error).__name__
        step = "lower --workers or --batch-size (memory may be short) and run again"
        raise ClsaError("reading pictures failed", why, step, Exit.IO) from error


def name_deaths() -> None:
    """Have the death of a worker raise as in `failures`, whatever the parent is doing then.

    To be called when workers run: DataLoader's handler of SIGCHLD, wrapped here, raises a
    RuntimeError in the midst of a training step. Only the first failure raises: the next would
    disturb whoever reports it.
    """
    _failed.clear()
    told = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and callable(told) and getattr(told, "func", None) is not _on_death:
        signal.signal(signal.SIGCHLD, functools.partial(_on_death, told))


def _on_death(told: Callable[..., object], number: int, frame: object) -> None:
    if _failed.is_set():
        return
    with failures():
        told(number, frame)


def require_shared_memory(needed: int) -> None:
    """Refuse at once what would end in a bus error: workers hand batches over in /dev/shm.

    Args:
        needed: bytes.
    """
    if not os.path.isdir("/dev/shm"):
        return
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    if needed > free:
        what = f"/dev/shm has {free >> 20} MB, the workers need {needed >> 20} MB"
        raise ClsaError(what, "batches pass through it", "enlarge it or set workers to 0")

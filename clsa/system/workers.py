"""Processes that decode: how many there are, what they listen to, and how their ends are told."""

import atexit
import ctypes
import functools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from clsa.system import dist, signals
from clsa.system.errors import ClsaError, Exit, first_line
from clsa.system.machine import num_cores

MAX_WORKERS = 8
TIMEOUT_S = 300
POLL_S = 1
FILES, FILES_A_WORKER = 8, 8  # what they took when tried, and a few more
KILL_S = 5
_PR_SET_PDEATHSIG = 1

_failed = threading.Event()
_line: Tensor | None = None  # in a worker: what it is at


def num_workers(given: int | None) -> int:
    """Workers of this process: `given`, or else its share of the cores less one, from 1 to 8."""
    if given is not None:
        return given
    share = num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(share - 1, 1), MAX_WORKERS)


class _Watched(Dataset):
    """`dataset`, with a board on which each worker notes what it is at.

    A line a worker: its process, the number it works for, the picture it reads (-1: none).
    """

    def __init__(self, dataset: Dataset, count: int):
        self.dataset = dataset
        self.board = torch.full((count, 3), -1, dtype=torch.int64).share_memory_()

    def __getitem__(self, number: int) -> Any:
        info = get_worker_info()
        assert info is not None
        global _line
        _line = self.board[info.id]
        _line[1] = number
        try:
            found = self.dataset[number]
        except Exception as error:
            doing = tuple(_line.tolist())  # it goes on to other batches before this is heard
            return _Raised(info.id, doing, first_line(error), traceback.format_exc())
        _line[1] = _line[2] = -1
        return found


class _Raised(NamedTuple):
    """What a worker hands over instead of a result."""

    worker: int
    doing: tuple[int, ...]
    error: str
    traceback: str


def at(picture: int) -> None:
    """In a worker: note that this picture is being read."""
    if _line is not None:
        _line[2] = picture


def start(board: Tensor, parent: int, worker: int) -> None:
    """One thread, deaf to the signals of the process group: only the parent ends a worker.

    On Linux it dies with the parent, whatever ended that one.
    """
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was too late to ask
            os._exit(1)
    board[worker, 0] = os.getpid()


def results(
    dataset: Dataset,
    numbers: range,
    count: int,
    prefetch: int,
    name: Callable[[int], str],
    pinned: bool = False,
) -> Iterator[Any]:
    """`dataset[number]` for each of `numbers`, in order, computed by `count` processes (0: here).

    It ends early when this process, alone, is asked to stop while it waits for one.

    Args:
        dataset: its `__getitem__` tells `at` which picture it reads.
        numbers: what to ask for.
        count: of processes.
        prefetch: results that each process is ahead.
        name: path of a picture, for messages.
        pinned: hand tensors over in memory that a GPU copies from while the host goes on.

    Raises:
        ClsaError: 74 when a worker fails or is silent for `TIMEOUT_S`.
    """
    if not count:
        yield from (dataset[number] for number in numbers)
        return
    watched, others = _Watched(dataset, count), set(multiprocessing.active_children())
    loader = DataLoader(
        watched,
        batch_size=None,
        sampler=numbers,
        num_workers=count,
        prefetch_factor=prefetch,
        timeout=POLL_S,
        collate_fn=_as_it_is,
        worker_init_fn=functools.partial(start, watched.board, os.getpid()),
        pin_memory=pinned,
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        generator=torch.Generator(),  # its own, so that the caller's draws stay as they are
    )
    crew: list[BaseProcess] = []
    report = functools.partial(_report, crew, watched.board, name)
    watch, end = _Watch(crew, report), functools.partial(_kill, crew)
    atexit.register(end)  # multiprocessing would wait for one that hangs, deaf to SIGTERM
    try:
        with failures(), signals.held_back():  # the workers inherit that
            stream = iter(loader)
        del loader
        crew += [each for each in multiprocessing.active_children() if each not in others]
        name_deaths(report)
        watch.start()
        for place in range(len(numbers)):
            with failures(report):
                found = _next(stream, place % count, watch)  # DataLoader takes turns
            if found is None:
                return
            yield found[0]
    except ClsaError:
        _kill(crew)
        raise
    finally:
        watch.done.set()
        if pinned:
            stream = None  # a thread may be reading what workers hold: they end by themselves
        _kill(crew)
        atexit.unregister(end)


class _Watch(threading.Thread):
    """Kills the workers when one is silent for too long, or the process is asked to stop.

    The parent may hang itself: it asks the worker for each tensor's memory, without a limit.
    """

    def __init__(self, crew: list[BaseProcess], report: "Report"):
        super().__init__(daemon=True)
        self.crew, self.report, self.done = crew, report, threading.Event()
        self.waiting: tuple[int, float] | None = None
        self.told: str | None = None
        """Set when it has killed them: who was silent; empty when the process shall stop."""

    def run(self) -> None:
        while not self.done.wait(POLL_S / 4):
            worker, since = self.waiting or (0, math.inf)
            if time.monotonic() - since > TIMEOUT_S:
                self.told = self.report(worker)
            elif self.waiting and signals.asked() and dist.world_size() == 1:
                self.told = ""
            if self.told is not None:
                _failed.set()
                for process in self.crew:
                    process.kill()
                return


def _next(stream: Iterator[Any], worker: int, watch: _Watch) -> tuple[Any] | None:
    """The next result, which `worker` owes; None when this process is asked to stop first."""
    watch.waiting = worker, time.monotonic()
    while True:
        try:
            found = next(stream)
            break
        except (RuntimeError, OSError, EOFError) as error:
            if watch.told:
                raise _error(watch.told, f"no answer in {TIMEOUT_S} s") from None
            if watch.told is not None:
                return None
            if not str(error).startswith("DataLoader timed out"):
                raise
    watch.waiting = None
    if isinstance(found, _Raised):
        cause = RuntimeError(found.traceback)
        raise _error(watch.report(found.worker, found.doing), found.error) from cause
    return (found,)


def _as_it_is(item: Any) -> Any:
    return item


def _kill(crew: list[BaseProcess]) -> None:
    """End workers that are not needed, those too that hang."""
    _failed.set()  # these deaths are none to tell of
    for process in crew:
        process.kill()
    for process in crew:
        process.join(KILL_S)
        if process.is_alive():  # in a call to the system that no signal ends: it dies after that
            multiprocessing.process._children.discard(process)  # pyright: ignore


Report = Callable[..., str]


def _report(
    crew: list[BaseProcess],
    board: Tensor,
    name: Callable[[int], str],
    worker: int | None = None,
    doing: tuple[int, ...] = (),
) -> str:
    """Which worker failed, how it ended, and what it was reading.

    Args:
        worker: its number where it is known; else the first that has ended.
        doing: its line of the board, if that is known better than the board knows it.
    """
    codes = {process.pid: process.exitcode for process in crew}
    for line, noted in enumerate(board.tolist()):
        pid, busy, picture = doing or noted
        code = codes.get(pid)
        if code is None if worker is None else line != worker:
            continue
        told = f"worker {line} (pid {pid})"
        if code is not None:
            told += f", killed by {signal.Signals(-code).name}" if code < 0 else f", exit {code}"
        if busy < 0:
            return f"{told}, between two batches"
        place = name(picture) if picture >= 0 else "no picture yet"
        return f"{told}, at {place}, batch {busy}"
    return ""


def _error(what: str, why: str) -> ClsaError:
    step = "run again; if it happens again, look at that picture, or lower --workers"
    return ClsaError(f"reading pictures failed: {what}", why, step, Exit.IO)


@contextmanager
def failures(report: Report = lambda: "") -> Iterator[None]:
    """Turn what DataLoader and the operating system say of workers into a `ClsaError` (74)."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        lines = str(error).strip().split("\n")
        few_files = lines[0].startswith("Too many open files")
        of_workers = few_files or lines[0].startswith("DataLoader")
        if isinstance(error, RuntimeError) and not of_workers:
            raise
        if isinstance(error.__cause__, ClsaError):  # DataLoader met our `_on_death` as it waited
            raise error.__cause__ from None
        _failed.set()
        last = lines[-1].rstrip(". ")  # of a worker's traceback, or all there is
        why = last or type(error).__name__
        told = report()
        what = f"reading pictures failed: {told}" if told else "reading pictures failed"
        step = "lower --workers or --batch-size (memory may be short) and run again"
        if few_files:
            why, step = "too many open files", "raise ulimit -n, or set --workers 0"
        raise ClsaError(what, why, step, Exit.IO) from error


def name_deaths(report: Report = lambda: "") -> None:
    """Have the death of a worker raise as in `failures`, whatever the parent is doing then.

    To be called when workers run: DataLoader's handler of SIGCHLD, wrapped here, raises a
    RuntimeError in the midst of a training step. Only the first failure raises: the next would
    disturb whoever reports it.
    """
    _failed.clear()
    told = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if isinstance(told, functools.partial) and told.func is _on_death:
        told = told.args[0]  # of an earlier loader
    if threading.current_thread() is threading.main_thread() and callable(told):
        signal.signal(signal.SIGCHLD, functools.partial(_on_death, told, report))


def _on_death(told: Callable[..., object], report: Report, number: int, frame: object) -> None:
    if _failed.is_set():
        return
    with failures(report):
        told(number, frame)


@functools.cache  # later the batches of this run lie there themselves
def require_shared_memory(needed: int) -> None:
    """Refuse at once what would end in a bus error: workers hand batches over in /dev/shm.

    Args:
        needed: bytes, for each of this machine's processes.

    Raises:
        ClsaError: 2 when it has less.
    """
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not os.path.isdir("/dev/shm"):
        return
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    if needed > free:
        what = f"/dev/shm has {free >> 20} MB, the workers need {needed >> 20} MB"
        raise ClsaError(what, "batches pass through it", "enlarge it or set workers to 0")


def require_files(count: int) -> None:
    """Refuse at once what would end amid a batch: workers talk and hand memory over by open files.

    Args:
        count: of workers.

    Raises:
        ClsaError: 2 when this process may not open as many more.
    """
    if not os.path.isdir("/proc/self/fd"):
        return
    import resource  # not on Windows

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free, needed = most - len(os.listdir("/proc/self/fd")), FILES + FILES_A_WORKER * count
    if needed > free:
        what = f"{most} files may be open, of which {free} are left"
        why = f"{count} workers need {needed}"
        raise ClsaError(what, why, "raise ulimit -n or set workers to 0")

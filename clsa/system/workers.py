"""Worker processes that decode pictures: their number, their signals, reports of failures."""

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
from clsa.system.machine import share_of_cores

MAX_WORKERS = 8
TIMEOUT_S = 300
POLL_S = 1
FILES, FILES_A_WORKER = 8, 8  # measured, plus a few
KILL_S = 5
_PR_SET_PDEATHSIG = 1

_failed = threading.Event()
_line: Tensor | None = None  # in a worker: its line of the board


def num_workers(given: int | None) -> int:
    """Workers of this process: `given`, else its share of the cores minus one, from 1 to 8."""
    if given is not None:
        return given
    return min(max(share_of_cores() - 1, 1), MAX_WORKERS)


class _Watched(Dataset):
    """`dataset`, with a shared board on which each worker notes what it is doing.

    One line per worker: its pid, the number that it computes, the picture it reads (-1: none).
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
            doing = tuple(_line.tolist())  # a copy: it starts other batches before this is read
            return _Raised(info.id, doing, first_line(error), traceback.format_exc())
        _line[1] = _line[2] = -1
        return found


class _Raised(NamedTuple):
    """What a worker returns instead of a result when it fails."""

    worker: int
    doing: tuple[int, ...]
    error: str
    traceback: str


def at(picture: int) -> None:
    """In a worker: note that this picture is being read."""
    if _line is not None:
        _line[2] = picture


def start(board: Tensor, parent: int, worker: int) -> None:
    """Set up a worker: one thread, signals of the process group ignored; only the parent ends it.

    On Linux the worker dies with the parent, however the parent ends.
    """
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent had ended before
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

    The results end early if a run with one process is asked to stop while it waits for a result.

    Args:
        dataset: its `__getitem__` calls `at` with the picture that it reads.
        numbers: the numbers to ask for.
        count: number of worker processes.
        prefetch: how many results each process computes in advance.
        name: gives the path of a picture, for messages.
        pinned: return tensors in pinned memory, which a GPU copies while the host continues.

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
    atexit.register(end)  # multiprocessing would wait for a hanging worker, which ignores SIGTERM
    try:
        with failures(), signals.held_back():  # the workers inherit the blocked signals
            stream = iter(loader)
        del loader
        crew += [each for each in multiprocessing.active_children() if each not in others]
        name_deaths(report)
        watch.start()
        for place in range(len(numbers)):
            with failures(report):
                found = _next(stream, place % count, watch)  # DataLoader asks the workers in turn
            if found is None:
                return
            yield found[0]
    except ClsaError:
        _kill(crew)
        raise
    finally:
        watch.done.set()
        if pinned:
            stream = None  # a thread may be reading their memory: let the workers end themselves
        _kill(crew)
        atexit.unregister(end)


class _Watch(threading.Thread):
    """Kills the workers when one is silent for too long, or the process is asked to stop.

    It is a thread because the parent itself may hang: it waits without a limit for the memory of
    each tensor of a worker.
    """

    def __init__(self, crew: list[BaseProcess], report: "Report"):
        super().__init__(daemon=True)
        self.crew, self.report, self.done = crew, report, threading.Event()
        self.waiting: tuple[int, float] | None = None
        self.told: str | None = None
        """Set once it has killed the workers: which was silent; empty if the process must stop."""

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
    """The next result, to come from `worker`; None if this process is asked to stop first."""
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
    """End workers that are no longer needed, even workers that hang."""
    _failed.set()  # do not report these deaths
    for process in crew:
        process.kill()
    for process in crew:
        process.join(KILL_S)
        if process.is_alive():  # in a system call that no signal interrupts: it dies after the call
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
        worker: number of the worker that failed; None for the first that has ended.
        doing: its line of the board when it failed; if empty, the line as it is now.
    """
    codes = {process.pid: process.exitcode for process in crew}
    for line, noted in enumerate(board.tolist()):
        pid, busy, picture = doing or noted
        code = codes.get(pid)
        if code is None if worker is None else line != worker:
            continue
        text = f"worker {line} (pid {pid})"
        if code is not None:
            text += f", killed by {signal.Signals(-code).name}" if code < 0 else f", exit {code}"
        if busy < 0:
            return f"{text}, between two batches"
        place = name(picture) if picture >= 0 else "no picture yet"
        return f"{text}, at {place}, batch {busy}"
    return ""


def _error(what: str, why: str) -> ClsaError:
    step = "run again; if it happens again, check that picture or lower --workers"
    return ClsaError(f"reading pictures failed: {what}", why, step, Exit.IO)


@contextmanager
def failures(report: Report = lambda: "") -> Iterator[None]:
    """Turn errors of DataLoader and of the system about workers into a `ClsaError` (74)."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        lines = str(error).strip().split("\n")
        few_files = lines[0].startswith("Too many open files")
        of_workers = few_files or lines[0].startswith("DataLoader")
        if isinstance(error, RuntimeError) and not of_workers:
            raise
        if isinstance(error.__cause__, ClsaError):  # from `_on_death`, while DataLoader waited
            raise error.__cause__ from None
        _failed.set()
        last = lines[-1].rstrip(". ")  # of a worker's traceback, or the only line
        why = last or type(error).__name__
        who = report()
        what = f"reading pictures failed: {who}" if who else "reading pictures failed"
        step = "lower --workers or --batch-size (memory may be short) and run again"
        if few_files:
            why, step = "too many open files", "raise ulimit -n, or set --workers 0"
        raise ClsaError(what, why, step, Exit.IO) from error


def name_deaths(report: Report = lambda: "") -> None:
    """Let the death of a worker raise as in `failures`, whatever the parent is doing then.

    Call this once the workers run: it wraps DataLoader's SIGCHLD handler, which raises a
    RuntimeError even during a training step. Only the first failure raises: a second one would
    disturb the report of the first.
    """
    _failed.clear()
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if isinstance(handler, functools.partial) and handler.func is _on_death:
        handler = handler.args[0]  # unwrap that of an earlier loader
    if threading.current_thread() is threading.main_thread() and callable(handler):
        signal.signal(signal.SIGCHLD, functools.partial(_on_death, handler, report))


def _on_death(handler: Callable[..., object], report: Report, number: int, frame: object) -> None:
    if _failed.is_set():
        return
    with failures(report):
        handler(number, frame)


@functools.cache  # later this run's own batches take room there
def require_shared_memory(needed: int) -> None:
    """Refuse a /dev/shm that is too small: workers pass batches through it and get a bus error.

    Args:
        needed: bytes that each process of this machine needs.

    Raises:
        ClsaError: 2 when less is free.
    """
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not os.path.isdir("/dev/shm"):
        return
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    if needed > free:
        what = f"/dev/shm has {free >> 20} MB, the workers need {needed >> 20} MB"
        raise ClsaError(what, "workers pass batches through it", "enlarge it or set workers to 0")


def require_files(count: int) -> None:
    """Refuse a limit on open files that is too low: workers use them to send messages and memory.

    Without this check the run would fail during a batch.

    Args:
        count: number of workers.

    Raises:
        ClsaError: 2 when this process may not open that many more files.
    """
    if not os.path.isdir("/proc/self/fd"):
        return
    import resource  # not on Windows

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free, needed = most - len(os.listdir("/proc/self/fd")), FILES + FILES_A_WORKER * count
    if needed > free:
        what = f"this process may open {most} files, {free} of them are left"
        why = f"{count} workers need {needed}"
        raise ClsaError(what, why, "raise ulimit -n or set workers to 0")

"""Being asked to stop: a signal or a deadline only raises a flag; the loop saves and leaves."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from clsa.system.errors import ClsaError, Exit

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REQUEUE = signal.SIGUSR1.name
"""In a SLURM job: be put back into the queue."""
SIGNALLED = 3
"""`Stop.level` from which on there is little time."""
ALARM = "an alarm"

_listening: list["Stop"] = []


class Asked(KeyboardInterrupt):
    """A signal came while the run waited; says which one."""

    def __init__(self, name: str):
        super().__init__(name)
        self.signal = name


class StopError(ClsaError):
    """How a run ends that was asked to stop: with exit code 75.

    Args:
        what, why, next_step: as of any error.
        signal: name of the signal; empty where it is not known.
    """

    def __init__(self, what: str, why: str, next_step: str, signal: str = ""):
        super().__init__(what, why, next_step, Exit.PREEMPTED)
        self.signal = signal


def signal_of(error: BaseException) -> str:
    """Name of the signal that had an error raised; empty without one."""
    return error.signal if isinstance(error, (Asked, StopError)) else ""


class Stop:
    """Whether the process was asked to stop, and by what.

    Args:
        max_minutes: time from now after which it is.
        patient: whether what is busy for long finishes first, as between the runs of a sweep.
    """

    signal_name = ""
    alarm = ""
    """Of this process's own watch, that ends the run."""

    def __init__(self, max_minutes: float | None = None, patient: bool = False):
        self.patient = patient
        self.deadline = time.monotonic() + 60 * (math.inf if max_minutes is None else max_minutes)

    def ask(self, number: int, _frame: object) -> None:
        """Signal handler: note the first one's name; a second interrupt leaves at once."""
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name

    @property
    def level(self) -> int:
        """0: go on; 1: past the deadline; 2: an alarm; 3: a signal; 4: `REQUEUE`.

        What the ranks agree on is the highest of all.
        """
        if self.signal_name:
            return SIGNALLED + (self.signal_name == REQUEUE)
        if self.alarm:
            return 2
        return int(time.monotonic() > self.deadline)

    def reason(self, level: int) -> str:
        """What `level`, the highest of all ranks, means here."""
        by_signal = self.signal_name or "a signal to another process"
        return ("", "max_minutes", self.alarm or ALARM, by_signal, REQUEUE)[level]


def asked() -> str:
    """Name of the signal that has come to whoever listens; empty without one."""
    return _listening[-1].signal_name if _listening else ""


def check() -> None:
    """Where a run may be busy for long and has nothing unsaved: leave if it was asked to.

    Raises:
        Asked: when a signal has come.
    """
    if asked() and not _listening[-1].patient:
        raise Asked(asked())


def _heard() -> list[int]:
    """Signals that nobody asked to be ignored, as nohup does."""
    return [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def held_back() -> Iterator[None]:
    """To processes that are started inside signals never come; to this thread when it is done."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _default(number: int) -> Callable[..., object] | signal.Handlers:
    return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL


def leave_at_once() -> None:
    """Until a run begins nothing can be lost: have a signal end the process with exit code 75.

    Not by an exception, which an import that is half done might swallow.
    """

    for number in _heard():
        signal.signal(number, _leave)


def _leave(number: int, _frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    line = f"error: stopped by {name} - nothing was to be saved - run it again\n"
    os.write(2, line.encode())
    os._exit(Exit.PREEMPTED)


@contextmanager
def stop_on_signals(max_minutes: float | None = None, patient: bool = False) -> Iterator[Stop]:
    """Catch TERM, INT, HUP and USR1 while inside; the old handlers come back afterwards.

    Those of `leave_at_once` do not: now there is something to lose. Inside another
    one, what came to either is told to both.
    """
    stop = Stop(max_minutes, patient)
    try:
        before = {number: signal.signal(number, stop.ask) for number in _heard()}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield stop
        return
    outer = _listening[-1] if _listening else Stop()
    stop.signal_name = stop.signal_name or outer.signal_name
    _listening.append(stop)
    try:
        yield stop
    finally:
        _listening.remove(stop)
        for number, handler in before.items():
            signal.signal(number, _default(number) if handler == _leave else handler)
        outer.signal_name = outer.signal_name or stop.signal_name

"""Stopping a run: a signal or a deadline only sets a flag; the loop then saves and exits."""

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
"""In a SLURM job, this signal asks that the job be queued again."""
SIGNALLED = 3
"""From this `Stop.level` on there is little time left."""
ALARM = "an alarm"

_listening: list["Stop"] = []


class Asked(KeyboardInterrupt):
    """Raised if a signal came while the run waited; names the signal."""

    def __init__(self, name: str):
        super().__init__(name)
        self.signal = name


class StopError(ClsaError):
    """The end of a run that was asked to stop; exit code 75.

    Args:
        what, why, next_step: as in `ClsaError`.
        signal: name of the signal; empty if it is unknown.
    """

    def __init__(self, what: str, why: str, next_step: str, signal: str = ""):
        super().__init__(what, why, next_step, Exit.PREEMPTED)
        self.signal = signal


def signal_of(error: BaseException) -> str:
    """Name of the signal that caused an error; empty if none did."""
    return error.signal if isinstance(error, (Asked, StopError)) else ""


class Stop:
    """Whether the process was asked to stop, and by what.

    Args:
        max_minutes: time from now after which the process is asked to stop.
        patient: whether `check` lets long work finish first, as between the runs of a sweep.
    """

    signal_name = ""
    alarm = ""
    """Name of the alarm for which this process's health watch ends the run; empty without one."""

    def __init__(self, max_minutes: float | None = None, patient: bool = False):
        self.patient = patient
        self.deadline = time.monotonic() + 60 * (math.inf if max_minutes is None else max_minutes)

    def ask(self, number: int, _frame: object) -> None:
        """Signal handler: note the name of the first signal; Ctrl-C after it exits at once."""
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name

    @property
    def level(self) -> int:
        """0: continue; 1: past the deadline; 2: an alarm; 3: a signal; 4: `REQUEUE`.

        The ranks agree on the highest level among them.
        """
        if self.signal_name:
            return SIGNALLED + (self.signal_name == REQUEUE)
        if self.alarm:
            return 2
        return int(time.monotonic() > self.deadline)

    def reason(self, level: int) -> str:
        """Why this process stops, in words, if `level` is the highest among the ranks."""
        by_signal = self.signal_name or "a signal to another process"
        return ("", "max_minutes", self.alarm or ALARM, by_signal, REQUEUE)[level]


def asked() -> str:
    """Name of the signal that the innermost `stop_on_signals` has received; empty without one."""
    return _listening[-1].signal_name if _listening else ""


def check() -> None:
    """Raise if a signal has come; for places where a run is busy for long with nothing unsaved.

    Raises:
        Asked: when a signal has come, unless the listener is patient.
    """
    if asked() and not _listening[-1].patient:
        raise Asked(asked())


def _not_ignored() -> list[int]:
    """Of `NUMBERS`, the signals that are not ignored; nohup, for one, ignores SIGHUP."""
    return [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def held_back() -> Iterator[None]:
    """Block signals: processes started inside never get them, this thread gets them at the end."""
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
    """Before a run begins, let a signal end the process at once with exit code 75.

    Nothing can be lost yet. An exception would not do: a half-done import might swallow it.
    """

    for number in _not_ignored():
        signal.signal(number, _leave)


def _leave(number: int, _frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    line = f"error: stopped by {name} - there was nothing to save - run it again\n"
    os.write(2, line.encode())
    os._exit(Exit.PREEMPTED)


@contextmanager
def stop_on_signals(max_minutes: float | None = None, patient: bool = False) -> Iterator[Stop]:
    """Catch TERM, INT, HUP and USR1 while inside; restore the old handlers afterwards.

    The handlers of `leave_at_once` give way to Python's defaults, because a run has begun and there
    is something to lose. If one call is inside another, both note a signal that came to either.
    """
    stop = Stop(max_minutes, patient)
    try:
        before = {number: signal.signal(number, stop.ask) for number in _not_ignored()}
    except ValueError:  # not the main thread: the main program handles signals
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

"""Being asked to stop: a signal or a deadline only raises a flag; the loop saves and leaves."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Whether the process was asked to stop, and by what.

    Args:
        max_minutes: time from now after which it is.
    """

    signal_name = ""

    def __init__(self, max_minutes: float | None = None):
        self.deadline = time.monotonic() + 60 * (math.inf if max_minutes is None else max_minutes)

    def ask(self, number: int, _frame: object) -> None:
        """Signal handler: note the name; a second interrupt leaves at once."""
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.signal_name) or time.monotonic() > self.deadline

    @property
    def reason(self) -> str:
        """Name of the signal, or max_minutes, or that another process was asked."""
        return self.signal_name or ("max_minutes" if self else "another process was stopped")


@contextmanager
def stop_on_signals(max_minutes: float | None = None) -> Iterator[Stop]:
    """Catch TERM, INT, HUP and USR1 while inside; the old handlers come back afterwards."""
    stop = Stop(max_minutes)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    try:
        before = {number: signal.signal(number, stop.ask) for number in numbers}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

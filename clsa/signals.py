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
    alarm = ""
    """Of this process's own watch, that ends the run."""

    def __init__(self, max_minutes: float | None = None):
        self.deadline = time.monotonic() + 60 * (math.inf if max_minutes is None else max_minutes)

    def ask(self, number: int, _frame: object) -> None:
        """Signal handler: note the name; a second interrupt leaves at once."""
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    @property
    def level(self) -> int:
        """0: go on; 1: past the deadline; 2: an alarm; 3: a signal; of all ranks the highest."""
        if self.signal_name:
            return 3
        if self.alarm:
            return 2
        return int(time.monotonic() > self.deadline)

    def reason(self, level: int) -> str:
        """What `level`, the highest of all ranks, means here."""
        other = "another process was stopped"
        return ("", "max_minutes", self.alarm or "an alarm", self.signal_name or other)[level]


@contextmanager
def stop_on_signals(max_minutes: float | None = None) -> Iterator[Stop]:
    """Catch TERM, INT, HUP and USR1 while inside; the old handlers come back afterwards.

    Inside another one, what came is passed on to it at the end.
    """
    stop = Stop(max_minutes)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    try:
        before = {number: signal.signal(number, stop.ask) for number in heard}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, Stop):  # a sweep around a run has heard it too
                outer.signal_name = outer.signal_name or stop.signal_name

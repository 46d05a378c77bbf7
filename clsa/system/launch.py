"""Start a long command: choose its device, join its processes, and let it be stopped."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clsa.system import dist, ranks, slurm
from clsa.system.machine import keep_freed_memory
from clsa.system.signals import REQUEUE, Asked, Stop, StopError, signal_of, stop_on_signals


@contextmanager
def launched(
    device: str, wait_minutes: float, max_minutes: float | None
) -> Iterator[tuple[torch.device, Stop]]:
    """Join the other processes of a run, if there are any, and listen for signals.

    Args:
        device: name of the device, as in `dist.pick_device`.
        wait_minutes: how long a process waits for another before it counts that one as lost.
        max_minutes: time after which the run is asked to stop; None for no limit.

    Raises:
        ClsaError: 2 for a device that does not exist, 74 when another process is lost.
        StopError, Asked: as in `stoppable`.
    """
    keep_freed_memory()
    chosen = dist.pick_device(device)
    with dist.process_group(chosen, 60 * wait_minutes), stoppable(max_minutes) as stop:
        yield chosen, stop


@contextmanager
def stoppable(max_minutes: float | None = None, patient: bool = False) -> Iterator[Stop]:
    """Listen for signals; if the signal was `REQUEUE`, ask SLURM at the end to requeue the job.

    Raises:
        StopError, Asked: with SLURM's answer added to the message.
    """
    with stop_on_signals(max_minutes, patient) as stop:
        try:
            with ranks.named(lambda: 0):  # a signal may come before the first step
                yield stop
        except (StopError, Asked) as error:
            if signal_of(error) != REQUEUE or not slurm.job() or dist.rank():
                raise
            error.args = (f"{error}; {slurm.requeue()}",)
            error.signal = ""  # ask only once, even if one `stoppable` is inside another
            raise

"""Run training from options to exit code: build, load the newest checkpoint, train, finish."""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clsa.options.run import RunOptions
from clsa.pictures.quarantine import Quarantine
from clsa.pictures.sources import Source
from clsa.runs.alarms import COLLAPSES
from clsa.runs.folder import FREE
from clsa.runs.saver import write_encoder
from clsa.runs.state import State
from clsa.system import dist, ranks, signals
from clsa.system.errors import RESUMABLE, ClsaError, Exit, code_of, memory_errors
from clsa.system.signals import REQUEUE, StopError
from clsa.training.fit import fit
from clsa.training.setup import Parts, Setting, assemble, set_out, take_up, training_pictures
from clsa.training.step import Run


def pretrain(options: RunOptions, free: Collection[str] = frozenset(FREE)) -> Path:
    """Start or resume the run that `options` describe; returns the run folder.

    Args:
        free: names of options that may differ when a run is resumed.

    Raises:
        ClsaError: for anything that the user can fix; 74 when another process is lost or memory
            runs out, 75 when a signal stopped a run that can be resumed, 76 when numbers stay bad.
        Asked: when a signal came before anything was written.
    """
    with set_out(options, training_pictures, free) as (source, setting):
        train(options, source, setting)
    return options.out


def train(
    options: RunOptions,
    source: Source,
    setting: Setting,
    begin: Callable[[State], None] = lambda _: None,
    num_exemplars: int = 0,
) -> State:
    """Train from the newest checkpoint, or from the start, to the end of the schedule or a limit.

    Args:
        begin: sets the state of a new run before its first step.
        num_exemplars: how many pictures at the end of `source` come from earlier stages.

    Returns:
        The state at the end.

    Raises:
        ClsaError: as `pretrain`.
    """
    parts = assemble(options, source, setting.device, setting.computing, num_exemplars)
    take_up(parts, options, setting, begin)
    run = Run(options, setting.device, parts.order.steps_per_epoch, setting.stop, setting.computing)
    with end_reported(parts.state, parts.quarantine):
        reason = fit(parts, run)
        finish(parts, run, reason)
    return parts.state


def finish(parts: Parts, run: Run, reason: str) -> None:
    """Write the encoder and say how the run ended.

    Args:
        reason: why it ended, as `fit` returns it.

    Raises:
        ClsaError: 76 when an alarm ended it.
        StopError: when a signal ended it.
    """
    state, quarantine = parts.state, parts.quarantine
    folder, stop = state.folder, run.stop
    what = f"stopped at step {state.step} of {run.num_steps}"
    if reason in COLLAPSES or reason == signals.ALARM:
        hint = "follow the alarm's advice (above and in metrics.jsonl) in a run with a new --out"
        raise ClsaError(what, f"alarm: {reason}", hint, Exit.UNHEALTHY)
    if dist.rank() == 0 and state.step:
        write_encoder(state, run.options, folder.encoder)
    if dist.rank() == 0 and quarantine.reasons:
        count = len(quarantine.reasons)
        note = f"{count} unreadable pictures were replaced: see quarantine.jsonl"
        print(note, file=sys.stderr)
    if reason not in ("finished", "max_steps", "max_minutes"):
        saved = "the state is saved" if state.step else "there was nothing to save"
        name = REQUEUE if reason == REQUEUE else stop.signal_name
        raise StopError(what, f"{reason}; {saved}", "the same command resumes it", name)
    if dist.rank() == 0:
        folder.write_status(Exit.OK, reason, state.step, state.step < run.num_steps)


@contextmanager
def end_reported(state: State, quarantine: Quarantine) -> Iterator[None]:
    """Write `status.json` and `quarantine.jsonl`, whatever happens inside."""
    folder = state.folder
    try:
        with ranks.named(lambda: state.step), memory_errors():
            yield
    except BaseException as error:
        if dist.rank() == 0:
            code, reason = code_of(error), str(error) or type(error).__name__
            with suppress(ClsaError):  # the disk may be what failed
                folder.write_status(code, reason, state.step, code in RESUMABLE)
        raise
    finally:
        if dist.rank() == 0 and quarantine.reasons:
            with suppress(ClsaError):
                folder.write_quarantine(quarantine.by_id())

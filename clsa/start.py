"""A run from its options to its exit code: what it is made of, how it begins and how it ends."""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from clsa import dist, peers, signals, slurm
from clsa.alarms import COLLAPSES
from clsa.change import Given
from clsa.errors import RESUMABLE, ClsaError, Exit, code_of, memory_told
from clsa.evaluate.split import without_held_out_labels
from clsa.few_labels import num_held, told_labels, with_few_labels
from clsa.folder import FREE, RunFolder
from clsa.host import keep_freed_memory
from clsa.intake import open_source, val_of
from clsa.methods import build_method
from clsa.methods.method import Extent
from clsa.names import Names
from clsa.optim import build_optimizer
from clsa.options import RunOptions
from clsa.order import Order, Quarantine
from clsa.saver import write_encoder
from clsa.signals import REQUEUE, Asked, Stop, StopError, signal_of, stop_on_signals
from clsa.sources import Source
from clsa.state import State
from clsa.train import Run, fit


class Parts(NamedTuple):
    """What a run is made of."""

    state: State
    shown: Source
    """The pictures with the labels that the method may see."""
    held: Names
    """Ids of the pictures whose labels it may not."""
    order: Order
    quarantine: Quarantine


def pretrain(options: RunOptions, free: Collection[str] = frozenset(FREE)) -> Path:
    """Run, or resume, what `options` describe; returns the run folder.

    Args:
        free: names of options in which a resumed run may differ.

    Raises:
        ClsaError: for anything the user can mend; 74 when another process or memory is lost, 75
            when a signal stopped a resumable run, 76 when bad numbers do not end.
        Asked: when a signal came before anything was written.
    """
    keep_freed_memory()
    device = dist.pick_device(options.device)
    with (
        dist.process_group(device, 60 * options.wait_minutes),
        stoppable(options.max_minutes) as stop,
    ):
        folder = RunFolder(options.out, free)
        folder.check(options)
        source = open_source(options.data.data, "train", options.data)
        with folder.held(options):
            train(options, source, device, stop)
    return options.out


@contextmanager
def stoppable(max_minutes: float | None = None, patient: bool = False) -> Iterator[Stop]:
    """Signals are heeded; after everything else SLURM queues the run again where one asked that.

    Raises:
        StopError, Asked: which then say what has come of that.
    """
    with stop_on_signals(max_minutes, patient) as stop:
        try:
            with peers.named(lambda: 0):  # one may be stopped before there is a step
                yield stop
        except (StopError, Asked) as error:
            if signal_of(error) != REQUEUE or not slurm.job() or dist.rank():
                raise
            error.args = (f"{error}; {slurm.requeue()}",)
            error.signal = ""  # once, also where this stands inside another
            raise


def train(
    options: RunOptions,
    source: Source,
    device: torch.device,
    stop: Stop,
    begin: Callable[[State], None] = lambda _: None,
    num_exemplars: int = 0,
) -> State:
    """Run, or resume, what `options` describe on the pictures of `source`; returns the end.

    Args:
        begin: changes the state that a run starts with, before its first step.
        num_exemplars: how many pictures, the last ones, are kept from earlier stages.

    Raises:
        ClsaError: as `pretrain`.
    """
    folder = RunFolder(options.out)
    signals.check()
    parts = assemble(options, source, device, num_exemplars)
    state, order, quarantine = parts.state, parts.order, parts.quarantine
    passed_over = state.resume()
    signals.check()
    if not state.step:
        begin(state)
    require_same_step(state.step, device)  # and every rank has checked before the first writes
    if dist.rank() == 0:
        for skipped in passed_over:
            print(f"note: {skipped}", file=sys.stderr)
        folder.require_room(state.num_bytes())
        longer = folder.claim(options, state.step)
        if longer:
            print(f"note: {longer}", file=sys.stderr)
        state.keep_pictures()
        folder.cut_metrics(state.step)
        tell_start(options, parts)
    run = Run(options, device, order.steps_per_epoch, stop)
    with report_end(folder, state, quarantine):
        reason = fit(state, source, parts.shown, order, quarantine, run)
        if reason in COLLAPSES or reason == signals.ALARM:
            what, why = f"stopped at step {state.step} of {run.num_steps}", f"alarm: {reason}"
            hint = "its words are above and in metrics.jsonl; in a new --out, change what they say"
            raise ClsaError(what, why, hint, Exit.UNHEALTHY)
        if dist.rank() == 0 and state.step:
            write_encoder(state, options, folder.encoder)
        if dist.rank() == 0 and quarantine.reasons:
            count = len(quarantine.reasons)
            told = f"{count} unreadable pictures were replaced: see quarantine.jsonl"
            print(told, file=sys.stderr)
        if reason not in ("finished", "max_steps", "max_minutes"):
            what = f"stopped at step {state.step} of {run.num_steps}"
            saved = "the state is saved" if state.step else "nothing was to be saved"
            name = REQUEUE if reason == REQUEUE else stop.signal_name
            raise StopError(what, f"{reason}; {saved}", "the same command resumes it", name)
        if dist.rank() == 0:
            folder.write_status(Exit.OK, reason, state.step, state.step < run.num_steps)
    return state


def assemble(
    options: RunOptions, source: Source, device: torch.device, num_exemplars: int = 0
) -> Parts:
    """Everything that a run needs, at step 0; nothing is read but pictures' names and labels."""
    folder = RunFolder(options.out)
    shown = source if val_of(options.data) else without_held_out_labels(source)
    held = source.ids.take((shown.labels != source.labels).nonzero()[0])
    if options.labels is not None:
        shown = with_few_labels(shown, options.labels, options.seed, held)
    order = Order(len(source), options.batch_size, options.seed)
    quarantine = Quarantine(source, folder.read_quarantine())
    steps = order.steps_per_epoch
    last = steps * options.epochs
    extent = Extent(len(source), len(source.classes), steps, last, shown.labels, num_exemplars)
    method = build_method(options, extent).to(device)
    optimizer = build_optimizer(method, options.optim, method.fixed_rate)
    told = source if options.labels is None else shown
    given = Given(told, steps, options.accept_data_change)
    state = State(method, optimizer, told.digest(), folder, given=given)
    return Parts(state, shown, held, order, quarantine)


def tell_start(options: RunOptions, parts: Parts) -> None:
    """What a user may not have meant, before the first step."""
    if options.labels is not None:
        held = num_held(options.labels, parts.held)
        print(told_labels(parts.shown, held), file=sys.stderr)
    queue_size = getattr(options.method, "queue_size", 0)  # not every method has one
    if queue_size > len(parts.shown):
        print(
            f"note: the queue ({queue_size}) is longer than the set ({len(parts.shown)}); "
            "try a smaller --method.queue-size",
            file=sys.stderr,
        )


def require_same_step(step: int, device: torch.device) -> None:
    """Raise on every rank unless all resume at the same step (a shared folder is needed)."""
    highest, lowest = dist.all_max(torch.tensor([step, -step], device=device)).tolist()
    if highest != -lowest:
        why = f"the processes found checkpoints of steps {-lowest} and {highest}"
        raise ClsaError("cannot resume", why, "give all machines the same --out", Exit.NO_INPUT)


@contextmanager
def report_end(folder: RunFolder, state: State, quarantine: Quarantine) -> Iterator[None]:
    """Leave `status.json` and `quarantine.jsonl` behind whatever happens."""
    try:
        with peers.named(lambda: state.step), memory_told():
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

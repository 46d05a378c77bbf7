"""All that comes before the first step: build the parts of a run, load its newest checkpoint."""

import shlex
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from clsa.evaluate.features.split import without_held_out_labels
from clsa.learning.optim import build_optimizer
from clsa.loading.few_labels import describe_labels, num_held, with_few_labels
from clsa.loading.order import Order
from clsa.methods import build_method
from clsa.methods.method import Extent
from clsa.options.run import RunOptions
from clsa.pictures.folders import tell
from clsa.pictures.names import Names
from clsa.pictures.opening import open_source, val_of
from clsa.pictures.quarantine import Quarantine
from clsa.pictures.sources import Source
from clsa.runs.computing import Computing, take
from clsa.runs.data_change import Given
from clsa.runs.folder import FREE, RunFolder
from clsa.runs.state import State
from clsa.system import dist, extras, signals
from clsa.system.errors import ClsaError, Exit
from clsa.system.launch import launched
from clsa.system.signals import Stop

Opened = TypeVar("Opened")


class Setting(NamedTuple):
    """Where and how a run computes, and what stops it."""

    device: torch.device
    stop: Stop
    computing: Computing


class Parts(NamedTuple):
    """The parts of a run."""

    source: Source
    """The pictures with all their labels, for the online probe."""
    shown: Source
    """The same pictures with only the labels that the method may learn from."""
    held: Names
    """Ids of the pictures whose labels the method may not see."""
    order: Order
    quarantine: Quarantine
    state: State


@contextmanager
def set_out(
    options: RunOptions,
    open_pictures: Callable[[RunOptions], Opened],
    free: Collection[str] = frozenset(FREE),
) -> Iterator[tuple[Opened, Setting]]:
    """Get what a run needs from outside: its pictures, where and how it computes, what stops it.

    The run's folder is held inside, so that no other run writes there. Nothing is written before
    options, folder and pictures have been checked: a mistake costs nothing.

    Args:
        open_pictures: opens what the run learns from.
        free: names of options that may differ when a run is resumed.

    Raises:
        ClsaError: for a folder that holds something else, or pictures that cannot be opened; as
            `launched`.
    """
    limits = (options.wait_minutes, options.max_minutes)
    with launched(options.device, *limits) as (device, stop):
        if options.tensorboard == "on":  # refused now, not after the folder has changed
            extras.require("tensorboard", "tensorboard", "TensorBoard files")
        folder = RunFolder(options.out, free)
        folder.check(options)
        opened = open_pictures(options)
        with folder.held(options):
            computing, note = take(options, device)
            computing.apply()
            if note and dist.rank() == 0:
                print(f"note: {note}", file=sys.stderr)
            yield opened, Setting(device, stop, computing)


def training_pictures(options: RunOptions) -> Source:
    """The pictures that `options` name for training."""
    return open_source(options.data.data, "train", options.data)


def assemble(
    options: RunOptions,
    source: Source,
    device: torch.device,
    computing: Computing,
    num_exemplars: int = 0,
) -> Parts:
    """Build everything that a run needs, at step 0.

    It reads only the names and labels of pictures, and tries again those pictures that an earlier
    start could not read.

    Args:
        computing: how the networks compute.
        num_exemplars: how many pictures at the end of `source` come from earlier stages.

    Raises:
        ClsaError: for options that do not fit the pictures or each other.
    """
    signals.check()
    folder = RunFolder(options.out)
    shown = source if val_of(options.data) else without_held_out_labels(source)
    held = source.ids.take((shown.labels != source.labels).nonzero()[0])
    if options.labels is not None:
        shown = with_few_labels(shown, options.labels, options.seed, held)
    order = Order(len(source), options.batch_size, options.seed)
    quarantine = Quarantine(source, folder.read_quarantine(), options.data.max_unreadable)
    steps = order.steps_per_epoch
    last = steps * options.epochs
    extent = Extent(len(source), len(source.classes), steps, last, shown.labels, num_exemplars)
    method = build_method(options, extent).to(device)
    computing.apply_to(method)
    optimizer = build_optimizer(method, options.optim, method.fixed_rate)
    learned = source if options.labels is None else shown
    given = Given(learned, steps, options.accept_data_change)
    state = State(method, optimizer, learned.digest(), folder, given=given)
    return Parts(source, shown, held, order, quarantine, state)


def take_up(
    parts: Parts, options: RunOptions, setting: Setting, begin: Callable[[State], None]
) -> None:
    """Load the newest checkpoint, if there is one, and prepare the folder for training.

    Raises:
        ClsaError: 2, 66 or 77 for a checkpoint that does not fit, 73 or 74 for a folder that
            cannot be written.
    """
    state, folder = parts.state, parts.state.folder
    notes = state.resume()
    signals.check()
    if not state.step:
        begin(state)
    require_same_step(
        state.step, setting.device
    )  # every rank has checked before the first one writes
    if dist.rank() == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        folder.require_room(state.num_bytes())
        longer = folder.claim(options, setting.computing, state.step)
        if longer:
            print(f"note: {longer}", file=sys.stderr)
        state.keep_pictures()
        folder.cut_metrics(state.step)
        tell_start(options, parts, setting.computing)


def require_same_step(step: int, device: torch.device) -> None:
    """Raise on every rank unless all ranks resume at the same step (they need a shared folder)."""
    highest, lowest = dist.all_max(torch.tensor([step, -step], device=device)).tolist()
    if highest != -lowest:
        why = f"the processes found checkpoints of steps {-lowest} and {highest}"
        raise ClsaError("cannot resume", why, "give all machines the same --out", Exit.NO_INPUT)


def tell_start(options: RunOptions, parts: Parts, computing: Computing) -> None:
    """Print, before the first step, what was taken, where it goes on, and what may not be meant."""
    tell(parts.source, "pictures")
    where = describe_resumed(options, parts.state.step, parts.order.steps_per_epoch)
    if where:
        print(where, file=sys.stderr)
    for note in computing.notes():
        print(f"note: {note} (docs/encoders.md)", file=sys.stderr)
    if options.labels is not None:
        held = num_held(options.labels, parts.held)
        print(describe_labels(parts.shown, held), file=sys.stderr)
    queue_size = getattr(options.method, "queue_size", 0)  # not every method has one
    if queue_size > len(parts.shown):
        print(
            f"note: the queue ({queue_size}) is longer than the set ({len(parts.shown)}); "
            "try a smaller --method.queue-size",
            file=sys.stderr,
        )


def describe_resumed(options: RunOptions, step: int, steps_per_epoch: int) -> str:
    """Where a run goes on, or that nothing is left to do; empty for a new run.

    Args:
        step: steps that the run has done.
    """
    last = options.epochs * steps_per_epoch
    if step >= last:
        how = f"clsa extend {shlex.quote(str(options.out))} --epochs N"
        more = "" if options.stages else f"; to train for longer: {how}"
        return (
            f"nothing was to be done: all {last:,} steps ({options.epochs} epochs) are done{more}"
        )
    if options.max_steps and step >= options.max_steps:
        return f"nothing was to be done: --max-steps {options.max_steps:,} is reached"
    epoch = step // steps_per_epoch + 1
    return f"resumed at step {step:,} of {last:,} (epoch {epoch})" if step else ""

"""The training loop: `fit` takes the steps, and saves, evaluates and reports between them."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from clsa.diagnose.neighbour_sheet import draw_neighbours
from clsa.evaluate.features.projections import Projections
from clsa.evaluate.results.records import append_records
from clsa.loading import loader
from clsa.loading.crops import Crops
from clsa.loading.order import Order
from clsa.pictures.quarantine import Quarantine
from clsa.pictures.sources import Source
from clsa.runs.alarms import COLLAPSES
from clsa.runs.journal import Journal
from clsa.runs.saver import Saver
from clsa.runs.state import State
from clsa.system import dist, files, ranks, signals
from clsa.system.signals import Asked
from clsa.training.bad_steps import require_some_good
from clsa.training.health import Health
from clsa.training.online_probe import OnlineProbe, divides
from clsa.training.setup import Parts
from clsa.training.step import Run, Stats, gradients, make_views, parallel, train_step
from clsa.views.contact_sheet import contact_sheet
from clsa.views.specs import ViewSpec

SHEET_ROWS = 6


def fit(parts: Parts, run: Run) -> str:
    """Train from the step of the state to the end of the schedule or the first limit.

    Returns:
        Why it ended: "finished", "max_steps", "max_minutes", or the name of an alarm or a signal.
    """
    options, state, source, quarantine = run.options, parts.state, parts.source, parts.quarantine
    method, folder = state.method, state.folder
    last = min(run.num_steps, options.max_steps or run.num_steps)
    run.stop.alarm = ""  # an earlier stage may have left one
    model = parallel(method, options)
    embed = Projections(source, options.views, run.device, folder.embeddings)
    speaks, marks = dist.rank() == 0, method.landmarks
    with Journal(
        folder, state.step, last, run.steps_per_epoch, marks, speaks, options.tensorboard
    ) as journal:
        probe = OnlineProbe(state, source, options, run.device, journal)
        health = Health(method, run.steps_per_epoch, run.warmup_steps, state.step, speaks)
        saver = Saver(state, options, journal)
        epoch, rest = divmod(state.step, run.steps_per_epoch)
        reason = end_reason(state.step, last, run)
        with suppress(Asked):  # a signal came while an epoch was prepared
            if not rest and not reason:
                prepare(state, run, epoch, embed, journal)
            waiting = time.monotonic()
            batches = feed(state, parts.shown, parts.order, last, quarantine, run)
            for crops in settled(batches, model, state, run):
                waited = time.monotonic() - waiting
                if state.step == 0 and speaks:
                    draw_views(source, crops, method.view_specs, run, folder.views)
                stats = train_step(model, state, crops, run)
                journal.count(options.batch_size, waited)
                react(stats, state, saver, health, journal, run)
                epoch, rest = divmod(state.step, run.steps_per_epoch)
                reason = end_reason(state.step, last, run) or run.stop.reason(stats.seen.stop)
                if reason or not rest:
                    quarantine.share(run.device)
                if not stats.bad and (reason or not rest or state.step % options.log_every == 0):
                    journal.log(state.step, {**stats.numbers(), **health.take_numbers()})
                if reason or not rest or saver.is_due():
                    # Clocks differ: when a save is due by time, the ranks do not all get here.
                    with ranks.first_alone(together=bool(reason or not rest)):
                        in_time = stats.seen.stop < signals.SIGNALLED
                        better = in_time and not rest and speaks and probe(epoch)
                        keep = not rest and divides(options.keep_every, epoch)
                        saver.save(keep, better, last=bool(reason))
                if reason:
                    break
                if not rest:
                    prepare(state, run, epoch, embed, journal)
                waiting = time.monotonic()
        if not reason:  # a signal came while an epoch was prepared or a batch was awaited
            reason = run.stop.reason(run.stop.level)
            if state.step > saver.intact:
                saver.save(keep=False, best=False, last=True)
        if speaks:
            append_records(folder.results, probe.records)
    return reason


def settled(batches: Iterator[Crops], model: nn.Module, state: State, run: Run) -> Iterator[Crops]:
    """Yield `batches`; with more than two processes, compute the first gradient once in advance.

    DistributedDataParallel reorders its buckets after its first backward. In a resumed run the
    first step would be summed in another order than in an uninterrupted run, whose buckets were
    reordered long before. So the first gradient is computed an extra time and thrown away.
    """
    for place, crops in enumerate(batches):
        if place == 0 and dist.world_size() > 2:
            batch = make_views(crops, state.method.view_specs, state.step, run)
            state.statistics.keep()
            gradients(model, batch, state.method, run)
            state.statistics.put_back()
            state.optimizer.zero_grad(set_to_none=True)
        yield crops


def react(
    stats: Stats, state: State, saver: Saver, health: Health, journal: Journal, run: Run
) -> None:
    """Keep and report a skipped step, and report alarms; both can end the run.

    Raises:
        ClsaError: 76 when too many steps in a row were bad.
    """
    if stats.bad:
        kept = saver.keep_bad(stats.bad)
        journal.skipped(state.step, state.skipped, stats.bad)
        require_some_good(state.step, state.bad_in_row, stats.bad, kept)
    for alarm in health.after(stats.seen.loss, stats.seen.grad_norm, stats.seen.is_bad):
        journal.alarm(state.step, alarm)
        if run.options.stop_on_collapse and alarm.name in COLLAPSES:
            run.stop.alarm = alarm.name


def prepare(state: State, run: Run, epoch: int, embed: Projections, journal: Journal) -> None:
    """Let the method prepare an epoch; the time for this is logged apart from the steps."""
    begun = time.monotonic()
    found = state.method.before_epoch(epoch, embed)
    if found:
        signals.check()
        journal.refreshed(state.step, {**found, "refresh_s": round(time.monotonic() - begun, 3)})
        embed.clear()
        with ranks.first_alone():
            if dist.rank() == 0:
                path, companions = state.folder.neighbours, state.method.companions()
                draw_neighbours(embed.source, companions, run.options, epoch, path)
    journal.restart_clock()


def feed(
    state: State, shown: Source, order: Order, last: int, quarantine: Quarantine, run: Run
) -> Iterator[Crops]:
    """The batches from `state.step` on; loading restarts when the method's companions change.

    The loop prepares an epoch before it takes the epoch's first batch. A process that runs alone
    gets no more batches after a signal; several processes agree on the end inside a step.
    """
    method, per_epoch, step = state.method, run.steps_per_epoch, state.step
    while step < last:
        epochs = range(step // per_epoch + 1, -(-last // per_epoch))
        fresh = next((epoch for epoch in epochs if method.refreshes(epoch)), None)
        until = last if fresh is None else fresh * per_epoch
        for crops in loader.batches(
            shown, method.view_specs, order, step, until, run.device, run.options.data,
            quarantine, method.companions(),
        ):  # fmt: skip
            if signals.asked() and dist.world_size() == 1:
                return
            yield crops
        if state.step < until:  # a signal came while waiting
            return
        step = until


def end_reason(step: int, last: int, run: Run) -> str:
    """Why the run ends after `step` steps, or an empty string."""
    if step >= run.num_steps:
        return "finished"
    return "max_steps" if step >= last else ""


def draw_views(source: Source, crops: Crops, specs: list[ViewSpec], run: Run, path: Path) -> None:
    """Write the contact sheet: pictures of the first batch with all their views."""
    top = Crops([crop[:SHEET_ROWS] for crop in crops.crops], *(x[:SHEET_ROWS] for x in crops[1:]))
    plain = run._replace(options=run.options.model_copy(update={"compile": False}))
    drawn = make_views(top, specs, 0, plain).views
    size, cpu = run.options.views.size, torch.device("cpu")
    rows = []
    for numbers, originals in loader.eval_images(source, top.index.numpy(), size, 1.0, cpu):
        for number, original in zip(numbers, originals.round().byte(), strict=True):
            row = int((top.index == number).nonzero()[0])
            rows.append([original, *(view[row] for view in drawn)])
    image = contact_sheet(rows, ["original", *(spec.name for spec in specs)])
    files.write_atomic(path, lambda file: image.save(file, format="PNG"))

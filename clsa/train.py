"""The run: `train_step` is one step, `fit` the loop around it. Read this first."""

import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clsa import data, dist, files, peers, signals, views
from clsa.alarms import COLLAPSES
from clsa.bad_steps import require_some_good, told_badness
from clsa.cutting import Crops
from clsa.evaluate.on_disk import Projections
from clsa.evaluate.results import append_records
from clsa.health import Health
from clsa.host import upload
from clsa.journal import Journal
from clsa.judge import Judge, divides
from clsa.methods.method import Batch, Method, Output, sum_of
from clsa.models import Network, autocast
from clsa.optim import clip_gradients, lr_at, peak_lr, set_lr, weight_decay_at
from clsa.options import RunOptions
from clsa.order import Order, Quarantine
from clsa.preview import draw_neighbours
from clsa.saver import Saver
from clsa.signals import Asked, Stop
from clsa.sources import Source
from clsa.state import State

SHEET_ROWS = 6
MAX_GRAPHS = 64  # one for each size of view and one for the keys


class Run(NamedTuple):
    """What stays the same over a run."""

    options: RunOptions
    device: torch.device
    steps_per_epoch: int
    stop: Stop

    @property
    def num_steps(self) -> int:
        """Length of the whole schedule."""
        return self.steps_per_epoch * self.options.epochs

    @property
    def warmup_steps(self) -> float:
        """Steps in which the learning rate rises."""
        return self.steps_per_epoch * self.options.optim.warmup_epochs


class Seen(NamedTuple):
    """What the host reads of the device in a step, the highest of all ranks."""

    is_bad: bool
    """Whether a loss or a gradient is not finite."""
    stop: int
    """`Stop.level`."""
    loss: float
    grad_norm: float


class Stats(NamedTuple):
    """Of one step: what the host has seen, and detached tensors that it reads only when logged."""

    terms: dict[str, Tensor]
    lr: float
    seen: Seen
    bad: str = ""
    """What was not finite, where the step was skipped for it."""

    def numbers(self) -> dict[str, float]:
        """The values for the log."""
        return {**{name: float(value) for name, value in self.terms.items()}, "lr": self.lr}


def make_views(crops: Crops, specs: list[views.ViewSpec], step: int, run: Run) -> Batch:
    """Pixel operations of every view, on the device; draws from (seed, epoch, index, view)."""
    options, epoch = run.options, step // run.steps_per_epoch
    drawn, fused = crops.drawn.numpy(), options.compile and run.device.type == "cuda"
    pixels = [
        views.pixels(crop, views.sample(spec, options.seed, epoch, drawn), spec, fused=fused)
        for spec, crop in zip(specs, crops.crops, strict=True)
    ]
    places, labels = upload([crops.index.numpy(), crops.labels.numpy()], run.device)
    return Batch(pixels, places, labels, step)


def train_step(model: nn.Module, state: State, crops: Crops, run: Run) -> Stats:
    """One step: views, losses, gradients, optimiser, then key network and bank.

    Args:
        model: `state.method`, or the same inside DistributedDataParallel.
        state: method, optimiser and step; moved on by one.
        crops: this rank's rows of the batch.
        run: options and device.

    Where loss or gradient is not finite nothing but `state.step` moves, on any rank.
    """
    options, method, optimizer = run.options, state.method, state.optimizer
    batch = make_views(crops, method.view_specs, state.step, run)
    state.statistics.keep()
    output, loss, norm = gradients(model, batch, method, run)
    seen = agree(loss, norm, run.stop)
    lr, why_bad = 0.0, ""
    if seen.is_bad:
        state.statistics.put_back()
        why_bad = told_badness(method, loss.detach())
    else:
        lr = set_rates(optimizer, state.step, run)
        if options.optim.clip_norm:
            clip_gradients(method.parameters(), options.optim.clip_norm)
        optimizer.step()
        method.after_step(output.state, state.step)
    optimizer.zero_grad(set_to_none=True)
    state.done(seen.is_bad)
    terms = {"loss": loss, **output.losses, **output.metrics, "grad_norm": norm}
    return Stats({name: value.detach() for name, value in terms.items()}, lr, seen, why_bad)


def gradients(
    model: nn.Module, batch: Batch, method: Method, run: Run
) -> tuple[Output, Float[Tensor, ""], Float[Tensor, ""]]:
    """Output, loss and norm of the gradient, which lies at the parameters; moves statistics only.

    Args:
        model: `method`, or the same inside DistributedDataParallel.
    """
    with autocast(run.device, run.options.precision):
        output = model(batch)
        loss = sum_of(output.losses.values())
    loss.backward()
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in method.parameters() if p.grad is not None]
    )
    return output, loss, norm


def set_rates(optimizer: torch.optim.Optimizer, step: int, run: Run) -> float:
    """Learning rate (returned) and weight decay of this step."""
    options, batch_size = run.options.optim, run.options.batch_size
    lr = lr_at(options, step, run.steps_per_epoch, run.options.epochs, batch_size)
    decay = weight_decay_at(options, step, run.num_steps)
    set_lr(optimizer, lr, peak_lr(options, batch_size), decay)
    return lr


def agree(loss: Float[Tensor, ""], norm: Float[Tensor, ""], stop: Stop) -> Seen:
    """The one look of the host at the device in a step: is it good, and is it the last?"""
    numbers = torch.stack([loss.detach().float(), norm.float()])
    is_bad = (~numbers.isfinite()).any().float()
    flags = torch.stack([is_bad, torch.full_like(is_bad, stop.level)])
    any_bad, level, *highest = dist.all_max(torch.cat([flags, numbers.nan_to_num()])).tolist()
    return Seen(bool(any_bad), int(level), *highest)


def fit(
    state: State, source: Source, shown: Source, order: Order, quarantine: Quarantine, run: Run
) -> str:
    """Train from where `state` stands to the end of the schedule or the first limit.

    Args:
        source: the pictures; what the online probe judges on.
        shown: the same with the labels that the method may see.

    Returns:
        Why it ended: "finished", "max_steps", "max_minutes", or the name of an alarm or a signal.
    """
    options, method, folder = run.options, state.method, state.folder
    last = min(run.num_steps, options.max_steps or run.num_steps)
    run.stop.alarm = ""  # of a stage before
    model = parallel(method, options)
    embed = Projections(source, options.views, run.device, folder.embeddings)
    speaks, marks = dist.rank() == 0, method.landmarks
    with Journal(folder, state.step, last, run.steps_per_epoch, marks, speaks) as journal:
        judge = Judge(state, source, options, run.device, journal)
        health = Health(method, run.steps_per_epoch, run.warmup_steps, state.step, speaks)
        saver = Saver(state, options, journal)
        epoch, rest = divmod(state.step, run.steps_per_epoch)
        reason = end_reason(state.step, last, run)
        with suppress(Asked):  # in a preparation
            if not rest and not reason:
                prepare(state, run, epoch, embed, journal)
            waiting = time.monotonic()
            batches = feed(state, shown, order, last, quarantine, run)
            for crops in settled(batches, model, state, run):
                waited = time.monotonic() - waiting
                if state.step == 0 and speaks:
                    draw_views(source, crops, method.view_specs, run, folder.views)
                stats = train_step(model, state, crops, run)
                journal.count(options.batch_size, waited)
                heed(stats, state, saver, health, journal, run)
                epoch, rest = divmod(state.step, run.steps_per_epoch)
                reason = end_reason(state.step, last, run) or run.stop.reason(stats.seen.stop)
                if reason or not rest:
                    quarantine.share(run.device)
                if not stats.bad and (reason or not rest or state.step % options.log_every == 0):
                    journal.log(state.step, {**stats.numbers(), **health.numbers})
                if reason or not rest or saver.is_due():
                    with peers.first_alone(together=bool(reason or not rest)):  # clocks differ
                        in_time = stats.seen.stop < signals.SIGNALLED
                        better = in_time and not rest and speaks and judge(epoch)
                        keep = not rest and divides(options.keep_every, epoch)
                        saver.save(keep, better, last=bool(reason))
                if reason:
                    break
                if not rest:
                    prepare(state, run, epoch, embed, journal)
                waiting = time.monotonic()
        if not reason:  # asked to stop while it prepared or waited for a batch
            reason = run.stop.reason(run.stop.level)
            if state.step > saver.intact:
                saver.save(keep=False, best=False, last=True)
        if speaks:
            append_records(folder.results, judge.records)
    return reason


def settled(batches: Iterator[Crops], model: nn.Module, state: State, run: Run) -> Iterator[Crops]:
    """`batches`, of which the first is computed once for nothing where there are many processes.

    After its first backward DistributedDataParallel sorts its buckets anew. More than two processes
    would then sum in another order than the uninterrupted run, which has done so long ago.
    """
    for place, crops in enumerate(batches):
        if place == 0 and dist.world_size() > 2:
            batch = make_views(crops, state.method.view_specs, state.step, run)
            state.statistics.keep()
            gradients(model, batch, state.method, run)
            state.statistics.put_back()
            state.optimizer.zero_grad(set_to_none=True)
        yield crops


def heed(
    stats: Stats, state: State, saver: Saver, health: Health, journal: Journal, run: Run
) -> None:
    """What a skipped step or an alarm entails: it is kept and told, and may end the run.

    Raises:
        ClsaError: 76 when bad steps do not end.
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
    """What the method does before an epoch, its time told apart from the steps'."""
    begun = time.monotonic()
    found = state.method.before_epoch(epoch, embed)
    if found:
        signals.check()
        journal.refreshed(state.step, {**found, "refresh_s": round(time.monotonic() - begun, 3)})
        embed.clear()
        with peers.first_alone():
            if dist.rank() == 0:
                path, companions = state.folder.neighbours, state.method.companions()
                draw_neighbours(embed.source, companions, run.options, epoch, path)
    journal.restart_clock()


def feed(
    state: State, shown: Source, order: Order, last: int, quarantine: Quarantine, run: Run
) -> Iterator[Crops]:
    """The batches from `state.step` on; loading begins anew where the method's companions change.

    The method prepares an epoch before its first batch is asked for. One process alone that is
    asked to stop gets no more; several agree on that in a step.
    """
    method, per_epoch, step = state.method, run.steps_per_epoch, state.step
    while step < last:
        epochs = range(step // per_epoch + 1, -(-last // per_epoch))
        fresh = next((epoch for epoch in epochs if method.refreshes(epoch)), None)
        until = last if fresh is None else fresh * per_epoch
        for crops in data.batches(
            shown, method.view_specs, order, step, until, run.device, run.options.data,
            quarantine, method.companions(),
        ):  # fmt: skip
            if signals.asked() and dist.world_size() == 1:
                return
            yield crops
        if state.step < until:  # asked to stop while waiting
            return
        step = until


def end_reason(step: int, last: int, run: Run) -> str:
    """Why there is no step after `step`, or an empty string."""
    if step >= run.num_steps:
        return "finished"
    return "max_steps" if step >= last else ""


def parallel(method: Method, options: RunOptions) -> nn.Module:
    """`method`, compiled if asked for, inside DistributedDataParallel with several processes.

    Buffers are not broadcast: banks are equal on all ranks by construction, and batch norm's
    statistics are each rank's own, as in MoCo.
    """
    if options.compile:
        from torch._dynamo import config  # slow to import

        # Beyond its limit views run uncompiled and move statistics that compiled ones have saved.
        config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
        for module in method.modules():
            if isinstance(module, Network):
                module.encoder.compile(dynamic=False)  # a graph for each size of view
    if dist.world_size() == 1:
        return method
    with warnings.catch_warnings():  # the newer name of broadcast_buffers is too new for torch 2.10
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            method, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def draw_views(
    source: Source, crops: Crops, specs: list[views.ViewSpec], run: Run, path: Path
) -> None:
    """Write the contact sheet: originals of the first batch with all their views."""
    few = Crops([crop[:SHEET_ROWS] for crop in crops.crops], *(x[:SHEET_ROWS] for x in crops[1:]))
    plain = run._replace(options=run.options.model_copy(update={"compile": False}))
    drawn = make_views(few, specs, 0, plain).views
    size, cpu = run.options.views.size, torch.device("cpu")
    rows = []
    for numbers, originals in data.eval_images(source, few.index.numpy(), size, 1.0, cpu):
        for number, original in zip(numbers, originals.round().byte(), strict=True):
            row = int((few.index == number).nonzero()[0])
            rows.append([original, *(view[row] for view in drawn)])
    image = views.contact_sheet(rows, ["original", *(spec.name for spec in specs)])
    files.write_atomic(path, lambda file: image.save(file, format="PNG"))

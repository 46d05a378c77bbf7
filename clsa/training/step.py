"""One step of training: read `train_step` first. `fit.py` is the loop around it."""

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clsa.learning.models import Network, autocast
from clsa.learning.optim import clip_gradients, lr_at, peak_lr, set_lr, weight_decay_at
from clsa.loading.crops import Crops
from clsa.methods.method import Batch, Method, Output, sum_of
from clsa.options.run import RunOptions
from clsa.runs.computing import Computing
from clsa.runs.state import State
from clsa.system import dist
from clsa.system.machine import upload
from clsa.system.signals import Stop
from clsa.training.bad_steps import describe_badness
from clsa.views import transform
from clsa.views.specs import ViewSpec

MAX_GRAPHS = 64  # compiled graphs: one per view size, and one for the keys


class Run(NamedTuple):
    """What stays the same over a run."""

    options: RunOptions
    device: torch.device
    steps_per_epoch: int
    stop: Stop
    computing: Computing

    @property
    def num_steps(self) -> int:
        """Length of the whole schedule."""
        return self.steps_per_epoch * self.options.epochs

    @property
    def warmup_steps(self) -> float:
        """Steps during which the learning rate rises."""
        return self.steps_per_epoch * self.options.optim.warmup_epochs


class Seen(NamedTuple):
    """What the host reads from the device in a step: the maximum over all ranks."""

    is_bad: bool
    """Whether a loss or a gradient is not finite."""
    stop: int
    """`Stop.level`."""
    loss: float
    grad_norm: float


class Stats(NamedTuple):
    """One step: what the host has read, and detached tensors that it reads only when logging."""

    terms: dict[str, Tensor]
    lr: float
    seen: Seen
    bad: str = ""
    """What was not finite, if the step was skipped; else empty."""

    def numbers(self) -> dict[str, float]:
        """The values for the log."""
        return {**{name: float(value) for name, value in self.terms.items()}, "lr": self.lr}


def make_views(crops: Crops, specs: list[ViewSpec], step: int, run: Run) -> Batch:
    """Make every view on the device; its draws follow from (seed, epoch, index, view)."""
    options, epoch = run.options, step // run.steps_per_epoch
    drawn, fused = crops.drawn.numpy(), options.compile and run.device.type == "cuda"
    pixels = [
        transform.pixels(
            crop, transform.sample(spec, options.seed, epoch, drawn), spec, fused=fused
        )
        for spec, crop in zip(specs, crops.crops, strict=True)
    ]
    places, labels = upload([crops.index.numpy(), crops.labels.numpy()], run.device)
    return Batch(pixels, places, labels, step)


def train_step(model: nn.Module, state: State, crops: Crops, run: Run) -> Stats:
    """One step: views, losses, gradients, optimiser, then key network and bank.

    Args:
        model: `state.method`, or the same inside DistributedDataParallel.
        state: method, optimiser and step; advanced by one step.
        crops: this rank's rows of the batch.
        run: options and device.

    If a loss or gradient is not finite on any rank, nothing but `state.step` changes on all ranks.
    """
    options, method, optimizer = run.options, state.method, state.optimizer
    batch = make_views(crops, method.view_specs, state.step, run)
    state.statistics.keep()
    output, loss, norm = gradients(model, batch, method, run)
    seen = agree(loss, norm, run.stop)
    lr, why_bad = 0.0, ""
    if seen.is_bad:
        state.statistics.put_back()
        why_bad = describe_badness(method, loss.detach())
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
    """Output, loss and gradient norm; sets the gradients, changes only batch norm statistics.

    Args:
        model: `method`, or the same inside DistributedDataParallel.
    """
    with autocast(run.device, run.computing.precision):
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
    """Read the device once in a step, for all ranks: is the step good, and is it the last?"""
    numbers = torch.stack([loss.detach().float(), norm.float()])
    is_bad = (~numbers.isfinite()).any().float()
    flags = torch.stack([is_bad, torch.full_like(is_bad, stop.level)])
    any_bad, level, *highest = dist.all_max(torch.cat([flags, numbers.nan_to_num()])).tolist()
    return Seen(bool(any_bad), int(level), *highest)


def parallel(method: Method, options: RunOptions) -> nn.Module:
    """`method`, compiled if asked for, inside DistributedDataParallel with several processes.

    Buffers are not broadcast: banks are equal on all ranks by construction, and each rank has its
    own batch norm statistics, as in MoCo.
    """
    if options.compile:
        from torch._dynamo import config  # slow to import

        # Past the limit views run uncompiled, and change statistics that compiled views have saved.
        config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
        for module in method.modules():
            if isinstance(module, Network):
                module.encoder.compile(dynamic=False)  # a graph for each view size
    if dist.world_size() == 1:
        return method
    with warnings.catch_warnings():  # torch 2.10 lacks the new name of broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            method, broadcast_buffers=False, gradient_as_bucket_view=True
        )

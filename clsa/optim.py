"""Optimisers and schedules; the learning rate is a function of the step alone."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clsa.options import OptimOptions


class LARS(torch.optim.Optimizer):
    """SGD with layer-wise rates (You, Gitman, Ginsburg 2017), for large batches.

    For weights: g <- g + wd p; g <- g * trust ||p|| / ||g||; v <- momentum v + g; p <- p - lr v.
    Vectors (biases, norms) take plain momentum SGD without decay, as SimCLR and BYOL do.

    Args:
        params: parameters.
        lr: learning rate.
        momentum, weight_decay: as in SGD.
        trust: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 0.001,
    ):
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore
        """One update of every parameter that has a gradient; nothing is read by the host."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                update = param.grad
                if param.ndim > 1:
                    update = update.add(param, alpha=group["weight_decay"])
                    size, length = param.norm(), update.norm()
                    ratio = group["trust"] * size / length
                    update = update * torch.where((size > 0) & (length > 0), ratio, 1.0)
                state: dict[str, Any] = self.state[param]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                param.add_(velocity, alpha=-group["lr"])


def build_optimizer(method: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """The optimiser over `method`'s trainable parameters; `set_lr` gives it the rate.

    SGD decays every parameter, as the official code does.
    """
    params = [param for param in method.parameters() if param.requires_grad]
    momentum, decay = options.momentum, options.weight_decay
    if options.name == "lars":
        return LARS(params, lr=0.0, momentum=momentum, weight_decay=decay)
    return torch.optim.SGD(params, lr=0.0, momentum=momentum, weight_decay=decay, foreach=True)


def lr_at(options: OptimOptions, step: int, steps_per_epoch: int, epochs: int, batch: int) -> float:
    """Learning rate at `step` (from 0).

    Linear warm-up from lr / warm-up steps; then, with t the share of the remaining run that is
    over: cosine (1 + cos pi t) / 2 by step or by whole epoch, or a tenth at each milestone (shares
    of the whole run).

    Args:
        options: base rate per 256 pictures, schedule.
        step: optimiser step.
        steps_per_epoch, epochs: length of the run.
        batch: global batch size.
    """
    peak = options.lr * batch / 256
    total = steps_per_epoch * epochs
    warmup = options.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / math.ceil(warmup)
    if options.schedule == "constant":
        return peak
    if options.schedule == "step":
        passed = sum(step >= round(share * total) for share in options.milestones)
        return peak * 0.1**passed
    if options.schedule == "cosine-epoch":
        step = max(step // steps_per_epoch * steps_per_epoch, math.ceil(warmup))
    progress = (step - warmup) / max(1.0, total - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr

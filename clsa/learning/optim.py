"""Optimisers and schedules; the learning rate depends only on the step."""

import math
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clsa.options.run import OptimOptions


class LARS(torch.optim.Optimizer):
    """SGD with layer-wise rates (You, Gitman, Ginsburg 2017), for large batches.

    For weights: g <- g + wd p; g <- g * trust ||p|| / ||g||; v <- momentum v + g; p <- p - lr v.
    Groups with `adapt` False (biases, norms) take plain momentum SGD, as in SimCLR and BYOL.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum, weight_decay: as in SGD.
        trust: trust coefficient.
        clip: limit a layer's rate to `lr`, with the factor min(trust ||p|| / (||g|| lr), 1).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 0.001,
        clip: bool = False,
    ):
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust,
                    "clip": clip, "adapt": True}  # fmt: skip
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore
        """One update of every parameter that has a gradient; the host reads nothing."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            grads = [param.grad for param in params]
            decay = group["weight_decay"]
            updates = torch._foreach_add(grads, params, alpha=decay)  # pyright: ignore
            if group["adapt"]:
                sizes = torch.stack(torch._foreach_norm(params))  # pyright: ignore
                lengths = torch.stack(torch._foreach_norm(updates))  # pyright: ignore
                ratios = group["trust"] * sizes / lengths
                if group["clip"]:
                    ratios = (ratios / max(group["lr"], 1e-12)).clamp(max=1.0)
                ratios = torch.where((sizes > 0) & (lengths > 0), ratios, 1.0)
                torch._foreach_mul_(updates, list(ratios.unbind()))  # pyright: ignore
            for param in params:
                if "momentum_buffer" not in self.state[param]:
                    self.state[param]["momentum_buffer"] = torch.zeros_like(param)
            velocities = [self.state[param]["momentum_buffer"] for param in params]
            torch._foreach_mul_(velocities, group["momentum"])  # pyright: ignore
            torch._foreach_add_(velocities, updates)  # pyright: ignore
            torch._foreach_add_(params, velocities, alpha=-group["lr"])  # pyright: ignore


def build_optimizer(
    method: nn.Module, options: OptimOptions, fixed_rate: Iterable[nn.Module] = ()
) -> torch.optim.Optimizer:
    """The optimiser over `method`'s trainable parameters; `set_lr` gives it the rate.

    Args:
        method: module to train. Weight decay acts on all parameters, as in the official code, or
            with `decay_vectors=False` on all but biases and norms.
        fixed_rate: modules whose rate does not follow the schedule.
    """
    fixed = {param for module in fixed_rate for param in module.parameters()}
    kinds: dict[tuple[bool, bool], list[Tensor]] = {}
    for param in method.parameters():
        if param.requires_grad:
            kind = (options.decay_vectors or param.ndim > 1, param not in fixed)
            kinds.setdefault(kind, []).append(param)
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": options.weight_decay if decays else 0.0,
         "decays": decays, "scheduled": scheduled}
        for (decays, scheduled), params in kinds.items()
    ]  # fmt: skip
    if options.name == "lars":
        groups = [{**group, "adapt": group["decays"]} for group in groups]
        return LARS(groups, 0.0, options.momentum, trust=options.trust, clip=options.clip_trust)
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, foreach=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=options.momentum, foreach=True)


def peak_lr(options: OptimOptions, batch: int) -> float:
    """The highest learning rate of a run with global batches of `batch` pictures."""
    return options.lr * batch / 256


def lr_at(options: OptimOptions, step: int, steps_per_epoch: int, epochs: int, batch: int) -> float:
    """Learning rate at `step` (from 0).

    Linear warm-up that starts at lr / (number of warm-up steps). Then, depending on the schedule:
    constant; times 0.1 at each milestone (a share of the whole run); or a cosine by step or epoch:
    final + (lr - final) (1 + cos pi t) / 2, where t is the share of the run after warm-up that is
    over.

    Args:
        options: base rate per 256 pictures, schedule.
        step: optimiser step.
        steps_per_epoch, epochs: length of the run.
        batch: global batch size.
    """
    peak, final = peak_lr(options, batch), options.final_lr * batch / 256
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
    return along_cosine(peak, final, (step - warmup) / max(1.0, total - warmup))


def along_cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1: end + (start - end) (1 + cos pi t) / 2."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def weight_decay_at(options: OptimOptions, step: int, num_steps: int) -> float:
    """Weight decay at `step` of `num_steps`: constant, or along a cosine (DINO)."""
    end = options.final_weight_decay
    start = options.weight_decay
    return start if end is None else along_cosine(start, end, step / num_steps)


@runtime_checkable
class HasKeyMomentum(Protocol):
    """Options of a method with a momentum network."""

    @property
    def key_momentum(self) -> float: ...
    @property
    def final_key_momentum(self) -> float | None: ...


def momentum_at(options: HasKeyMomentum, step: int, num_steps: int) -> float:
    """Key momentum at `step`: constant, or m = end - (end - start) (cos(pi t) + 1) / 2 (BYOL)."""
    start, end = options.key_momentum, options.final_key_momentum
    return start if end is None else along_cosine(start, end, step / num_steps)


def set_lr(
    optimizer: torch.optim.Optimizer,
    lr: float,
    peak: float | None = None,
    weight_decay: float | None = None,
) -> None:
    """Set `lr`, or `peak` (if given) for modules of fixed rate; set `weight_decay` if given."""
    for group in optimizer.param_groups:
        group["lr"] = lr if peak is None or group["scheduled"] else peak
        if weight_decay is not None and group["decays"]:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients(params: Iterable[nn.Parameter], limit: float) -> None:
    """Clip the gradient of each parameter to a norm of `limit` (DINO clips each one by itself)."""
    grads = [param.grad for param in params if param.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))  # pyright: ignore
    factors = (limit / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, list(factors.unbind()))  # pyright: ignore

"""Alarms with plain words: what goes wrong in a run whose numbers are all finite.

Every step gives the loss and the norm of its gradient, which the host has read anyway; every
`LOOK_EVERY` steps the rows that the method compares are looked at. Nothing here changes a run.
"""

import math
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from clsa.bank import KeyQueue
from clsa.evaluate.diagnostics import feature_spread, rankme
from clsa.losses import CHUNK
from clsa.methods.around import Around
from clsa.methods.method import Comparison, Method, Output
from clsa.models import Network

LOOK_EVERY = 20
ROWS = 512  # of a batch, that are looked at
PATIENCE = 2  # looks in a row that show the same
WINDOW, LEAST = 200, 100  # steps that a spike is measured against


class Alarm(NamedTuple):
    """What is wrong, for people."""

    name: str
    looks: str
    """What it looks like, with the numbers."""
    cause: str
    """Likely."""
    advice: str

    def __str__(self) -> str:
        return f"{self.name} - {self.looks} - likely cause: {self.cause} - try: {self.advice}"


COLLAPSE, LOW_RANK, NO_LEARNING = "collapse", "low rank", "no learning"
LEAK, FROZEN_QUEUE, NO_LAG, SPIKE = "leak", "frozen queue", "key network does not lag", "spike"
COLLAPSES = {COLLAPSE, LOW_RANK}

WORDS = {
    COLLAPSE: (
        "the projections of different pictures are almost the same: spread {spread:.3f}, "
        "of a healthy run above {limit}",
        "a learning rate that is too high, or pictures that hardly differ",
        "a lower --optim.lr, a longer --optim.warmup-epochs, a look at views.png",
    ),
    LOW_RANK: (
        "the projections lie along few directions: effective rank {rank:.1f} of {full}, "
        "its highest was {peak:.1f}",
        "a learning rate that is too high, or a momentum of the key network that is too low",
        "a lower --optim.lr, a higher --method.key-momentum, a larger batch",
    ),
    NO_LEARNING: (
        "the loss is still that of a network that knows nothing: {loss:.3f}, chance {chance:.3f}",
        "a learning rate that is far too low or too high, or views with nothing in common",
        "another --optim.lr, a look at views.png, a larger smallest crop (--views.scale)",
    ),
    LEAK: (
        "nearly every positive is found at once: {top1:.1%} of {rows} queries in the first epoch",
        "something besides the picture gives it away: equal crops, or batch norm's statistics",
        "a look at views.png, stronger --views, more --model.norm-groups",
    ),
    FROZEN_QUEUE: (
        "no row of the queue has changed for {steps} steps",
        "keys that are no longer enqueued",
        "going on from an earlier checkpoint; if it comes again, tell us",
    ),
    NO_LAG: (
        "the key network equals the query network",
        "a key momentum of zero",
        "--method.key-momentum 0.99 or more",
    ),
    SPIKE: (
        "{what} is {value:.4g}, {deviations:.0f} deviations from the median of {steps} steps, "
        "{median:.4g}",
        "a batch unlike the others, or a learning rate that is too high",
        "nothing if it stays alone; else a lower --optim.lr, --optim.clip-norm, or an earlier "
        "checkpoint",
    ),
}  # fmt: skip


def alarm(name: str, **values: float | str) -> Alarm:
    """The alarm of that name with its numbers."""
    looks, cause, advice = WORDS[name]
    return Alarm(name, looks.format(**values), cause, advice)


class Limits(NamedTuple):
    """Where an alarm begins; set by ten healthy runs of 2,000 steps (docs/reliability.md)."""

    spread: float = 0.1
    """`feature_spread`: lower is a collapse. 0 of constant rows, near 1 of healthy ones."""
    rank_share: float = 0.05
    """RankMe over the most that is possible: lower is low rank."""
    rank_drop: float = 0.2
    """RankMe over its peak: lower is low rank."""
    chance: float = 0.01
    """Distance of the loss from chance, as a share of chance: nearer is no learning."""
    top1: float = 0.995
    """Share of positives that are nearest: more in the first epoch is a leak."""
    least_rows: int = 256
    """In the bank, for a leak: among few rows the positive is soon the nearest."""
    deviations: float = 8.0
    """Robust deviations from the median: more is a spike."""


LIMITS = Limits()


class Spikes:
    """A number that was like the last ones until now.

    z = (x - median) / (1.4826 MAD) over the last `WINDOW` steps, with at least `floor` of the
    median for a deviation: a flat curve has hardly any.
    """

    def __init__(self, what: str, floor: float):
        self.what, self.floor = what, floor
        self.past: deque[float] = deque(maxlen=WINDOW)

    def after(self, value: float) -> Alarm | None:
        """Take the number of a step; an alarm if it is far from those before."""
        found = None
        if len(self.past) >= LEAST:
            past = np.array(self.past)
            median = float(np.median(past))
            spread = 1.4826 * float(np.median(np.abs(past - median)))
            deviation = max(spread, self.floor * abs(median), 1e-12)
            far = (value - median) / deviation
            if far > LIMITS.deviations:
                found = alarm(
                    SPIKE, what=self.what, value=value, deviations=far, steps=len(past),
                    median=median,
                )  # fmt: skip
        self.past.append(value)
        return found


class Health:
    """Watches a run on the process that tells of it.

    Args:
        method: of the run; a hook on its `forward` sees what it returns.
        steps_per_epoch: in the first of which a leak shows.
        warmup_steps: before which no loss is expected to fall.
        step: done so far.
        watches: whether this process does; the others do nothing.
    """

    def __init__(
        self, method: Method, steps_per_epoch: int, warmup_steps: float, step: int, watches: bool
    ):
        self.method, self.step, self.watches = method, step, watches
        self.steps_per_epoch, self.warmup_steps = steps_per_epoch, warmup_steps
        self.spikes = [Spikes("the loss", 0.02), Spikes("the norm of the gradient", 0.05)]
        self.queues = [child for child in method.modules() if isinstance(child, KeyQueue)]
        self.first_queued = method.first_queued
        self.seen: list[Tensor] = []
        self.numbers: dict[str, float] = {}
        self.peak = 0.0
        self.sums: list[float] = []
        self.quiet_until = 0
        self.in_row: dict[str, int] = {}
        self.told: set[str] = set()
        self.hook = method.register_forward_hook(self._see) if watches else None

    def close(self) -> None:
        """Watch no longer."""
        if self.hook is not None:
            self.hook.remove()

    def _is_look(self) -> bool:
        return self.watches and (self.step + 1) % LOOK_EVERY == 0

    @torch.no_grad()
    def _see(self, _: nn.Module, __: object, output: Output) -> None:
        """Of the step that is being taken, what the host will read when it is done."""
        self.seen = []
        if self._is_look() and output.comparisons:
            comparison = output.comparisons[0]
            rows = comparison.rows()[0].detach()[:ROWS].float()
            loss = output.losses[self.method.landmarks.name].detach().float()
            self.seen = [rows, loss, share_first(comparison)]

    def after(self, loss: float, grad_norm: float, is_bad: bool = False) -> list[Alarm]:
        """A step is done: the alarms that begin with it. One that was skipped shows nothing."""
        is_look, self.step = self._is_look(), self.step + 1
        if not self.watches or is_bad:
            return []
        found = [
            spike.after(value) for spike, value in zip(self.spikes, (loss, grad_norm), strict=True)
        ]
        begun = [each for each in found if each is not None][:1]
        if is_look and self.seen:
            begun += self._look()
        self.seen = []
        return begun

    def _look(self) -> list[Alarm]:
        rows, loss, first = (tensor.cpu() for tensor in self.seen)
        full = min(rows.shape)
        spread, rank = feature_spread(rows), rankme(rows)
        self.peak = max(self.peak, rank)
        self.numbers = {"spread": round(spread, 4), "rankme": round(rank, 2)}
        chance, limits = self.method.landmarks.chance, LIMITS
        signs = {
            COLLAPSE: spread < limits.spread,
            LOW_RANK: rank < limits.rank_share * full or rank < limits.rank_drop * self.peak,
            NO_LEARNING: abs(loss.item() - chance) < limits.chance * abs(chance),
            FROZEN_QUEUE: self._queue_stands(),
            NO_LAG: self._keys_are_queries(),
        }
        if first.isfinite():
            self.numbers["top1"] = round(first.item(), 4)
            signs[LEAK] = first.item() > limits.top1 and self.step <= self.steps_per_epoch
        values = {
            "spread": spread, "limit": limits.spread, "rank": rank, "full": full,
            "peak": self.peak, "loss": loss.item(), "chance": chance, "top1": first.item(),
            "rows": len(rows), "steps": LOOK_EVERY * self.in_row.get(FROZEN_QUEUE, 0),
        }  # fmt: skip
        return [alarm(name, **values) for name, shows in signs.items() if self._begins(name, shows)]

    def _begins(self, name: str, shows: bool) -> bool:
        """Whether a sign has now been there often enough, and was not told of since it was not."""
        self.in_row[name] = self.in_row.get(name, 0) + 1 if shows else 0
        if not shows:
            self.told.discard(name)
        needed = {NO_LEARNING: 5, FROZEN_QUEUE: 5}.get(name, PATIENCE)
        early = self.step < self.warmup_steps if name == NO_LEARNING else False
        if self.in_row[name] < needed or early or name in self.told:
            return False
        self.told.add(name)
        return True

    def _queue_stands(self) -> bool:
        """Whether a queue that should move is what it was at the last look."""
        sums = [queue.rows.sum(dtype=torch.float64).item() for queue in self.queues]
        before, self.sums = self.sums, sums
        moving = self.step - LOOK_EVERY > self.first_queued
        return moving and any(a == b for a, b in zip(before, sums, strict=False))

    def _keys_are_queries(self) -> bool:
        """Whether the key network has the weights of the query network."""
        inner = self.method
        while isinstance(inner, Around):
            inner = inner.base
        keys = getattr(inner, "key_network", None)
        if not isinstance(keys, Network):
            return False
        pairs = zip(keys.parameters(), inner.network.parameters(), strict=False)
        return all(torch.equal(key, query) for key, query in pairs)


def share_first(comparison: Comparison) -> Float[Tensor, ""]:
    """Share of queries whose positive is nearer than all else that they see; NaN if none tells.

    Ties count against it: of equal rows none is first. In tiles, as the losses.
    """
    _, bank, positive, candidates = comparison
    query = comparison.rows()[0].detach().float()[:ROWS]
    if positive is None or len(bank) < LIMITS.least_rows:
        return query.new_full((), math.nan)
    positive = positive[:ROWS]
    own = (query * bank[positive].float()).sum(1)
    best = torch.full_like(own, -math.inf)
    for start in range(0, len(bank), CHUNK):
        alike = query @ bank[start : start + CHUNK].float().T
        columns = torch.arange(start, start + alike.shape[1], device=bank.device)
        hidden = columns == positive[:, None]
        if candidates is not None and start < candidates.shape[1]:
            shown = candidates[:ROWS, start : start + CHUNK]
            hidden[:, : shown.shape[1]] |= ~shown
        best = torch.maximum(best, alike.masked_fill(hidden, -math.inf).amax(1))
    return (own > best).float().mean()

"""Watch a run whose numbers are all finite, and raise alarms for what goes wrong in it.

Every step gives the loss and the gradient norm, which the host has read anyway, and the spread of
the rows that the method compares. Every `LOOK_EVERY` steps, at a "look", the host reads the spreads
and inspects the rows. Nothing here changes a run.
"""

import math
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from clsa.diagnose.measures import rankme, spread
from clsa.learning.bank import KeyQueue
from clsa.learning.losses import chunk_for
from clsa.methods.method import Comparison, Method, Output
from clsa.methods.wrappers.wrapper import innermost, key_network_of
from clsa.runs.alarms import (
    BLANK,
    COLLAPSE,
    FROZEN_QUEUE,
    LEAK,
    LOW_RANK,
    NO_LAG,
    NO_LEARNING,
    SPIKE,
    Alarm,
    alarm,
)

LOOK_EVERY = 20
LEAST_ROWS, ROWS = 8, 512  # rows of this process's batch that a look uses
# Looks in a row that must show the same problem.
PATIENCE = {BLANK: 1, COLLAPSE: 2, LOW_RANK: 2, LEAK: 2, NO_LAG: 2, NO_LEARNING: 5, FROZEN_QUEUE: 5}
TIE = 1e-5  # similarities closer than this are equal up to rounding
WINDOW, LEAST = 200, 100  # past steps that a spike is compared with


class Limits(NamedTuple):
    """Thresholds of the alarms, set from healthy runs of 2,000 steps (docs/health.md)."""

    spread: float = 0.05
    """`feature_spread`: lower is a collapse. It is 0 for constant rows, near 1 for healthy ones."""
    rank: float = 1.5
    """RankMe of the centred rows: lower is low rank."""
    rank_share: float = 0.05
    """RankMe divided by the highest possible rank: lower is low rank."""
    rank_drop: float = 0.1
    """RankMe divided by its highest value in the run: lower is low rank."""
    chance: float = 0.01
    """Distance of the loss from chance, as a share of chance: lower is no learning."""
    top1: float = 0.995
    """Share of positives that are nearest: a higher one in the first epoch is a leak."""
    least_rows: int = 256
    """Least rows in the bank for a leak: among few rows the positive is soon the nearest."""
    deviations: float = 8.0
    """Robust deviations above the median: more is a spike."""


LIMITS = Limits()


class Spikes:
    """Detects when a number rises far above its values in the last steps.

    z = (x - median) / (1.4826 MAD) over the last `WINDOW` steps.

    Args:
        what: name of the number, for people.
        least: lower limit of the deviation, since a flat curve has almost none.
        logarithmic: use the logarithm of the number: gradient norms have a long tail.
    """

    def __init__(self, what: str, least: float, logarithmic: bool = False):
        self.what, self.least, self.logarithmic = what, least, logarithmic
        self.past: deque[float] = deque(maxlen=WINDOW)

    def after(self, value: float) -> Alarm | None:
        """Add the number of a step; returns an alarm if it is far above those before."""
        self.past.append(value)
        if len(self.past) <= LEAST:
            return None
        numbers = np.array(self.past)
        scaled = np.log(numbers.clip(1e-30)) if self.logarithmic else numbers
        before, now = scaled[:-1], scaled[-1]
        median = np.median(before)
        far = (now - median) / max(1.4826 * np.median(np.abs(before - median)), self.least)
        if far <= LIMITS.deviations:
            return None
        usual = np.median(numbers[:-1])
        return alarm(SPIKE, what=self.what, value=value, deviations=far, median=usual)


class Health:
    """Watches the health of a run, on the process that reports.

    Args:
        method: of the run; a hook on its `forward` reads the output.
        steps_per_epoch: a leak is looked for in the first epoch only.
        warmup_steps: the loss need not fall before this step.
        step: steps done so far.
        watches: whether this process watches; on other processes nothing happens.

    Attributes:
        numbers: measured at the last look; empty once `take_numbers` has given them to the log.
    """

    def __init__(
        self, method: Method, steps_per_epoch: int, warmup_steps: float, step: int, watches: bool
    ):
        self.method, self.step, self.watches = method, step, watches
        self.steps_per_epoch, self.warmup_steps = steps_per_epoch, warmup_steps
        self.numbers: dict[str, float] = {}
        self.loss, self.norm = Spikes("the loss", 0.02), Spikes("the gradient's norm", 0.25, True)
        self.quiet_until = 0  # report a spike once, not at each of its steps
        self.spreads: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.peak_rank = 0.0
        inner = innermost(method)  # queues of wrappers may rest for long
        self.queues = [child for child in inner.modules() if isinstance(child, KeyQueue)]
        self.sums: list[Tensor] = []
        self.in_row: dict[str, int] = {}
        if watches:
            method.register_forward_hook(self._see)

    def _is_look(self) -> bool:
        return (self.step + 1) % LOOK_EVERY == 0

    @torch.no_grad()
    def _see(self, _: nn.Module, __: object, output: Output) -> None:
        """Forward hook: keep the tensors of this step that the host reads at the next look."""
        comparison = output.comparisons[0]
        rows = comparison.rows()[0].detach()[:ROWS].float()
        self.spreads.append(spread(rows))
        if self._is_look():
            loss = output.losses[self.method.landmarks.name].detach().float()
            with torch.autocast(rows.device.type, enabled=False):
                self.seen = [rows, loss, share_first(comparison)]

    def after(self, loss: float, grad_norm: float, is_bad: bool) -> list[Alarm]:
        """Call after each step; returns the alarms that begin with it. Bad steps give none."""
        is_look, self.step = self._is_look(), self.step + 1
        begun: list[Alarm] = []
        if self.watches and not is_bad:
            spikes = [self.loss.after(loss), self.norm.after(grad_norm)]
            if self.step > self.quiet_until:
                begun = [spike for spike in spikes if spike][:1]
            if begun:
                self.quiet_until = self.step + WINDOW
            if is_look:
                shape = self.seen[0].shape
                begun += self._judge(self._gathered().cpu(), shape)  # one read of the device
        if is_look:
            self.spreads, self.seen = [], []
        return begun

    def take_numbers(self) -> dict[str, float]:
        """What was measured at a look that the log has not seen yet; empty if there was none."""
        taken, self.numbers = self.numbers, {}
        return taken

    def _gathered(self) -> Float[Tensor, "numbers"]:
        """All numbers kept since the last look, in one tensor on the device."""
        rows, loss, first = self.seen
        signs = [loss, first, self._queue_stands(rows), self._keys_are_queries(rows)]
        return torch.cat([torch.stack([*signs, *self.spreads]), rows.flatten()])

    def _judge(self, gathered: Float[Tensor, "numbers"], shape: torch.Size) -> list[Alarm]:
        """The alarms that begin with a look.

        Args:
            gathered: as `_gathered` returns it, but on the CPU.
            shape: shape of the rows at its end.
        """
        numbers, rows = gathered[: -shape.numel()], gathered[-shape.numel() :].view(shape)
        (loss, top1, stands, equal), spreads = numbers[:4].tolist(), numbers[4:].nan_to_num(1.0)
        last, least, full = spreads[-1].item(), spreads.min().item(), min(shape)
        rank = rankme(rows - rows.mean(0))
        self.peak_rank = max(self.peak_rank, rank)
        self.numbers = {"spread": round(last, 4), "rankme": round(rank, 2)}
        if math.isfinite(top1):
            self.numbers["top1"] = round(top1, 4)
        chance, limits = self.method.landmarks.chance, LIMITS
        low = max(limits.rank, limits.rank_share * full, limits.rank_drop * self.peak_rank)
        enough = full >= LEAST_ROWS  # with few rows, spread and rank say nothing
        shows = {
            COLLAPSE: enough and last < limits.spread,
            BLANK: enough and least < limits.spread < spreads.median().item(),
            LOW_RANK: enough and rank < low,
            # With prototypes, a healthy loss may stay at chance for long.
            NO_LEARNING: abs(loss - chance) < limits.chance * abs(chance)
            and self.method.has_positives
            and self.step > self.warmup_steps,
            LEAK: top1 > limits.top1 and last > limits.spread and self.step <= self.steps_per_epoch,
            FROZEN_QUEUE: stands > 0 and self.step - LOOK_EVERY > self.method.first_queued,
            NO_LAG: equal > 0,
        }
        values = {
            "spread": last, "least": least, "limit": limits.spread, "rank": rank, "full": full,
            "peak": self.peak_rank, "loss": loss, "chance": chance, "top1": top1,
            "rows": len(rows), "steps": LOOK_EVERY * PATIENCE[FROZEN_QUEUE],
        }  # fmt: skip
        for name, is_shown in shows.items():
            self.in_row[name] = self.in_row.get(name, 0) + 1 if is_shown else 0
        return [alarm(name, **values) for name in shows if self.in_row[name] == PATIENCE[name]]

    def _queue_stands(self, like: Tensor) -> Float[Tensor, ""]:
        """1 if any queue is the same as at the last look, else 0."""
        sums = [queue.rows.sum(dtype=torch.float64) for queue in self.queues]
        before, self.sums = self.sums, sums
        same = [was == now for was, now in zip(before, sums, strict=False)]
        return torch.stack(same).any().to(like) if same else like.new_zeros(())

    def _keys_are_queries(self, like: Tensor) -> Float[Tensor, ""]:
        """1 if the key network has exactly the weights of the query network, else 0."""
        keys = key_network_of(self.method)
        if keys is None:
            return like.new_zeros(())
        pairs = zip(keys.parameters(), self.method.network.parameters(), strict=False)
        return torch.stack([(key == query).all() for key, query in pairs]).all().to(like)


def share_first(comparison: Comparison) -> Float[Tensor, ""]:
    """Share of queries whose positive is nearer than every other candidate; NaN if unknown.

    It is unknown without positives, or if the bank is too small. A tie does not count as nearer.
    The bank is read in tiles, as in the losses.
    """
    _, bank, positive, candidates = comparison
    query = comparison.rows()[0].detach().float()[:ROWS]
    if positive is None or len(bank) < LIMITS.least_rows:
        return query.new_full((), math.nan)
    positive = positive[:ROWS]
    own = (query * bank[positive].float()).sum(1)
    best = torch.full_like(own, -math.inf)
    chunk = chunk_for(query)
    for start in range(0, len(bank), chunk):
        alike = query @ bank[start : start + chunk].float().T
        columns = torch.arange(start, start + alike.shape[1], device=bank.device)
        hidden = columns == positive[:, None]
        if candidates is not None and start < candidates.shape[1]:
            shown = candidates[:ROWS, start : start + chunk]
            hidden[:, : shown.shape[1]] |= ~shown
        best = torch.maximum(best, alike.masked_fill(hidden, -math.inf).amax(1))
    return (own > best + TIE).float().mean()

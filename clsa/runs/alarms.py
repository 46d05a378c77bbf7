"""Alarms of a run's health, in plain words: what it looks like, the likely cause, what to try."""

from typing import NamedTuple


class Alarm(NamedTuple):
    """What is wrong, for people."""

    name: str
    looks: str
    """What it looks like, with the numbers."""
    cause: str
    """The likely cause."""
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.looks}\n  likely cause: {self.cause}\n  try: {self.advice}"


COLLAPSE, LOW_RANK, NO_LEARNING = "collapse", "low rank", "no learning"
LEAK, FROZEN_QUEUE, NO_LAG = "leak", "frozen queue", "key network does not lag"
SPIKE, BLANK = "spike", "blank batch"
COLLAPSES = {COLLAPSE, LOW_RANK}

WORDS = {
    COLLAPSE: (
        "the projections of different pictures are almost the same: spread {spread:.3f}, "
        "healthy runs stay above {limit}",
        "a learning rate that is too high, or pictures that hardly differ",
        "a lower --optim.lr, a longer --optim.warmup-epochs, a look at views.png",
    ),
    LOW_RANK: (
        "the projections lie along few directions: effective rank {rank:.1f} of {full}, "
        "highest so far {peak:.1f}",
        "a learning rate that is too high, or a momentum of the key network that is too low",
        "a lower --optim.lr, a higher --method.key-momentum, a larger batch",
    ),
    NO_LEARNING: (
        "the loss is still close to chance: {loss:.3f}, chance {chance:.3f}",
        "a learning rate that is far too low or too high, or views with nothing in common",
        "another --optim.lr, a look at views.png, a larger smallest crop (--views.scale)",
    ),
    LEAK: (
        "the positive is already nearest for {top1:.1%} of {rows} queries in the first epoch",
        "something other than the picture gives it away: equal crops, or batch norm's statistics",
        "a look at views.png, stronger --views, more --model.norm-groups",
    ),
    FROZEN_QUEUE: (
        "no row of the queue has changed for {steps} steps",
        "keys that are no longer enqueued",
        "resuming from an earlier checkpoint; if it happens again, please report it",
    ),
    NO_LAG: (
        "the key network equals the query network",
        "a key momentum of zero",
        "--method.key-momentum 0.99 or more",
    ),
    BLANK: (
        "all pictures of a batch gave the same projection: spread {least:.3f}, "
        "usually {spread:.3f}",
        "pictures without content, or decoded as one colour",
        "a look at the pictures; nothing if it happens only once",
    ),
    SPIKE: (
        "{what} is {value:.4g}, {deviations:.0f} deviations above the recent median {median:.4g}",
        "a batch unlike the others, or a learning rate that is too high",
        "nothing if it happens only once; else a lower --optim.lr, --optim.clip-norm, or an "
        "earlier checkpoint",
    ),
}  # fmt: skip


def alarm(name: str, **values: float | str) -> Alarm:
    """The alarm of that name with its numbers."""
    looks, cause, advice = WORDS[name]
    return Alarm(name, looks.format(**values), cause, advice)

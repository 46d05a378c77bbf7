"""Which labelled pictures classifiers learn from, and which they are judged on."""

import copy
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from clsa.loading.few_labels import with_few_labels
from clsa.pictures.sources import Source
from clsa.runs import digests
from clsa.system.errors import ClsaError, Exit
from clsa.views import rng

MIN_LABELLED = 5
CHOICE_SLOT = 1  # of the fifth of the bank on which a rate or an L2 weight is chosen
MAX_NAMED = 5


class Split(NamedTuple):
    """Labelled pictures in two parts; labels of both are positions in `bank.classes`."""

    bank: Source
    queries: Source
    name: str
    """val: `queries` are the set's own; holdout: they are a fifth of the labelled pictures;
    val-holdout: the same of `--val`, the training pictures having no labels."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.bank.classes

    several = False
    """A picture is of one class."""

    def digest(self) -> str:
        """One sha256 for both parts."""
        return digests.digest([self.bank.digest(), self.queries.digest()])


def hold_out(
    count: int, seed: int, slot: int
) -> tuple[Int64[np.ndarray, "kept"], Int64[np.ndarray, "held"]]:
    """Rows 0 to count - 1 as the kept four fifths and the held-out fifth, each in order.

    Args:
        count: at least 2.
        slot: number of the draw; another slot gives an independent choice.
    """
    rows, slots = np.arange(count, dtype=np.int64), np.array([slot], np.int64)
    drawn = rng.uniforms(seed, 0, rows, rng.HOLDOUT, slots)[:, 0]
    order = np.argsort(drawn, kind="stable")
    held = max(1, round(count / 5))
    return np.sort(order[held:]), np.sort(order[:held])


def without_held_out_labels(train: Source) -> Source:
    """`train` with the labels hidden (-1) that `split` holds out of it with seed 0.

    A method that learns from labels must not have seen those it is judged on.
    """
    labelled = np.flatnonzero(train.labels >= 0)
    if len(labelled) < MIN_LABELLED:
        return train
    shown = copy.copy(train)
    shown.labels = train.labels.copy()
    shown.labels[labelled[hold_out(len(labelled), seed=0, slot=0)[1]]] = -1
    return shown


def with_few_bank_labels(parts: Split, spec: str, seed: int) -> Split:
    """The same queries, and a bank of the few pictures that `few_labels` chooses."""
    held = [] if parts.name == "val" else parts.queries.ids
    few = with_few_labels(parts.bank, spec, seed, held)
    return parts._replace(bank=few.subset(np.flatnonzero(few.labels >= 0)))


def split(train: Source, val: Source | None, seed: int) -> Split:
    """The labelled pictures of `train` as bank, those of `val` as queries.

    Without `val` a seeded fifth of the labelled pictures is held out as queries (pretraining saw
    the pixels of those, never their labels). When `train` has no labels, a fifth of `val` is.

    Args:
        val: its labels number `train.classes` (see `intake.open_val`).

    Raises:
        ClsaError: 65 when one of them has no labels to speak of.
    """
    labelled = np.flatnonzero(train.labels >= 0)
    if not len(labelled) and val is not None and (val.labels >= 0).any():
        return split(val, None, seed)._replace(name="val-holdout")
    if len(labelled) < MIN_LABELLED:
        why = f"{len(labelled)} of {len(train)} training pictures have labels"
        step = "put pictures in one subfolder a class, or use a list file of `path<tab>label`"
        raise ClsaError("too few labels to judge features", why, step, Exit.BAD_DATA)
    if val is None:
        kept, held = hold_out(len(labelled), seed, slot=0)
        return Split(train.subset(labelled[kept]), train.subset(labelled[held]), "holdout")
    known = np.flatnonzero(val.labels >= 0)
    if not len(known):
        names = ", ".join(train.classes[:MAX_NAMED])
        names += ", ..." if len(train.classes) > MAX_NAMED else ""
        why = f"none of its {len(val)} pictures is of a class of the training pictures ({names})"
        raise ClsaError("no val picture to judge features on", why, "name classes alike in both",
                        Exit.BAD_DATA)  # fmt: skip
    return Split(train.subset(labelled), val.subset(known), "val")

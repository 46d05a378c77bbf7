"""Decide which labelled pictures classifiers learn from, and which they are judged on."""

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
CHOICE_SLOT = 1  # draws the fifth of the bank on which a rate or an L2 weight is chosen
MAX_NAMED = 5


class Split(NamedTuple):
    """Labelled pictures in two parts; labels of both are positions in `bank.classes`."""

    bank: Source
    queries: Source
    name: str
    """val: `queries` are the set's own test pictures. holdout: they are a fifth of the labelled
    training pictures. val-holdout: they are a fifth of the labelled pictures of `val`, because
    the training pictures have no labels."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.bank.classes

    several = False
    """Each picture has one class."""

    def digest(self) -> str:
        """One sha256 for both parts."""
        return digests.digest([self.bank.digest(), self.queries.digest()])


def hold_out(
    count: int, seed: int, slot: int
) -> tuple[Int64[np.ndarray, "kept"], Int64[np.ndarray, "held"]]:
    """Split rows 0 to count - 1 into four kept fifths and a held-out fifth, each in order.

    Args:
        count: at least 2.
        seed: of the draw.
        slot: number of the draw; another slot gives an independent choice.
    """
    rows, slots = np.arange(count, dtype=np.int64), np.array([slot], np.int64)
    drawn = rng.uniforms(seed, 0, rows, rng.HOLDOUT, slots)[:, 0]
    order = np.argsort(drawn, kind="stable")
    held = max(1, round(count / 5))
    return np.sort(order[held:]), np.sort(order[:held])


def without_held_out_labels(train: Source) -> Source:
    """`train` without the labels (-1 instead) that `split` with seed 0 holds out.

    A method that learns from labels must not see those of the pictures it is judged on.
    """
    labelled = np.flatnonzero(train.labels >= 0)
    if len(labelled) < MIN_LABELLED:
        return train
    shown = copy.copy(train)
    shown.labels = train.labels.copy()
    shown.labels[labelled[hold_out(len(labelled), seed=0, slot=0)[1]]] = -1
    return shown


def with_few_bank_labels(parts: Split, spec: str, seed: int) -> Split:
    """The same queries, and a bank of only the pictures that `with_few_labels` chooses."""
    held = [] if parts.name == "val" else parts.queries.ids
    few = with_few_labels(parts.bank, spec, seed, held)
    return parts._replace(bank=few.subset(np.flatnonzero(few.labels >= 0)))


def split(train: Source, val: Source | None, seed: int) -> Split:
    """Take the labelled pictures of `train` as bank and those of `val` as queries.

    Without `val`, a seeded fifth of the labelled pictures is held out as queries (pretraining saw
    their pixels, but never their labels). If `train` has no labels, a fifth of `val` is held out
    in the same way, and the rest of `val` is the bank.

    Args:
        val: its labels are positions in `train.classes` (see `opening.open_val`).
        seed: of the held-out fifth.

    Raises:
        ClsaError: 65 if there are too few labels.
    """
    labelled = np.flatnonzero(train.labels >= 0)
    if not len(labelled) and val is not None and (val.labels >= 0).any():
        return split(val, None, seed)._replace(name="val-holdout")
    if len(labelled) < MIN_LABELLED:
        why = f"{len(labelled)} of {len(train)} training pictures have labels"
        step = "put pictures in one subfolder per class, or use a list file of `path<tab>label`"
        raise ClsaError("too few labels to judge features", why, step, Exit.BAD_DATA)
    if val is None:
        kept, held = hold_out(len(labelled), seed, slot=0)
        return Split(train.subset(labelled[kept]), train.subset(labelled[held]), "holdout")
    known = np.flatnonzero(val.labels >= 0)
    if not len(known):
        names = ", ".join(train.classes[:MAX_NAMED])
        names += ", ..." if len(train.classes) > MAX_NAMED else ""
        why = f"none of its {len(val)} pictures is of a class of the training pictures ({names})"
        raise ClsaError("no val picture to judge features on", why, "use the same names in both",
                        Exit.BAD_DATA)  # fmt: skip
    return Split(train.subset(labelled), val.subset(known), "val")

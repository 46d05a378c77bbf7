"""Few labels: which pictures count as labelled, and how many of each class stand in a batch."""

import copy
import hashlib
import os
import re
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from clsa import rng
from clsa.errors import ClsaError, Exit
from clsa.order import Companions, Order, Rows
from clsa.sources import Source


def with_few_labels(source: Source, spec: str, seed: int) -> Source:
    """`source` with all labels hidden (-1) but a few.

    Args:
        spec: a share of each class such as `10%` (of every class at least one picture, drawn by
            its name and `seed`, so that the same pictures are chosen whatever else the set holds),
            or a text file with one labelled picture a line: its path in the set or its file name,
            as in SimCLR's lists for ImageNet; what follows a tab is ignored.

    Raises:
        ClsaError: for another form, a file that cannot be read, a name that is not that of one
            labelled picture, or when there are no labels at all.
    """
    labelled = np.flatnonzero(source.labels >= 0)
    if not len(labelled):
        why = "none of the pictures has a label"
        hint = "give class folders or a list with labels, or leave the option out"
        raise ClsaError(f"labels {spec}", why, hint)
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", spec.strip())
    if share:
        percent = float(share[1])
        if not 0 < percent <= 100:
            raise ClsaError(f"labels {spec}", "no share", "give a number up to 100, such as 10%")
        chosen = _balanced(source, labelled, percent / 100, seed)
    else:
        chosen = _listed(source, spec)
    few = copy.copy(source)
    few.labels = np.full_like(source.labels, -1)
    few.labels[chosen] = source.labels[chosen]
    return few


def _balanced(
    source: Source, labelled: Int64[np.ndarray, " n"], share: float, seed: int
) -> Int64[np.ndarray, " m"]:
    """Of each class max(1, round(share n_c)) pictures, those whose names draw the least."""
    names = np.array([_number(source.ids[i]) for i in labelled.tolist()], np.int64)
    drawn = rng.uniforms(seed, 0, names, rng.FEW_LABELS, np.zeros(1, np.int64))[:, 0]
    chosen = []
    for place in np.unique(source.labels[labelled]):
        rows = np.flatnonzero(source.labels[labelled] == place)
        count = max(1, round(share * len(rows)))
        chosen.append(rows[np.argsort(drawn[rows], kind="stable")[:count]])
    return np.sort(labelled[np.concatenate(chosen)])


def _number(name: str) -> int:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _listed(source: Source, spec: str) -> Int64[np.ndarray, " m"]:
    try:
        lines = Path(spec).read_text("utf-8", errors="surrogateescape").splitlines()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "neither a share nor a file"
        hint = "give a share of each class such as 10%, or a text file with a picture a line"
        raise ClsaError(f"labels {spec}", why, hint, Exit.NO_INPUT) from None
    wanted = list(dict.fromkeys(line.split("\t")[0].strip() for line in lines if line.strip()))
    rows: dict[str, list[int]] = {name: [] for name in wanted}
    for i, name in enumerate(source.ids):
        for told in {name, os.path.basename(name)} & rows.keys():
            rows[told].append(i)
    found = {name: [i for i in places if source.labels[i] >= 0] for name, places in rows.items()}
    wrong = [name for name in wanted if len(found[name]) != 1]
    if wrong or not wanted:
        first = wrong[0] if wrong else ""
        kinds = {True: "several pictures have this name", False: "no picture of the set"}
        kind = kinds[len(rows.get(first, [])) > 1]
        kind = "has no label in the set" if first and rows[first] and not found[first] else kind
        why = f"{kind} ({len(wrong)} such lines)" if wrong else "the file names no picture"
        hint = "write paths as the set has them, a line each"
        raise ClsaError(f"labels {spec}: {first}" if wrong else f"labels {spec}", why, hint)
    return np.unique([found[name][0] for name in wanted])


def told_labels(source: Source) -> str:
    """How many labels there are, for the user."""
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    single = int((counts == 1).sum())
    told = f"labels: {counts.sum()} pictures of {(counts > 0).sum()} classes"
    return f"{told}, {single} of which have a single one" if single else told


class Stratified(Companions):
    """Labelled pictures beside each batch: some classes, and some pictures of each (SuNCEt).

    A step draws its classes without replacement, and the pictures of a class too; a class with
    fewer than `per_class` gives each of them in turn. Every visit has views of its own. All is a
    function of (seed, step); the rows of a class stand side by side.

    Args:
        labels: classes of all pictures, -1 unknown.
        classes: how many a step; all where there are fewer.
        per_class: pictures of each.
    """

    def __init__(self, labels: Int64[np.ndarray, " n"], classes: int, per_class: int, seed: int):
        self.members = [np.flatnonzero(labels == c) for c in np.unique(labels[labels >= 0])]
        self.per_class, self.seed = per_class, seed
        self.num_classes = min(classes, len(self.members))
        self.count = self.num_classes * per_class

    def rows(self, order: Order, step: int) -> Rows:
        """The labelled pictures of a step."""
        numbers = rng.permutation(self.seed, step, len(self.members), rng.CLASSES)
        chosen = []
        for number in numbers[: self.num_classes].tolist():
            members = self.members[number]
            drawn = rng.uniforms(self.seed, step, members, rng.CLASSES, np.ones(1, np.int64))
            chosen.append(np.resize(members[np.argsort(drawn[:, 0])], self.per_class))
        first = order.count + step % order.steps_per_epoch * self.count
        return Rows(np.concatenate(chosen), first + np.arange(self.count))

"""Learning from few labels: which pictures count as labelled, and which of them join each batch."""

import copy
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from clsa.loading.order import Companions, Order, Rows
from clsa.pictures.sources import Source
from clsa.system.errors import ClsaError, Exit
from clsa.views import rng

HELD = -1


def with_few_labels(source: Source, spec: str, seed: int, held: Iterable[str] = ()) -> Source:
    """`source` with only a few labels; all others are hidden (-1).

    Args:
        spec: either a share of each class such as `10%` (at least one picture per class; draws
            depend only on `seed` and a picture's name, whatever else the set holds), or a text file
            with one labelled picture per line: its path in the set or its file name, as in SimCLR's
            lists for ImageNet. After a tab its class may follow, as a check.
        held: paths of pictures held out for evaluation; a list may name them, without effect.

    Raises:
        ClsaError: if `spec` has another form, the file cannot be read, a name is not that of
            exactly one labelled picture, a class differs from the set's, or no picture has a label.
    """
    labelled = np.flatnonzero(source.labels >= 0)
    if not len(labelled):
        why = "none of the pictures has a label"
        hint = "give class folders or a list with labels, or leave the option out"
        raise ClsaError(f"labels {spec}", why, hint)
    percent = _percent(spec)
    if percent is not None:
        if not 0 < percent <= 100:
            raise ClsaError(f"labels {spec}", "out of range", "give up to 100%, such as 10%")
        chosen = _balanced(source, labelled, percent / 100, seed)
    else:
        chosen = _listed(source, spec, held)
    few = copy.copy(source)
    few.labels = np.full_like(source.labels, -1)
    few.labels[chosen] = source.labels[chosen]
    return few


def _percent(spec: str) -> float | None:
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", spec.strip())
    return float(share[1]) if share else None


def _balanced(
    source: Source, labelled: Int64[np.ndarray, " n"], share: float, seed: int
) -> Int64[np.ndarray, " m"]:
    """max(1, round(share n_c)) pictures of each class: those with the smallest draws by name."""
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


def _lines(spec: str) -> list[tuple[str, str]]:
    """Name and class ("" if not given) from each line of a list."""
    try:
        text = Path(spec).read_text("utf-8-sig", errors="surrogateescape")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "neither a share nor a file"
        hint = "give a share of each class such as 10%, or a text file with one picture per line"
        raise ClsaError(f"labels {spec}", why, hint, Exit.NO_INPUT) from None
    parts = [line.strip().partition("\t") for line in text.split("\n") if line.strip()]
    return [(name.strip(), label.strip()) for name, _, label in parts]


def _listed(source: Source, spec: str, held: Iterable[str]) -> Int64[np.ndarray, " m"]:
    lines = _lines(spec)
    paths: dict[str, int] = {}
    files: dict[str, list[int]] = {name: [] for name, _ in lines}
    unknown: set[str] = set()
    everything = itertools.chain(enumerate(source.ids), ((HELD, name) for name in held))
    for i, name in everything:
        matches = {name, os.path.basename(name)} & files.keys()
        if i != HELD and source.labels[i] < 0:
            unknown |= matches
            continue
        if name in matches:
            paths[name] = i
        for each in matches:
            files[each].append(i)
    chosen, wrong = [], {}
    for name, label in lines:
        found = [paths[name]] if name in paths else files[name]  # a path before a file name
        if not found:
            wrong[name] = "has no label in the set" if name in unknown else "not in the set"
        elif len(found) > 1:
            wrong[name] = "several pictures have this name"
        elif found[0] != HELD and label not in ("", source.classes[source.labels[found[0]]]):
            wrong[name] = "has another class in the set"
        else:
            chosen.append(found[0])
    if wrong:
        first, why = next(iter(wrong.items()))
        count = Counter(wrong.values())[why]
        hint = "write each path and class as in the set, one per line"
        raise ClsaError(f"labels {spec}: {first}", f"{why} ({count} such lines)", hint)
    rows = np.unique([i for i in chosen if i != HELD]).astype(np.int64)
    if not len(rows):
        why = "evaluation holds out all its pictures" if chosen else "the file names no picture"
        raise ClsaError(f"labels {spec}", why, "name more pictures, one per line")
    return rows


def num_held(spec: str, held: Iterable[str]) -> int:
    """How many lines of a list name pictures held out for evaluation; 0 for a share."""
    if _percent(spec) is not None:
        return 0
    names = {form for name in held for form in (name, os.path.basename(name))}
    return sum(name in names for name, _ in _lines(spec))


def describe_labels(source: Source, held: int = 0) -> str:
    """Say how many labels there are; `held`: how many lines of the list name held-out pictures."""
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    single = int((counts == 1).sum())
    text = f"labels: {counts.sum()} pictures of {(counts > 0).sum()} classes"
    text += f", {single} of which have a single one" if single else ""
    return f"{text}; held out for evaluation: {held} more of the list" if held else text


class Stratified(Companions):
    """Adds labelled pictures to each batch: some classes, and some pictures of each (SuNCEt).

    A step draws its classes, and the pictures of each class, without replacement. A class with
    fewer than `per_class` pictures repeats them in turn. Repeated pictures get different views.
    Everything is a function of (seed, step). Rows of one class are adjacent.

    Args:
        labels: classes of all pictures, -1 unknown.
        classes: number of classes per step; all classes if there are fewer.
        per_class: pictures per class.
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

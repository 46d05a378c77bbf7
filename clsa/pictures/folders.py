"""A folder of pictures: which of its folders are splits, which are classes, and that in words."""

import os
import re
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np

from clsa.pictures.arrays import numbered
from clsa.pictures.listing import LeftOut, list_images
from clsa.pictures.named_sets import Split
from clsa.pictures.sources import Folder, Source

TRAIN = ("train", "training", "seg_train")
VAL = ("val", "valid", "validation", "dev", "test", "testing", "seg_test")
"""Names of the folder to evaluate on, in any case; the first of these that exists is taken."""
MAX_NAMED = 6


class Halves(NamedTuple):
    """The folders of a set that has splits."""

    train: str
    val: str
    others: list[str]
    """Names of the folders beside them, which are not read."""


def halves(spec: str) -> Halves | None:
    """The splits of the folder `spec`; None if it has none.

    A set has splits if one folder is called like training pictures and another like pictures to
    evaluate on: train/ and val/, Training/ and Validation/, seg_train/ and seg_test/.
    """
    try:
        names = sorted(name for name in os.listdir(spec) if os.path.isdir(os.path.join(spec, name)))
    except OSError:
        return None
    lower = {name.lower(): name for name in reversed(names)}
    train = next((lower[name] for name in TRAIN if name in lower), None)
    val = next((lower[name] for name in VAL if name in lower), None)
    if train is None or val is None:
        return None
    others = [name for name in names if name not in (train, val) and not name.startswith(".")]
    return Halves(train, val, others)


def open_folder(root: str, split: Split) -> Folder:
    """The pictures below `root`. Labels are the subfolders that hold pictures, at least two.

    If there is only one, without pictures beside it, its subfolders are looked at instead, and so
    on (images/CLASS). One subfolder alone is a class only in pictures to evaluate on, which need
    not show all classes. Pictures beside class folders have label -1.
    """
    ids, sizes, folders, owners, left = list_images(root)
    used = set(np.flatnonzero(np.bincount(owners, minlength=len(folders))).tolist())
    parts = [folder.split(os.sep) if folder else [] for folder in folders]
    depth, classes = 0, _classes(parts, used, 0)
    while len(classes) == 1 and all(len(parts[k]) > depth + 1 for k in used):
        depth += 1
        classes = _classes(parts, used, depth)
    if len(classes) < 2:
        depth, classes = 0, _classes(parts, used, 0) if split == "val" else []
    named = [part[depth] if len(part) > depth else "" for part in parts]
    labels, classes = numbered(named, classes)
    source = Folder(root, ids, labels[owners], classes, sizes)
    above = os.sep.join(parts[max(used)][:depth]) if depth else ""
    source.taken = (*([f"classes are the folders of {above}/"] if above else []), *_words(left))
    return source


def describe(source: Source) -> list[str]:
    """What was taken, in lines for the user: count, formats, classes; links, files left out.

    Formats are those that the names end in; sets in memory have none.
    """
    endings = Counter(
        os.fsdecode(ending).lower()
        for ending in re.findall(rb"\.([A-Za-z0-9]{1,5})(?:\0|$)", source.ids.joined)
    )
    formats = f" ({_counted(endings)})" if endings else ""
    known = int((source.labels >= 0).sum())
    if source.classes:
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        named = _counted(Counter(dict(zip(source.classes, counts.tolist(), strict=True))))
        classes = f"{len(source.classes)} classes: {named}"
        classes = classes.replace("1 classes", "1 class") if len(source.classes) == 1 else classes
        rest = len(source) - known
        classes += f"; {rest:,} without a class" if rest else ""
    else:
        classes = "no classes"
    return [f"{len(source):,} pictures{formats}, {classes}", *source.taken]


def tell(source: Source, what: str) -> None:
    """Print on stderr what was taken, each line after the word `what`."""
    for line in describe(source):
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        print(f"{what}: {text}", file=sys.stderr)


def told_splits(spec: str, split: Split) -> tuple[str, ...]:
    """Which folder of a set with splits was taken, and which were not read."""
    found = halves(spec)
    if found is None:
        return ()
    taken, other = found[:2] if split == "train" else found[1::-1]
    use = "to evaluate on" if split == "train" else "to learn from"
    beside = [f"not read: {_few([f'{name}/' for name in found.others])}"] if found.others else []
    return ("; ".join([f"from {taken}/; {other}/ is {use}", *beside]),)


def _classes(parts: list[list[str]], used: set[int], depth: int) -> list[str]:
    """Names of the folders at `depth` that hold pictures, in the order of their bytes."""
    names = {parts[k][depth] for k in used if len(parts[k]) > depth}
    return sorted(names, key=os.fsencode)


def _words(left: LeftOut) -> list[str]:
    words = []
    if left.endings:
        named = Counter({ending or "no ending": count for ending, count in left.endings.items()})
        words.append(f"left out, no pictures by their endings: {_counted(named)}")
    if left.hidden:
        words.append(f"left out, hidden files and folders: {left.hidden:,}")
    if left.system:
        words.append(f"left out, system folders: {_few(left.system)}")
    if left.followed:
        words.append(f"links followed: {_few(left.followed)}")
    if left.passed:
        words.append(f"links passed over, their folders are listed anyway: {_few(left.passed)}")
    if any(ending in left.endings for ending in (".heic", ".heif")):
        words.append("HEIC pictures are not read: convert them to JPEG, for example")
    return words


def _counted(counts: Counter[str]) -> str:
    """The largest counts, as `jpg 12, png 3, 4 more (9)`."""
    order = list(counts.items()) if len(counts) <= MAX_NAMED else counts.most_common()
    named = [f"{name} {count:,}" for name, count in order[:MAX_NAMED]]
    rest = [count for _, count in order[MAX_NAMED:]]
    return ", ".join([*named, *([f"{len(rest)} more ({sum(rest):,})"] if rest else [])])


def _few(names: list[str]) -> str:
    more = [f"{len(names) - MAX_NAMED} more"] if len(names) > MAX_NAMED else []
    return ", ".join([*names[:MAX_NAMED], *more])


def half_of(spec: str, split: Split) -> str:
    """The folder that holds `split` of the folder `spec`; `spec` itself if it has no splits."""
    found = halves(spec)
    if found is None:
        return spec
    return os.path.join(spec, found.train if split == "train" else found.val)

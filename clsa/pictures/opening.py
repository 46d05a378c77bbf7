"""Opens what `--data` names as a source: a folder, list, array file or known data set."""

import os
from pathlib import Path

import numpy as np

from clsa.options.config import nearest
from clsa.options.run import DataOptions
from clsa.pictures.arrays import ARRAYS, has_splits, numbered, open_arrays
from clsa.pictures.folders import MAX_NAMED, half_of, halves, open_folder, told_splits
from clsa.pictures.listing import SUFFIXES
from clsa.pictures.lists import LISTS, class_order, read_list, read_text
from clsa.pictures.named_sets import NAMED, Split
from clsa.pictures.shards import open_shards
from clsa.pictures.sources import Folder, Pictures, Source
from clsa.system.errors import ClsaError, Exit


def open_source(spec: str, split: Split, options: DataOptions) -> Source:
    """Open the pictures that `spec` names (see `DataOptions.data`), in an order that never changes.

    `split` selects one half of sets that have two (named sets; folders with splits, see
    `folders.halves`); for other sets it is ignored. `options.class_list` selects and
    orders the classes of both splits. Then `options.num_images` shortens `train`.

    Raises:
        ClsaError: 66 if there is nothing to read, 65 if a file is damaged, 2 for a wrong value.
    """
    source = _open(spec, split)
    if options.value_range is not None:
        source.scale_from(options.value_range)
    taken = source.taken
    if options.class_list is not None:
        source = _selected(source, options.class_list, split)
    if split == "train" and options.num_images is not None:
        source = source.subset(np.arange(min(options.num_images, len(source))))
    if not len(source):
        of = f" of the classes in {options.class_list}" if options.class_list else ""
        hint = f"add pictures ({' '.join(SUFFIXES)})"
        why = f"holds no pictures{of}" + "".join(f"; {words}" for words in taken)
        raise ClsaError(spec, why, hint, Exit.NO_INPUT)
    source.taken = (*told_splits(spec, split), *taken)
    return source


def open_val(options: DataOptions, classes: list[str]) -> Source | None:
    """Open the pictures to evaluate on: `options.val`, or else the test split of the training set.

    None if there is neither. Labels are positions in `classes`, the classes of the training
    pictures; -1 for any other class. If `classes` is empty (unlabelled training pictures), the
    opened set keeps its own classes.
    """
    spec = val_of(options)
    if spec is None:
        return None
    source = open_source(spec, "val", options)
    alone = len(source.classes) < 2  # one class cannot be learned
    if not (classes or alone):
        return source
    taken = source.taken
    unknown = [name for name in source.classes if name not in classes] if classes else []
    source = source.with_classes(classes)
    if unknown:
        told = f"not judged, {int((source.labels < 0).sum()):,} pictures of classes that training "
        taken += (f"{told}pictures lack: {', '.join(unknown[:MAX_NAMED])}",)
    source.taken = taken
    return source


def val_of(options: DataOptions) -> str | None:
    """The spec of the pictures to evaluate on; None if there is no separate set of them."""
    path = options.data
    own = _name(path) in NAMED or halves(path) is not None or has_splits(Path(path))
    return options.val or (options.data if own else None)


def _name(spec: str) -> str:
    return spec.partition(":")[0]


def _open(spec: str, split: Split) -> Source:
    name, _, path = spec.partition(":")
    if name in NAMED:
        return Pictures(*NAMED[name](path, split))
    if os.path.isdir(spec):
        root = half_of(spec, split)
        packed = open_shards(root)
        return open_folder(root, split) if packed is None else packed
    suffix = Path(spec).suffix.lower()
    if os.path.exists(spec) and suffix in LISTS:
        return _list(Path(spec))
    if os.path.exists(spec) and suffix in ARRAYS:
        return open_arrays(Path(spec), split)
    forms = f"a folder (packed or not), a list (.txt, .csv), an .npz, or one of {', '.join(NAMED)}"
    if not spec:
        raise ClsaError("no pictures given", "the data option is empty", f"give {forms}")
    if os.path.exists(spec):
        hint = "its folder" if suffix in SUFFIXES else forms
        raise ClsaError(spec, "a single file, neither a list nor an array file", f"give {hint}")
    close = nearest(name, list(NAMED))
    hint = f"did you mean {close}?" if close else f"give {forms}"
    raise ClsaError(spec, "no such folder, file or data set", hint, Exit.NO_INPUT)


def _list(path: Path) -> Folder:
    """The pictures that a list file names; labels are the classes of the set."""
    ids, names = read_list(path)
    classes = class_order({name for name in names if name})
    return Folder(str(path.parent), ids, *numbered(names, classes))


def _selected(source: Source, path: Path, split: Split) -> Source:
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    wanted = list(dict.fromkeys(lines))
    unknown = next((name for name in wanted if name not in source.classes), None)
    if unknown is not None and split == "train":  # a test split may lack some classes
        close = nearest(unknown, source.classes)
        hint = f"did you mean {close}?" if close else "name class folders of the set"
        raise ClsaError(f"{path}: {unknown}", "no such class in the set", hint)
    source = source.with_classes(wanted)
    return source.subset(np.flatnonzero(source.labels >= 0))

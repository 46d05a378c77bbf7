"""Opens what `--data` names as a source: a folder, list, array file or known data set."""

import os
from pathlib import Path

import numpy as np

from clsa.options.config import nearest
from clsa.options.run import DataOptions
from clsa.pictures.arrays import ARRAYS, has_splits, numbered, open_arrays
from clsa.pictures.listing import SUFFIXES, list_images
from clsa.pictures.lists import LISTS, class_order, read_list, read_text
from clsa.pictures.named_sets import NAMED, Split
from clsa.pictures.shards import open_shards
from clsa.pictures.sources import Folder, Pictures, Source
from clsa.system.errors import ClsaError, Exit


def open_source(spec: str, split: Split, options: DataOptions) -> Source:
    """Open the pictures that `spec` names (see `DataOptions.data`), in an order that never changes.

    `split` selects one half of sets that have two (named sets; folders with `train` and `val`); for
    other sets it is ignored. `options.class_list` selects and orders the classes of both splits.
    Then `options.num_images` shortens `train`.

    Raises:
        ClsaError: 66 if there is nothing to read, 65 if a file is damaged, 2 for a wrong value.
    """
    source = _open(spec, split)
    if options.class_list is not None:
        source = _selected(source, options.class_list, split)
    if split == "train" and options.num_images is not None:
        source = source.subset(np.arange(min(options.num_images, len(source))))
    if not len(source):
        of = f" of the classes in {options.class_list}" if options.class_list else ""
        hint = f"add pictures ({' '.join(SUFFIXES)}; links to folders are not followed)"
        raise ClsaError(spec, f"holds no pictures{of}", hint, Exit.NO_INPUT)
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
    return source.with_classes(classes) if classes else source


def val_of(options: DataOptions) -> str | None:
    """The spec of the pictures to evaluate on; None if there is no separate set of them."""
    path = options.data
    own = _name(path) in NAMED or _has_splits(path) or has_splits(Path(path))
    return options.val or (options.data if own else None)


def _name(spec: str) -> str:
    return spec.partition(":")[0]


def _open(spec: str, split: Split) -> Source:
    name, _, path = spec.partition(":")
    if name in NAMED:
        return Pictures(*NAMED[name](path, split))
    if os.path.isdir(spec):
        root = os.path.join(spec, split) if _has_splits(spec) else spec
        packed = open_shards(root)
        return _folder(root) if packed is None else packed
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


def _has_splits(spec: str) -> bool:
    return all(os.path.isdir(os.path.join(spec, split)) for split in ("train", "val"))


def _folder(root: str) -> Folder:
    """Label = first-level subfolder, if at least two of them contain images; else all are -1.

    Images directly in `root`, next to such subfolders, have label -1.
    """
    ids, sizes, folders, owners = list_images(root)
    tops = [folder.partition(os.sep)[0] for folder in folders]
    used = np.flatnonzero(np.bincount(owners, minlength=len(folders))).tolist()
    classes = sorted({tops[folder] for folder in used} - {""}, key=os.fsencode)
    labels, classes = numbered(tops, classes if len(classes) > 1 else [])
    return Folder(root, ids, labels[owners], classes, sizes)


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

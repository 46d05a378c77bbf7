"""Opens what `--data` names as a source: a folder, list, array file or known data set."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy.lib.npyio import NpzFile

from clsa.options.config import nearest
from clsa.options.run import DataOptions
from clsa.pictures.listing import SUFFIXES, list_images
from clsa.pictures.named_sets import NAMED, Split
from clsa.pictures.shards import open_shards
from clsa.pictures.sources import Folder, Pictures, Source
from clsa.system.errors import ClsaError, Exit, first_line


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
    own = _name(options.data) in NAMED or _has_splits(options.data)
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
    if os.path.exists(spec) and suffix in (".txt", ".npz"):
        return _list(Path(spec)) if suffix == ".txt" else _npz(Path(spec))
    forms = f"a folder (packed or not), a .txt list, an .npz, or one of {', '.join(NAMED)}"
    if not spec:
        raise ClsaError("no pictures given", "the data option is empty", f"give {forms}")
    if os.path.exists(spec):
        hint = "its folder" if suffix in SUFFIXES else forms
        raise ClsaError(spec, "a single file, neither .txt nor .npz", f"give {hint}")
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
    labels, classes = _numbered(tops, classes if len(classes) > 1 else [])
    return Folder(root, ids, labels[owners], classes, sizes)


def _list(path: Path) -> Folder:
    """Lines of `PATH`, `PATH<tab>LABEL` or `PATH LABEL`, relative to the folder of the list."""
    ids, names = [], []
    text = _text(path)
    if "\0" in text:
        raise ClsaError(str(path), "holds a zero byte, so it is not text", "give one path per line")
    for line in filter(None, map(str.strip, text.split("\n"))):
        name, label = line, ""
        if "\t" in line:
            name, label = line.rsplit("\t", 1)
        elif " " in line and not line.lower().endswith(SUFFIXES):
            name, label = line.rsplit(" ", 1)
        ids.append(name.strip())
        names.append(label.strip())
    known = {name for name in names if name}
    numeric = all(name.removeprefix("-").isdecimal() for name in known)
    classes = sorted(known, key=int if numeric else os.fsencode)
    if numeric:
        classes = [name for name in classes if int(name) >= 0]
    return Folder(str(path.parent), ids, *_numbered(names, classes))


def _npz(path: Path) -> Pictures:
    """Arrays `images`, `x` or `arr_0` (N,H,W[,C]) uint8; labels in `labels` or `y` if present."""
    try:
        with open(path, "rb") as file, NpzFile(file, allow_pickle=False) as arrays:
            key = next((key for key in ("images", "x", "arr_0") if key in arrays), None)
            if key is None:
                why = f"no array `images`, `x` or `arr_0` (found: {', '.join(arrays) or 'none'})"
                raise ClsaError(str(path), why, "np.savez(path, images=..., labels=...)")
            images = np.asarray(arrays[key])  # bytes if the member is not an array
            values = next((arrays[key] for key in ("labels", "y") if key in arrays), None)
            values = None if values is None else np.asarray(values)
    except OSError as error:
        why = error.strerror or str(error)
        raise ClsaError(str(path), why, "make it readable", Exit.NO_INPUT) from None
    except ClsaError:
        raise
    except Exception as error:  # zipfile and NumPy raise nearly anything on hostile bytes
        why = first_line(error)
        if "Object arrays" in why:
            raise ClsaError(str(path), why, "save plain uint8 arrays with np.savez") from None
        raise ClsaError(str(path), f"damaged: {why}", "save it again", Exit.BAD_DATA) from None
    fits = images.ndim >= 3 and images.shape[3:] in ((), (1,), (3,))
    if images.dtype != np.uint8 or not fits:
        why = f"`{key}` is {images.dtype} {images.shape}"
        raise ClsaError(str(path), why, "save uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
    images = images[..., None] if images.ndim == 3 else images
    if values is None:
        return Pictures(images, np.full(len(images), -1, np.int64), [])
    if values.dtype.kind not in "iuU" or values.shape != (len(images),):
        why = f"labels are {values.dtype} {values.shape} for {len(images)} pictures"
        raise ClsaError(str(path), why, "save one integer or name for each picture")
    known = [value for value in np.unique(values).tolist() if isinstance(value, str) or value >= 0]
    names = [str(value) for value in values.tolist()]
    return Pictures(images, *_numbered(names, [str(value) for value in known]))


def _numbered(names: list[str], classes: list[str]) -> tuple[Int64[np.ndarray, " N"], list[str]]:
    """Position of each name in `classes` (-1 if not in it), and `classes`."""
    position = {name: k for k, name in enumerate(classes)}
    return np.array([position.get(name, -1) for name in names], np.int64), classes


def _selected(source: Source, path: Path, split: Split) -> Source:
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    wanted = list(dict.fromkeys(lines))
    unknown = next((name for name in wanted if name not in source.classes), None)
    if unknown is not None and split == "train":  # a test split may lack some classes
        close = nearest(unknown, source.classes)
        hint = f"did you mean {close}?" if close else "name class folders of the set"
        raise ClsaError(f"{path}: {unknown}", "no such class in the set", hint)
    source = source.with_classes(wanted)
    return source.subset(np.flatnonzero(source.labels >= 0))


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="surrogateescape")
    except OSError as error:
        why = error.strerror or str(error)
        raise ClsaError(str(path), why, "check the path", Exit.NO_INPUT) from None

"""Array files: pictures of one size and their labels in an .npz, or pictures alone in an .npy."""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Int64
from numpy.lib.npyio import NpzFile

from clsa.pictures.lists import class_order
from clsa.pictures.named_sets import Split
from clsa.pictures.sources import Pictures
from clsa.system.errors import ClsaError, Exit, first_line

ARRAYS = (".npz", ".npy")
WHOLE = {"images": "labels", "x": "y", "arr_0": "labels", "data": "labels", "imgs": "labels"}
"""Names of an array of pictures that has no split, and of the labels that belong to it."""
HALVES = {
    "train": {"x_train": "y_train", "train_images": "train_labels", "X_train": "y_train"},
    "val": {
        **{"x_val": "y_val", "val_images": "val_labels", "X_val": "y_val"},
        **{"x_test": "y_test", "test_images": "test_labels", "X_test": "y_test"},
    },
}
"""The same for files that hold both splits. Validation pictures are taken before test pictures."""


def open_arrays(path: Path, split: Split) -> Pictures:
    """The pictures of an array file: (N, H, W), (N, H, W, 1) or (N, H, W, 3).

    uint8 is taken as it is, bool and floats from 0 to 1 are scaled by 255 and rounded. Labels are
    whole numbers (negative: unknown) or names, one for each picture, as (N,) or (N, 1).

    Raises:
        ClsaError: 66 or 65 if it cannot be read, 2 for arrays of other names or forms.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".npy":
                key, images, values = "array", np.load(file, allow_pickle=False), None
            else:
                with NpzFile(file, allow_pickle=False) as arrays:
                    key, images, values = _chosen(path, arrays, split)
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
    images = _as_bytes(path, key, images)
    if values is None:
        return Pictures(images, np.full(len(images), -1, np.int64), [])
    return Pictures(images, *_labels(path, values, len(images)))


def has_splits(path: Path) -> bool:
    """Whether an .npz holds pictures for training and others for evaluation."""
    if path.suffix.lower() != ".npz":
        return False
    try:
        with open(path, "rb") as file, NpzFile(file, allow_pickle=False) as arrays:
            return all(any(key in arrays for key in half) for half in HALVES.values())
    except Exception:  # what is wrong with it is said when it is opened
        return False


def numbered(names: Iterable[str], classes: list[str]) -> tuple[Int64[np.ndarray, " N"], list[str]]:
    """Position of each name in `classes` (-1 if not in it), and `classes`."""
    position = {name: k for k, name in enumerate(classes)}
    return np.array([position.get(name, -1) for name in names], np.int64), classes


def _chosen(path: Path, arrays: NpzFile, split: Split) -> tuple[str, np.ndarray, np.ndarray | None]:
    """The name of the array of pictures, its content and that of its labels."""
    known = {**WHOLE, **HALVES[split], **HALVES["train"]}
    key = next((key for key in known if key in arrays), None)
    if key is None:
        why = f"no array `images` or `x_train` (found: {', '.join(arrays) or 'none'})"
        raise ClsaError(str(path), why, "np.savez(path, images=..., labels=...)")
    names = (known[key], "labels", "y") if key in WHOLE else (known[key],)
    values = next((np.asarray(arrays[name]) for name in names if name in arrays), None)
    return key, np.asarray(arrays[key]), values  # bytes if the member is not an array


def _as_bytes(path: Path, key: str, images: np.ndarray) -> np.ndarray:
    """Pictures as uint8 (N, H, W, C)."""
    if images.ndim < 3 or images.shape[3:] not in ((), (1,), (3,)):
        why = f"`{key}` is {images.dtype} {images.shape}"
        raise ClsaError(str(path), why, "save uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype == np.uint8:
        return images
    if images.dtype == np.bool_:
        return images.view(np.uint8) * np.uint8(255)
    if images.dtype.kind == "f":
        low, high = float(images.min(initial=0)), float(images.max(initial=0))
        if low >= 0 and high <= 1:
            parts = [np.rint(image.astype(np.float32) * 255).astype(np.uint8) for image in images]
            return np.stack(parts) if parts else images.astype(np.uint8)
        why = f"`{key}` is {images.dtype} from {low:g} to {high:g}"
    else:
        why = f"`{key}` is {images.dtype} {images.shape}"
    raise ClsaError(str(path), why, "save uint8 from 0 to 255, or floats from 0 to 1")


def _labels(
    path: Path, values: np.ndarray, count: int
) -> tuple[Int64[np.ndarray, " N"], list[str]]:
    flat = values[:, 0] if getattr(values, "ndim", 0) == 2 and values.shape[1:] == (1,) else values
    if flat.dtype.kind not in "biuU" or flat.shape != (count,):
        why = f"labels are {values.dtype} {values.shape} for {count} pictures"
        raise ClsaError(str(path), why, "save one integer or name for each picture")
    flat = flat.astype(np.int64) if flat.dtype.kind == "b" else flat
    if flat.dtype.kind == "U":
        names = cast(list[str], flat.tolist())
        return numbered(names, sorted(set(names)))
    names = [str(value) for value in flat.tolist()]
    return numbered(names, class_order(set(names)))

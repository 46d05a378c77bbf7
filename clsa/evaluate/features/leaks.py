"""Find evaluation pictures that the encoder was pretrained on: exact copies, near duplicates."""

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from clsa.loading.crops import whole
from clsa.loading.loader import eval_crops
from clsa.pictures.sources import Source
from clsa.system import files
from clsa.system.errors import ClsaError

SIDE = 16
NEAR = 0.98
MIN_DEVIATION = 2.0
LIMIT = 50_000
CHUNK, MAX_NAMED = 1 << 12, 3


class Leaks(NamedTuple):
    """Which evaluation pictures are also pretraining pictures; one entry per evaluation picture."""

    exact: Bool[np.ndarray, "n"]
    """The thumbnails of side 16 are equal."""
    near: Bool[np.ndarray, "n"]
    """The thumbnails are not equal, but too similar to show different pictures."""
    twins: Int64[np.ndarray, "n"]
    """Number of the most similar pretraining picture."""

    @property
    def count(self) -> int:
        """Number of exact copies and near duplicates."""
        return int(self.exact.sum() + self.near.sum())


def find_leaks(pretraining: UInt8[Tensor, "N d"], judged: UInt8[Tensor, "n d"]) -> Leaks:
    """Compare thumbnails; pictures are near duplicates if the correlation is at least 0.98.

    The correlation is over all pixels and colours, so brightness, contrast, size and compression
    hardly matter. A mirrored, cropped or rotated copy is not found. Measured on the 667 drawings of
    the embedded test split: copies as JPEGs of quality 50 correlate by at least 0.987, at half the
    size by 0.992, and with less light and contrast by 0.999. Drawings of the training split, which
    has no near duplicates of test drawings, correlate by at most 0.965. Thumbnails of nearly one
    colour (deviation under 2 of 255) are compared for equality only.
    """
    bank, queries = _centred(pretraining), _centred(judged)
    twins, best = [], []
    for part in queries.split(CHUNK):
        tops = [(part @ rows.T).max(1) for rows in bank.split(CHUNK * 4)]
        values = torch.stack([top.values for top in tops])
        block = values.argmax(0)
        place = torch.stack([top.indices for top in tops]).gather(0, block[None])[0]
        best.append(values.max(0).values)
        twins.append(place + block * CHUNK * 4)
    known = {row.tobytes(): place for place, row in enumerate(pretraining.numpy())}
    same = np.array([known.get(row.tobytes(), -1) for row in judged.numpy()], np.int64)
    exact = (same >= 0) & judged.numpy().any(1)
    near = (torch.cat(best) >= NEAR).numpy() & ~exact
    return Leaks(exact, near, np.where(exact, same, torch.cat(twins).numpy()))


def _centred(thumbnails: UInt8[Tensor, "n d"]) -> Float32[Tensor, "n d"]:
    """Rows of length 1 without the mean of each colour; zeros if nearly nothing is left."""
    rows = thumbnails.float().view(len(thumbnails), 3, -1)
    rows = (rows - rows.mean(2, keepdim=True)).flatten(1)
    flat = rows.square().mean(1, keepdim=True).sqrt() < MIN_DEVIATION
    return torch.nn.functional.normalize(rows, dim=1).masked_fill(flat, 0)


def thumbnails(source: Source) -> UInt8[Tensor, "n d"]:
    """Every whole picture at 16 x 16 pixels, as one row each; zeros if it cannot be read."""
    rows = np.arange(len(source), dtype=np.int64)
    found = torch.zeros(len(source), 3 * SIDE * SIDE, dtype=torch.uint8)
    for numbers, images in eval_crops(source, rows, SIDE, whole, torch.device("cpu")):
        found[torch.from_numpy(numbers)] = images.round().byte().flatten(1)
    return found


def remembered(source: Source, path: Path) -> UInt8[Tensor, "n d"]:
    """`thumbnails`, kept in a file with the set's digest, so that a run makes them only once."""
    wanted = hashlib.sha256(source.digest().encode()).digest()
    try:
        kept = np.load(path, allow_pickle=False)
        if kept.dtype == np.uint8 and kept[0, : len(wanted)].tobytes() == wanted:
            return torch.from_numpy(kept[1:])
    except (OSError, ValueError, IndexError):
        pass
    found = thumbnails(source)
    head = torch.zeros(1, found.shape[1], dtype=torch.uint8)
    head[0, : len(wanted)] = torch.from_numpy(np.frombuffer(wanted, np.uint8).copy())
    with contextlib.suppress(ClsaError):  # the file is only a cache
        files.write_atomic(path, lambda file: np.save(file, torch.cat([head, found]).numpy()))
    return found


def warn_of_leaks(leaks: Leaks, judged: Source, pretraining: Source) -> None:
    """Warn how many evaluation pictures the run learned from, and name some of them."""
    if not leaks.count:
        return
    rows = np.flatnonzero(leaks.exact | leaks.near)[:MAX_NAMED].tolist()
    pairs = [f"{judged.ids[i]} = {pretraining.ids[int(leaks.twins[i])]}" for i in rows]
    logging.getLogger("clsa").warning(
        "warning: %d of %d evaluation pictures were pretrained on (%d exact copies, %d near "
        "duplicates; %s%s): accuracy on them is optimistic",
        leaks.count, len(judged), leaks.exact.sum(), leaks.near.sum(), ", ".join(pairs),
        ", ..." if leaks.count > len(rows) else "",
    )  # fmt: skip

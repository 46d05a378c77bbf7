"""Evaluation pictures that the encoder was pretrained on: exact copies and near duplicates."""

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
    """Which evaluation pictures stand among the pretraining pictures, in the first's order."""

    exact: Bool[np.ndarray, "n"]
    """The same pixels, at a side of 16."""
    near: Bool[np.ndarray, "n"]
    """Not exact, but too alike to be another picture."""
    twins: Int64[np.ndarray, "n"]
    """The pretraining picture most like each."""

    @property
    def count(self) -> int:
        """Exact and near ones."""
        return int(self.exact.sum() + self.near.sum())


def find_leaks(pretraining: UInt8[Tensor, "N d"], judged: UInt8[Tensor, "n d"]) -> Leaks:
    """Compare thumbnails: near where their correlation is at least 0.98.

    The correlation is that of all pixels and colours, so that brightness, contrast, size and
    compression hardly matter; a mirrored, cropped or turned copy goes unseen. Measured on the 667
    drawings of the embedded test split: their copies as JPEGs of quality 50 correlate by 0.987 and
    more, at half the size by 0.992, with less light and contrast by 0.999; no drawing of the
    training split, from which near duplicates were kept away, by more than 0.965. Thumbnails of
    nearly one colour (deviation under 2 of 255) are compared for equality only.
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
    """Rows without the mean of each colour, of length 1; zeros where nearly nothing is left."""
    rows = thumbnails.float().view(len(thumbnails), 3, -1)
    rows = (rows - rows.mean(2, keepdim=True)).flatten(1)
    flat = rows.square().mean(1, keepdim=True).sqrt() < MIN_DEVIATION
    return torch.nn.functional.normalize(rows, dim=1).masked_fill(flat, 0)


def thumbnails(source: Source) -> UInt8[Tensor, "n d"]:
    """Every picture, whole, at 16 x 16 pixels; a row each, zeros where it cannot be read."""
    rows = np.arange(len(source), dtype=np.int64)
    found = torch.zeros(len(source), 3 * SIDE * SIDE, dtype=torch.uint8)
    for numbers, images in eval_crops(source, rows, SIDE, whole, torch.device("cpu")):
        found[torch.from_numpy(numbers)] = images.round().byte().flatten(1)
    return found


def remembered(source: Source, path: Path) -> UInt8[Tensor, "n d"]:
    """`thumbnails`, kept in a file under the set's digest, so that they are made once a run."""
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
    with contextlib.suppress(ClsaError):  # it is only remembered
        files.write_atomic(path, lambda file: np.save(file, torch.cat([head, found]).numpy()))
    return found


def warn_of_leaks(leaks: Leaks, judged: Source, pretraining: Source) -> None:
    """Say how many evaluation pictures the run learned from, and name some."""
    if not leaks.count:
        return
    rows = np.flatnonzero(leaks.exact | leaks.near)[:MAX_NAMED].tolist()
    pairs = [f"{judged.ids[i]} = {pretraining.ids[int(leaks.twins[i])]}" for i in rows]
    logging.getLogger("clsa").warning(
        "warning: %d of %d evaluation pictures were pretrained on (%d exact copies, %d near "
        "duplicates; %s%s): accuracy on them flatters",
        leaks.count, len(judged), leaks.exact.sum(), leaks.near.sum(), ", ".join(pairs),
        ", ..." if leaks.count > len(rows) else "",
    )  # fmt: skip

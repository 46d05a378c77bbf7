"""Turns sources into batches of crops, in an order that is a pure function of (seed, epoch).

Small sets live on the device as one uint8 tensor and are cut there. Other sets are decoded and cut
by worker processes. Both ways give the same boxes, the same replacements and, to 1/255, the same
pixels (slightly larger differences if a large JPEG is decoded at a reduced size). The numbers of
workers and processes, and the step at which a run was resumed, change nothing.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from clsa.loading.crops import Crops, Cut, Plan, centre, cut_alone
from clsa.loading.order import Companions, Order, candidates
from clsa.loading.streaming import streamed
from clsa.options.run import DataOptions
from clsa.pictures.decode import DecodeError
from clsa.pictures.quarantine import Quarantine
from clsa.pictures.sources import Pictures, Source
from clsa.system import dist, signals
from clsa.system.errors import ClsaError
from clsa.system.machine import num_cores, upload
from clsa.views.geometry import crop
from clsa.views.specs import ViewSpec

EVAL_CHUNK = 256

Result = TypeVar("Result")


def batches(
    source: Source,
    specs: Sequence[ViewSpec],
    order: Order,
    first_step: int,
    last_step: int,
    device: torch.device,
    options: DataOptions,
    quarantine: Quarantine | None = None,
    companions: Companions | None = None,
) -> Iterator[Crops]:
    """The batches of steps first_step, ..., last_step - 1: this process's contiguous share of each.

    A picture that cannot be read is replaced (`candidates`) and noted in `quarantine`. `index` and
    `drawn` stay those of the original picture; `labels` are those of the replacement.

    Raises:
        ClsaError: 65 if too many pictures cannot be read; 2 if the batch does not divide among the
            processes, or if `resident_limit`, shared memory or the limit on open files is too low;
            74 if a worker fails.
    """
    world = dist.world_size()
    added = companions.count if companions else 0
    for what, count in (("batch_size", order.batch_size), ("pictures added to each batch", added)):
        if count % world:
            why = f"not divisible among {world} processes"
            raise ClsaError(f"{what} {count}", why, f"use a multiple of {world}")
    plan = Plan(source, specs, order, companions, dist.rank(), world)
    quarantine = quarantine or Quarantine(source, limit=options.max_unreadable)
    images = _resident_images(source, options, device, quarantine)
    if images is not None:
        return _resident(plan, images, range(first_step, last_step), quarantine)
    return streamed(plan, range(first_step, last_step), device, options, quarantine)


def _resident_images(
    source: Source, options: DataOptions, device: torch.device, quarantine: Quarantine
) -> UInt8[Tensor, "N 3 H W"] | None:
    """The whole set on the device; None if its sizes differ or it exceeds the limit."""
    size, limit = options.resident_size, options.resident_limit * 2**30
    if isinstance(source, Pictures) and size is None:
        if source.images.size > limit:
            return None
        return torch.from_numpy(np.array(source.images.transpose(0, 3, 1, 2), order="C")).to(device)

    def load(i: int) -> UInt8[Tensor, "3 H W"] | str | None:
        try:
            picture = source.open(i)
            if size is not None:
                return cut_alone(picture, i, size, centre(1.0))
            pixels = torch.from_numpy(picture.pixels()).permute(2, 0, 1)
            # Boxes are drawn on the size before packing, so resized pictures cannot be resident.
            return pixels if pixels.shape[1:] == (picture.height, picture.width) else None
        except DecodeError as error:
            return error.reason

    images = None
    for i, loaded in enumerate(_ahead(load, range(len(source)))):
        if isinstance(loaded, str):
            quarantine.add({i: loaded})
            continue
        if loaded is None:
            return None
        if images is None:
            needed = loaded.numel() * len(source)
            if needed > limit and size is not None:
                what, why = f"resident_size {size}", f"the set takes {needed / 2**30:.1f} GiB"
                raise ClsaError(what, why, f"raise resident_limit ({options.resident_limit} GiB)")
            if needed > limit:
                return None
            images = torch.zeros((len(source), *loaded.shape), dtype=torch.uint8)
        if loaded.shape != images.shape[1:]:
            return None
        images[i] = loaded
    return None if images is None else images.to(device)


def _resident(
    plan: Plan, images: UInt8[Tensor, "N 3 H W"], steps: range, quarantine: Quarantine
) -> Iterator[Crops]:
    height, width = images.shape[2:]
    heights, widths = np.full(plan.count, height), np.full(plan.count, width)
    for step in steps:
        epoch, (index, drawn) = plan.order.epoch(step), plan.rows(step)
        shown = index.copy()
        for row in np.flatnonzero(np.isin(index, list(quarantine.reasons))):
            tried = candidates(plan.order, epoch, int(index[row]))
            good = next((i for i in tried if i not in quarantine.reasons), None)
            if good is None:
                raise quarantine.error()
            shown[row] = good
        chosen = images.index_select(0, upload([shown], images.device)[0]).float()
        cuts = zip(plan.specs, plan.cuts(epoch, drawn, heights, widths), strict=True)
        crops = [crop(chosen, boxes, spec.size, flip) for spec, (boxes, flip) in cuts]
        yield Crops(crops, *map(torch.from_numpy, (index, plan.labels(shown), drawn)))


def eval_images(
    source: Source, rows: Int64[np.ndarray, " n"], size: int, share: float, device: torch.device
) -> Iterator[tuple[Int64[np.ndarray, " b"], Float32[Tensor, "b 3 size size"]]]:
    """`eval_crops` of the centre square whose side is `share` of the short side."""
    return eval_crops(source, rows, size, centre(share), device)


def eval_crops(
    source: Source, rows: Int64[np.ndarray, " n"], size: int, cut: Cut, device: torch.device
) -> Iterator[tuple[Int64[np.ndarray, " b"], Float32[Tensor, "b 3 size size"]]]:
    """One crop of each of these pictures, in order; unreadable pictures are left out.

    Args:
        rows: numbers of pictures in the source.
        size: side of the result in pixels.
        cut: which part of each picture to take.
        device: where the crops are wanted.

    Yields:
        Numbers of the pictures and their crops in [0, 255], at most 256 at a time.

    Raises:
        signals.Asked: if a signal has asked the run to stop (see `signals.check`).
    """
    if isinstance(source, Pictures):
        for start in range(0, len(rows), EVAL_CHUNK):
            signals.check()
            chunk = rows[start : start + EVAL_CHUNK]
            pictures = np.array(source.images[chunk].transpose(0, 3, 1, 2), order="C")
            heights, widths = np.tile(pictures.shape[2:], (len(chunk), 1)).T
            boxes, flips = cut(chunk, heights, widths)
            yield chunk, crop(torch.from_numpy(pictures).to(device), boxes, size, flips)
        return

    def load(i: int) -> UInt8[Tensor, "3 size size"] | None:
        try:
            return cut_alone(source.open(i), i, size, cut)
        except DecodeError:
            return None

    kept: list[int] = []
    crops: list[UInt8[Tensor, "3 size size"]] = []
    for position, (i, loaded) in enumerate(
        zip(rows.tolist(), _ahead(load, rows.tolist()), strict=True)
    ):
        signals.check()
        if loaded is not None:
            kept.append(i)
            crops.append(loaded)
        if kept and (len(kept) == EVAL_CHUNK or position + 1 == len(rows)):
            yield np.array(kept, np.int64), torch.stack(crops).to(device).float().contiguous()
            kept, crops = [], []


def _ahead(function: Callable[[int], Result], items: Iterable[int]) -> Iterator[Result]:
    """`function` of each item, in order; a few threads compute a little ahead."""
    threads = min(8, num_cores())
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

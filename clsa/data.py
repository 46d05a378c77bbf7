"""Sources -> batches of crops, in an order that is a pure function of (seed, epoch).

Small sets live on the device as one uint8 tensor and are cut there; others are decoded and cut by
worker processes. Both ways give the same boxes, the same replacements and, to 1/255, the same
pixels, whatever the number of workers and processes and wherever a run was resumed.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clsa import dist, workers
from clsa.decode import DecodeError
from clsa.errors import ClsaError
from clsa.geometry import centre_boxes, crop, crop_one, upload
from clsa.host import num_cores
from clsa.options import DataOptions
from clsa.order import Order, Quarantine, candidates
from clsa.sources import Pictures, Source
from clsa.views import ViewSpec, crop_params

EVAL_CHUNK = 256
MAX_PENDING_BYTES = 64 << 20
PREFETCH = 2

Result = TypeVar("Result")
Cuts = tuple[Int64[np.ndarray, "b 4"], Bool[np.ndarray, "b"]]
# From numbers, heights and widths of pictures to their boxes and flips.
Cut = Callable[[Int64[np.ndarray, "b"], Int64[np.ndarray, "b"], Int64[np.ndarray, "b"]], Cuts]


class Crops(NamedTuple):
    """This process's share of one global batch."""

    crops: list[Tensor]
    """One (b, 3, s, s) a view, on the device, in [0, 255]: uint8 streamed, float32 resident."""
    index: Int64[Tensor, " b"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """Numbers of the pictures in the source, on the CPU; what the views draw from."""
    labels: Int64[Tensor, " b"]
    """Classes (-1 unknown), on the CPU."""


def batches(
    source: Source,
    specs: Sequence[ViewSpec],
    flip_probability: float,
    order: Order,
    first_step: int,
    last_step: int,
    device: torch.device,
    options: DataOptions,
    quarantine: Quarantine | None = None,
) -> Iterator[Crops]:
    """The batches of steps first_step, ..., last_step - 1: this process's contiguous share of each.

    A picture that cannot be read is replaced (`candidates`) and noted in `quarantine`; `index`, and
    with it the draws of the views, stay those of the original, `labels` are those of the shown one.

    Raises:
        ClsaError: 65 when too many pictures cannot be read; 2 when the batch does not divide among
            the processes, or memory does not hold what was asked for; 74 when a worker fails.
    """
    world = dist.world_size()
    if order.batch_size % world:
        what, why = f"batch_size {order.batch_size}", f"not divisible among {world} processes"
        raise ClsaError(what, why, f"use a multiple of {world}")
    share = order.batch_size // world
    plan = _Plan(source, specs, flip_probability, order, share * dist.rank(), share)
    quarantine = quarantine or Quarantine(source)
    images = _resident_images(source, options, device, quarantine)
    if images is not None:
        return _resident(plan, images, range(first_step, last_step), quarantine)
    return _streamed(plan, range(first_step, last_step), device, options, quarantine)


@dataclass(frozen=True)
class _Plan:
    """What decides a batch, apart from where it is cut."""

    source: Source
    specs: Sequence[ViewSpec]
    flip_probability: float
    order: Order
    start: int
    share: int

    def index(self, step: int) -> Int64[np.ndarray, " b"]:
        return self.order.indices(step)[self.start : self.start + self.share]

    def cuts(
        self,
        epoch: int,
        index: Int64[np.ndarray, " b"],
        heights: Int64[np.ndarray, " b"],
        widths: Int64[np.ndarray, " b"],
    ) -> list[Cuts]:
        """Boxes and flips of each view."""
        drawn = (self.order.seed, epoch, index, heights, widths, self.flip_probability)
        return [crop_params(spec, *drawn) for spec in self.specs]

    def labels(self, shown: Int64[np.ndarray, " b"]) -> Int64[Tensor, " b"]:
        return torch.from_numpy(self.source.labels[shown])


# ---- resident


def _resident_images(
    source: Source, options: DataOptions, device: torch.device, quarantine: Quarantine
) -> UInt8[Tensor, "N 3 H W"] | None:
    """The whole set on the device; None when sizes differ or it exceeds the limit."""
    size, limit = options.resident_size, options.resident_limit * 2**30
    if isinstance(source, Pictures) and size is None:
        if source.images.size > limit:
            return None
        return torch.from_numpy(np.array(source.images.transpose(0, 3, 1, 2), order="C")).to(device)

    def load(i: int) -> UInt8[Tensor, "3 H W"] | str:
        try:
            picture = source.read(i)
        except DecodeError as error:
            return error.reason
        if size is None:
            return torch.from_numpy(picture).permute(2, 0, 1)
        return _cut_one(picture, i, size, _centre(1.0))

    images = None
    for i, loaded in enumerate(_ahead(load, range(len(source)))):
        if isinstance(loaded, str):
            quarantine.add({i: loaded})
            continue
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
    plan: _Plan, images: UInt8[Tensor, "N 3 H W"], steps: range, quarantine: Quarantine
) -> Iterator[Crops]:
    height, width = images.shape[2:]
    heights, widths = np.full(plan.share, height), np.full(plan.share, width)
    for step in steps:
        epoch, index = plan.order.epoch(step), plan.index(step)
        shown = index.copy()
        for row in np.flatnonzero(np.isin(index, list(quarantine.reasons))):
            tried = candidates(plan.order, epoch, int(index[row]))
            good = next((i for i in tried if i not in quarantine.reasons), None)
            if good is None:
                raise quarantine.error()
            shown[row] = good
        chosen = images.index_select(0, upload([shown], images.device)[0]).float()
        cuts = zip(plan.specs, plan.cuts(epoch, index, heights, widths), strict=True)
        crops = [crop(chosen, boxes, spec.size, flip) for spec, (boxes, flip) in cuts]
        yield Crops(crops, torch.from_numpy(index.copy()), plan.labels(shown))


# ---- streamed


def _streamed(
    plan: _Plan, steps: range, device: torch.device, options: DataOptions, quarantine: Quarantine
) -> Iterator[Crops]:
    count = workers.num_workers(options.workers)
    if count:
        pixels = sum(spec.size**2 for spec in plan.specs) * plan.share
        workers.require_shared_memory(3 * pixels * (PREFETCH * count + 1))
    loader = DataLoader(
        _Steps(plan),
        batch_size=None,
        sampler=steps,
        num_workers=count,
        prefetch_factor=PREFETCH if count else None,
        timeout=2 * workers.TIMEOUT_S if count else 0,  # after the worker's own deadline
        worker_init_fn=workers.start,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if count and sys.platform == "linux" else None,
        generator=torch.Generator(),  # its own, so that the caller's draws stay as they are
    )
    with workers.failures():
        stream = iter(loader)
        if count:
            workers.name_deaths()
        for batch, reasons in stream:
            quarantine.add(reasons)
            if batch is None:
                raise quarantine.error()
            crops = [view.to(device, non_blocking=True) for view in batch.crops]
            yield batch._replace(crops=crops)


class _Steps(Dataset):
    """One item a step, so that epochs need no restart of the workers."""

    def __init__(self, plan: _Plan):
        self.plan = plan

    def __getitem__(self, step: int) -> tuple[Crops | None, dict[int, str]]:
        with workers.deadline():
            return self._batch(step)

    def _batch(self, step: int) -> tuple[Crops | None, dict[int, str]]:
        """The cut batch and the reasons of unreadable pictures; no batch when nothing replaces one.

        Pictures are decoded once and cut for all views in groups: few, as a batch of large
        photographs would fill the memory; more than one, as drawing boxes singly costs as much as
        a crop.
        """
        plan = self.plan
        epoch, index = plan.order.epoch(step), plan.index(step)
        crops = [
            torch.empty((plan.share, 3, spec.size, spec.size), dtype=torch.uint8)
            for spec in plan.specs
        ]
        reasons: dict[int, str] = {}
        shown: list[int] = []
        group: list[UInt8[np.ndarray, "H W 3"]] = []
        for i in index.tolist():
            found = self._read(candidates(plan.order, epoch, i), reasons)
            if found is None:
                return None, reasons
            shown.append(found[0])
            group.append(found[1])
            full = sum(picture.nbytes for picture in group) > MAX_PENDING_BYTES
            if full or len(shown) == len(index):
                self._cut(group, epoch, index, len(shown) - len(group), crops)
                group.clear()
        batch = Crops(crops, torch.from_numpy(index.copy()), plan.labels(np.array(shown)))
        return batch, reasons

    def _read(
        self, tried: Iterable[int], reasons: dict[int, str]
    ) -> tuple[int, UInt8[np.ndarray, "H W 3"]] | None:
        for i in tried:
            try:
                return i, self.plan.source.read(i)
            except DecodeError as error:
                reasons[i] = error.reason
        return None

    def _cut(
        self,
        group: list[UInt8[np.ndarray, "H W 3"]],
        epoch: int,
        index: Int64[np.ndarray, " b"],
        start: int,
        crops: list[UInt8[Tensor, "b 3 s s"]],
    ) -> None:
        heights, widths = np.array([picture.shape[:2] for picture in group]).T
        cuts = self.plan.cuts(epoch, index[start : start + len(group)], heights, widths)
        for view, (boxes, flips) in zip(crops, cuts, strict=True):
            for row, (picture, box, flip) in enumerate(zip(group, boxes, flips, strict=True)):
                view[start + row] = crop_one(picture, box, view.shape[-1], bool(flip))


# ---- evaluation


def eval_images(
    source: Source, rows: Int64[np.ndarray, " n"], size: int, share: float, device: torch.device
) -> Iterator[tuple[Int64[np.ndarray, " b"], Float32[Tensor, "b 3 size size"]]]:
    """`eval_crops` of the centre square whose side is `share` of the short side."""
    return eval_crops(source, rows, size, _centre(share), device)


def eval_crops(
    source: Source, rows: Int64[np.ndarray, " n"], size: int, cut: Cut, device: torch.device
) -> Iterator[tuple[Int64[np.ndarray, " b"], Float32[Tensor, "b 3 size size"]]]:
    """One crop of each of the given pictures, in order; unreadable pictures are left out.

    Args:
        rows: numbers of pictures in the source.
        size: side of the result in pixels.
        cut: what to take of the pictures.
        device: where the crops are wanted.

    Yields:
        Numbers of the pictures and their crops in [0, 255], at most 256 at a time.
    """
    if isinstance(source, Pictures):
        for start in range(0, len(rows), EVAL_CHUNK):
            chunk = rows[start : start + EVAL_CHUNK]
            pictures = np.array(source.images[chunk].transpose(0, 3, 1, 2), order="C")
            heights, widths = np.tile(pictures.shape[2:], (len(chunk), 1)).T
            boxes, flips = cut(chunk, heights, widths)
            yield chunk, crop(torch.from_numpy(pictures).to(device), boxes, size, flips)
        return

    def load(i: int) -> UInt8[Tensor, "3 size size"] | None:
        try:
            return _cut_one(source.read(i), i, size, cut)
        except DecodeError:
            return None

    kept: list[int] = []
    crops: list[UInt8[Tensor, "3 size size"]] = []
    for position, (i, loaded) in enumerate(
        zip(rows.tolist(), _ahead(load, rows.tolist()), strict=True)
    ):
        if loaded is not None:
            kept.append(i)
            crops.append(loaded)
        if kept and (len(kept) == EVAL_CHUNK or position + 1 == len(rows)):
            yield np.array(kept, np.int64), torch.stack(crops).to(device).float()
            kept, crops = [], []


def _centre(share: float) -> Cut:
    def cut(
        index: Int64[np.ndarray, "b"],
        heights: Int64[np.ndarray, "b"],
        widths: Int64[np.ndarray, "b"],
    ) -> Cuts:
        return centre_boxes(heights, widths, share), np.zeros(len(index), bool)

    return cut


def _cut_one(
    picture: UInt8[np.ndarray, "H W 3"], i: int, size: int, cut: Cut
) -> UInt8[Tensor, "3 size size"]:
    heights, widths = (np.array([side]) for side in picture.shape[:2])
    (box,), (flip,) = cut(np.array([i], np.int64), heights, widths)
    return crop_one(picture, box, size, bool(flip))


def _ahead(function: Callable[[int], Result], items: Iterable[int]) -> Iterator[Result]:
    """`function` of each item, in order, computed by a few threads a little ahead."""
    threads = min(8, num_cores())
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

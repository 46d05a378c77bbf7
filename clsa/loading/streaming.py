"""Batches for sets that are read from disk: worker processes decode and cut the pictures."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from clsa.loading.crops import Crops, Plan, cut_one, empty_view
from clsa.loading.order import candidates
from clsa.options.run import DataOptions
from clsa.pictures.decode import DecodeError, Picture
from clsa.pictures.quarantine import Quarantine
from clsa.system import workers

MAX_PENDING_BYTES = 64 << 20
PREFETCH = 2


def streamed(
    plan: Plan, steps: range, device: torch.device, options: DataOptions, quarantine: Quarantine
) -> Iterator[Crops]:
    """The batches of `steps` in order. Unreadable pictures are noted in `quarantine`.

    Raises:
        ClsaError: 65 if too many pictures cannot be read, 74 if a worker fails.
    """
    count = workers.num_workers(options.workers)
    if count:
        workers.require_files(count)
        pixels = sum(spec.size**2 for spec in plan.specs) * plan.count
        workers.require_shared_memory(3 * pixels * (PREFETCH * count + 1))
    on_gpu = device.type == "cuda"
    name = plan.source.ids.__getitem__
    found = workers.results(_Steps(plan), steps, count, PREFETCH, name, pinned=on_gpu)
    whole = _whole(found, quarantine)
    return _copied_ahead(whole, device) if on_gpu else whole


def _whole(
    found: Iterator[tuple[Crops | None, dict[int, str]]], quarantine: Quarantine
) -> Iterator[Crops]:
    for batch, reasons in found:
        quarantine.add(reasons)
        if batch is None:
            raise quarantine.error()
        yield batch


def _copied_ahead(batches: Iterator[Crops], device: torch.device) -> Iterator[Crops]:
    """The batches on a GPU, each copied there while the previous step computes."""
    copies = torch.cuda.Stream(device)
    ahead: deque[tuple[Crops, torch.cuda.Event]] = deque()
    for batch in batches:
        with torch.cuda.stream(copies):
            crops = [view.to(device, non_blocking=True) for view in batch.crops]
            copied = torch.cuda.Event()
            copied.record(copies)
        ahead.append((batch._replace(crops=crops), copied))
        if len(ahead) > 1:
            yield _arrived(*ahead.popleft(), device)
    if ahead:
        yield _arrived(*ahead.popleft(), device)


def _arrived(batch: Crops, copied: torch.cuda.Event, device: torch.device) -> Crops:
    """Make later computation wait for the copies, and keep their memory until it is done."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)
    for view in batch.crops:
        view.record_stream(computing)
    return batch


_Pending = tuple[int, Iterator[int]]
"""A row of the batch, and the pictures still to be tried there."""


class _Opened(NamedTuple):
    row: int
    tried: Iterator[int]
    i: int
    picture: Picture


class _Steps(Dataset):
    """One item per step, so that workers need no restart between epochs."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def __getitem__(self, step: int) -> tuple[Crops | None, dict[int, str]]:
        """The batch, and reasons by picture number; no batch if a picture has no replacement left.

        Pictures that open but do not decode are replaced in another round.
        """
        plan = self.plan
        epoch, (index, drawn) = plan.order.epoch(step), plan.rows(step)
        crops = [empty_view(plan.count, spec.size) for spec in plan.specs]
        reasons: dict[int, str] = {}
        shown = index.copy()
        pending = [(row, candidates(plan.order, epoch, i)) for row, i in enumerate(index.tolist())]
        while pending:
            failed: list[_Pending] = []
            for group in self._open(pending, reasons):
                if not group:
                    return None, reasons
                failed += self._cut(group, epoch, drawn, crops, shown, reasons)
            pending = failed
        return Crops(crops, *map(torch.from_numpy, (index, plan.labels(shown), drawn))), reasons

    def _open(self, pending: list[_Pending], reasons: dict[int, str]) -> Iterator[list[_Opened]]:
        """Groups of opened pictures; an empty group if a picture has no replacement left.

        Groups are as large as memory allows: drawing boxes one by one costs as much as a crop.
        """
        group: list[_Opened] = []
        held = 0
        for row, tried in pending:
            opened = self._open_first(tried, reasons)
            if opened is None:
                yield []
                return
            group.append(_Opened(row, tried, *opened))
            held += group[-1].picture.held
            if held > MAX_PENDING_BYTES:
                yield group
                group, held = [], 0
        if group:
            yield group

    def _open_first(
        self, tried: Iterator[int], reasons: dict[int, str]
    ) -> tuple[int, Picture] | None:
        for i in tried:
            workers.at(i)
            try:
                return i, self.plan.source.open(i)
            except DecodeError as error:
                reasons[i] = error.reason
        return None

    def _cut(
        self,
        group: list[_Opened],
        epoch: int,
        drawn: Int64[np.ndarray, " b"],
        crops: list[UInt8[Tensor, "b 3 _ _"]],
        shown: Int64[np.ndarray, " b"],
        reasons: dict[int, str],
    ) -> list[_Pending]:
        """Decode each picture once, as reduced as its crops allow; return the rows that failed."""
        failed = []
        sizes = [(one.picture.height, one.picture.width) for one in group]
        cuts = self.plan.cuts(epoch, drawn[[one.row for one in group]], *np.array(sizes).T)
        for k, (row, tried, i, picture) in enumerate(group):
            workers.at(i)
            try:
                cut_one(picture, [(boxes[k], flips[k]) for boxes, flips in cuts],
                         [view[row] for view in crops])  # fmt: skip
                shown[row] = i
            except DecodeError as error:
                reasons[i] = error.reason
                failed.append((row, tried))
        return failed

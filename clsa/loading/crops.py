"""Decides what a batch shows and where it is cut, and cuts the crops of one picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from clsa.loading.order import Companions, Order, Rows
from clsa.pictures.decode import Picture
from clsa.pictures.sources import Source
from clsa.views.geometry import centre_boxes, crop_one, reduction_for
from clsa.views.specs import ViewSpec
from clsa.views.transform import crop_params

Cuts = tuple[Int64[np.ndarray, "b 4"], Bool[np.ndarray, "b"]]
# Takes numbers, heights and widths of pictures; returns their boxes and flips.
Cut = Callable[[Int64[np.ndarray, "b"], Int64[np.ndarray, "b"], Int64[np.ndarray, "b"]], Cuts]


class Crops(NamedTuple):
    """This process's share of one global batch."""

    crops: list[Tensor]
    """One (b, 3, s, s) per view, on the device, in [0, 255]: float32 from a resident set, uint8 in
    channels-last layout from a streamed one."""
    index: Int64[Tensor, " b"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """Numbers of the pictures in the source, on the CPU."""
    labels: Int64[Tensor, " b"]
    """Classes (-1 unknown), on the CPU."""
    drawn: Int64[Tensor, " b"]
    """Numbers from which the views are drawn, on the CPU (see `order.Rows`)."""


@dataclass(frozen=True)
class Plan:
    """What decides a batch, whether it is cut on the device or by workers."""

    source: Source
    specs: Sequence[ViewSpec]
    order: Order
    companions: Companions | None
    rank: int
    world: int

    @property
    def count(self) -> int:
        """Number of rows in this process's share."""
        total = self.order.batch_size + (self.companions.count if self.companions else 0)
        return total // self.world

    def rows(self, step: int) -> Rows:
        """This process's contiguous share of the order's pictures, then of their companions."""
        index = self.order.indices(step)
        parts = [Rows(index, index)]
        if self.companions:
            parts.append(self.companions.rows(self.order, step))
        shares = [
            [numbers[self.rank * (len(numbers) // self.world) :][: len(numbers) // self.world]
             for numbers in part]
            for part in parts
        ]  # fmt: skip
        return Rows(*(np.concatenate(numbers) for numbers in zip(*shares, strict=True)))

    def cuts(
        self,
        epoch: int,
        drawn: Int64[np.ndarray, " b"],
        heights: Int64[np.ndarray, " b"],
        widths: Int64[np.ndarray, " b"],
    ) -> list[Cuts]:
        """Boxes and flips of each view."""
        seed = self.order.seed
        return [crop_params(spec, seed, epoch, drawn, heights, widths) for spec in self.specs]

    def labels(self, shown: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
        """Classes of pictures (-1 unknown)."""
        return self.source.labels[shown]


def empty_view(count: int, size: int) -> UInt8[Tensor, "count 3 size size"]:
    """An empty tensor for `count` crops in the layout of `crop_one`: channels last."""
    shape = (count, 3, size, size)
    return torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)


def cut_one(
    picture: Picture,
    cuts: Sequence[tuple[Int64[np.ndarray, "4"], np.bool]],
    views: Sequence[UInt8[Tensor, "3 _ _"]],
) -> None:
    """Fill the views with crops of one picture, decoded once, as reduced as the crops allow.

    Args:
        picture: an opened picture.
        cuts: box and flip of each view, drawn on the picture's `height` and `width`.
        views: one (3, s, s) per cut; this function writes into them.

    Raises:
        DecodeError: if the pixels cannot be decoded.
    """
    sizes = [view.shape[-1] for view in views]
    pixels = picture.pixels(reduction_for([box for box, _ in cuts], sizes))
    drawn_on = picture.height, picture.width
    for view, size, (box, flip) in zip(views, sizes, cuts, strict=True):
        view.copy_(crop_one(pixels, box, size, bool(flip), drawn_on))


def cut_alone(picture: Picture, i: int, size: int, cut: Cut) -> UInt8[Tensor, "3 size size"]:
    """The single crop of picture number `i` that `cut` chooses; raises as `cut_one`."""
    boxes, flips = cut(*(np.array([number]) for number in (i, picture.height, picture.width)))
    view = empty_view(1, size)[0]
    cut_one(picture, [(boxes[0], flips[0])], [view])
    return view


def centre(share: float) -> Cut:
    """A cut that takes the centre square whose side is `share` of the short side."""

    def cut(
        index: Int64[np.ndarray, "b"],
        heights: Int64[np.ndarray, "b"],
        widths: Int64[np.ndarray, "b"],
    ) -> Cuts:
        return centre_boxes(heights, widths, share), np.zeros(len(index), bool)

    return cut


def whole(
    index: Int64[np.ndarray, "b"], heights: Int64[np.ndarray, "b"], widths: Int64[np.ndarray, "b"]
) -> Cuts:
    """A cut that takes the whole picture; any shape becomes a square."""
    zeros = np.zeros_like(heights)
    return np.stack([zeros, zeros, heights, widths], axis=1), np.zeros(len(index), bool)

"""Moves pixels: random crops, flips, the affine operations of the strong pool, and jigsaws.

Parameters are NumPy arrays made on the CPU; images are tensors on any device. Two small matrices
per image resize a crop, and one gather does an affine operation, so no loop runs over images.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from clsa.system.machine import upload

NUM_TRIES = 10
NUM_CROP_SLOTS = 2 * NUM_TRIES + 2
AFFINE_OPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def crop_boxes(
    u: Float[np.ndarray, "B slots"],
    heights: Int64[np.ndarray, "B"],
    widths: Int64[np.ndarray, "B"],
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Int64[np.ndarray, "B 4"]:
    """Random crops by the rule of torchvision's RandomResizedCrop, for a whole batch.

    Each picture gets ten tries of an area (uniform) and an aspect ratio (log-uniform). The first
    that fits is taken; if none fits, the largest centred crop of an allowed ratio.

    Args:
        u: uniforms in [0, 1); `NUM_CROP_SLOTS` per picture (areas, ratios, top, left).
        heights, widths: sizes of the pictures in pixels.
        scale: range of the crop's share of the picture's area, in (0, 1].
        ratio: range of width / height.

    Returns:
        One (top, left, height, width) per picture, in pixels.
    """
    height, width = heights[:, None], widths[:, None]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, :NUM_TRIES])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * u[:, NUM_TRIES : 2 * NUM_TRIES])
    tried_width, tried_height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (tried_width > 0) & (tried_width <= width)
    fits &= (tried_height > 0) & (tried_height <= height)
    first = fits.argmax(1)[:, None]
    found = np.take_along_axis(fits, first, 1)

    widest = np.minimum(width, np.rint(height * ratio[1]))
    tallest = np.minimum(height, np.rint(width / ratio[0]))
    crop_width = np.where(found, np.take_along_axis(tried_width, first, 1), widest)
    crop_height = np.where(found, np.take_along_axis(tried_height, first, 1), tallest)
    free = np.concatenate([height - crop_height, width - crop_width], 1)
    corner = np.floor(np.where(found, u[:, 2 * NUM_TRIES :] * (free + 1), free / 2))
    return np.concatenate([corner, crop_height, crop_width], 1).astype(np.int64)


def centre_boxes(
    heights: Int64[np.ndarray, "B"], widths: Int64[np.ndarray, "B"], share: float
) -> Int64[np.ndarray, "B 4"]:
    """Centred squares whose side is `share` of the short side (at least one pixel)."""
    side = np.maximum(np.rint(share * np.minimum(heights, widths)), 1).astype(np.int64)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)


def _resize_matrices(
    start: Int64[Tensor, "B"],
    length: Int64[Tensor, "B"],
    flip: Bool[Tensor, "B"],
    size: int,
    full: int,
) -> Float32[Tensor, "B size full"]:
    """Matrices of triangle filters; multiplied by an image, they map `full` pixels to `size`.

    Row i has its centre at start + (i + 1/2) length / size and is max(1, length / size) pixels wide
    to each side. Pixels outside the crop have weight zero, and each row sums to one.
    """
    start, length = start.double()[:, None], length.double()[:, None]
    step = length / size
    support = step.clamp(min=1)
    row = torch.arange(size, device=start.device)
    row = torch.where(flip[:, None], size - 1 - row, row)
    pixel = torch.arange(full, device=start.device) + 0.5 - start
    outside = (pixel < 0) | (pixel > length)
    centre = ((row + 0.5) * step / support).float()
    pixel = (pixel / support).masked_fill(outside, torch.inf).float()
    weights = (pixel[:, None, :] - centre[:, :, None]).abs_().neg_().add_(1).relu_()
    return weights.div_(weights.sum(2, keepdim=True))


def crop(
    images: UInt8[Tensor, "B 3 H W"] | Float32[Tensor, "B 3 H W"],
    boxes: Int64[np.ndarray, "B 4"],
    size: int,
    flip: Bool[np.ndarray, "B"],
) -> Float32[Tensor, "B 3 size size"]:
    """Cut every image to its box, resize it to a square and mirror it if `flip` says so.

    X' = R_h X R_w^T with one pair of matrices per image; equal to
    `F.interpolate(..., mode="bilinear", antialias=True)` of the crop.

    Args:
        images: pixels in [0, 255].
        boxes: (top, left, height, width) in pixels, inside the images.
        size: side of the result in pixels.
        flip: mirror left and right.

    Returns:
        Pixels in [0, 255], not rounded.
    """
    batch, channels, height, width = images.shape
    numbers = np.concatenate([boxes, flip[:, None]], 1).T
    top, left, crop_height, crop_width, mirrored = upload([numbers], images.device)[0]
    upright = torch.zeros_like(mirrored, dtype=torch.bool)
    rows = _resize_matrices(top, crop_height, upright, size, height)
    columns = _resize_matrices(left, crop_width, mirrored.bool(), size, width)
    narrow = images.float().view(batch, channels * height, width) @ columns.transpose(1, 2)
    return rows[:, None] @ narrow.view(batch, channels, height, size)


def reduction_for(boxes: Sequence[Int64[np.ndarray, "4"]], sizes: Sequence[int]) -> int:
    """How many times smaller (1, 2, 4 or 8) a picture may be decoded if only these crops are cut.

    Each crop keeps at least twice as many pixels per side as its view. The resize then still
    averages pixels, and rounding moves an edge by at most a quarter of a view's pixel.

    Args:
        boxes: (top, left, height, width) of each crop, in pixels of the whole picture.
        sizes: sides of the views, in pixels.
    """
    least = min(min(box[2:]) / size for box, size in zip(boxes, sizes, strict=True))
    return next((reduction for reduction in (8, 4, 2) if least >= 2 * reduction), 1)


def crop_one(
    image: UInt8[np.ndarray, "h w 3"],
    box: Int64[np.ndarray, "4"],
    size: int,
    flip: bool,
    drawn_on: tuple[int, int],
) -> UInt8[Tensor, "3 size size"]:
    """The same crop for one picture in a worker: uint8 in and out, within 1 of `crop`.

    Args:
        image: the picture, possibly decoded smaller than its full size.
        box: (top, left, height, width) in pixels of the full-size picture, for which it was drawn;
            edges are rounded to whole pixels of `image`.
        size: side of the result in pixels.
        flip: mirror left and right.
        drawn_on: height and width of the full-size picture, in pixels.

    Returns:
        Pixels in channels-last memory, without which a third of the time is lost.
    """
    (top, bottom), (left, right) = (
        _edges(int(start), int(length), full, side)
        for start, length, full, side in zip(box[:2], box[2:], drawn_on, image.shape, strict=False)
    )
    cut = np.require(image[top:bottom, left:right], requirements="W")
    pixels = torch.from_numpy(cut)[None].permute(0, 3, 1, 2)
    small = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return (small.flip(3) if flip else small)[0]


def _edges(start: int, length: int, full: int, side: int) -> tuple[int, int]:
    """First pixel and the one after the last, when `full` pixels are decoded to `side`."""
    if side == full:
        return start, start + length
    first = min(round(start * side / full), side - 1)
    return first, max(round((start + length) * side / full), first + 1)


def affine_coefficients(
    op: str, magnitude: Float[np.ndarray, "B"], size: int
) -> Float[np.ndarray, "B 6"]:
    """Pillow's (a, b, c, d, e, f) of one operation: output (x, y) reads (ax+by+c, dx+ey+f).

    Args:
        op: one of `AFFINE_OPS`.
        magnitude: shear in pixels per pixel, shift in pixels, or counter-clockwise degrees.
        size: side of the images in pixels; they rotate about their centre.
    """
    coefficients = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(magnitude), 1))
    if op == "Rotate":
        angle = -np.radians(magnitude % 360)
        cosine, sine = np.cos(angle).round(15), np.sin(angle).round(15)
        centre = size / 2
        coefficients[:, 0], coefficients[:, 1] = cosine, sine
        coefficients[:, 3], coefficients[:, 4] = -sine, cosine
        coefficients[:, 2] = cosine * -centre + sine * -centre + centre
        coefficients[:, 5] = -sine * -centre + cosine * -centre + centre
    else:
        place = {"ShearX": 1, "ShearY": 3, "TranslateX": 2, "TranslateY": 5}[op]
        coefficients[:, place] = magnitude
    return coefficients


def affine_nearest(
    images: UInt8[Tensor, "B 3 S S"], coefficients: Float[Tensor, "B 6"]
) -> UInt8[Tensor, "B 3 S S"]:
    """Pillow's nearest-neighbour `Image.transform(AFFINE)` with black fill, bit for bit.

    Pillow walks the output in 16.16 fixed point from the centre of the first pixel; so do we.
    """
    batch, channels, size, _ = images.shape
    a, b, c, d, e, f = coefficients.unbind(1)
    terms = torch.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5])
    a, b, c, d, e, f = (terms * 65536 + 0.5).floor().int()[..., None, None]
    x = torch.arange(size, dtype=torch.int32, device=images.device)
    y = x[:, None]
    column, row = (a * x + (b * y + c)) >> 16, (d * x + (e * y + f)) >> 16
    outside = (column < 0) | (column >= size) | (row < 0) | (row >= size)
    source = (row * size + column).masked_fill_(outside, 0).view(batch, 1, -1).long()
    moved = images.view(batch, channels, -1).gather(2, source.expand(-1, channels, -1))
    return moved.view_as(images).masked_fill_(outside[:, None], 0)


def jigsaw(
    images: Float[Tensor, "B 3 S S"], u: Float[Tensor, "B P 3"], grid: int, side: int
) -> Float[Tensor, "BP 3 side side"]:
    """Cut a patch from each cell of a grid, in random order (PIRL, Misra and van der Maaten 2020).

    The cells are squares of S // grid pixels, counted from the top left corner; pixels beyond the
    last cell are not used. Place p of the result shows the cell c whose u[c, 2] is the p-th
    smallest. Its patch starts at row floor(u[p, 0] (cell - side + 1)) and column
    floor(u[p, 1] (cell - side + 1)) of that cell.

    Args:
        images: any pixels.
        u: uniforms in [0, 1), three for each of the P = grid^2 places: row, column, order.
        grid: cells per side.
        side: side of the patches in pixels, at most S // grid.

    Returns:
        The P patches of the first picture, then those of the second, ...; channels last.
    """
    batch, places, _ = u.shape
    cell = images.shape[-1] // grid
    if places != grid**2 or not 0 < side <= cell:
        raise ValueError(f"need {grid}^2 places and patches of 1..{cell}, got {places} and {side}")
    shown = u[:, :, 2].argsort(dim=1, stable=True)
    corner = (u[:, :, :2] * (cell - side + 1)).floor().long()
    pixel = torch.arange(side, device=images.device)
    row = (shown // grid * cell + corner[:, :, 0])[:, :, None] + pixel
    column = (shown % grid * cell + corner[:, :, 1])[:, :, None] + pixel
    picture = torch.arange(batch, device=images.device)[:, None, None, None]
    patches = images[picture, :, row[:, :, :, None], column[:, :, None, :]]
    return patches.flatten(0, 1).permute(0, 3, 1, 2)

"""Recipes of views: which crops a step needs, what is drawn for each, and the pixels that result.

Everything random is drawn first, as NumPy arrays that depend on (seed, epoch, index, view) alone,
and then applied to whole batches on the device.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from clsa import color, geometry, rng
from clsa.host import upload
from clsa.options import MethodOptions, StrongViews, ViewOptions, WeakViews

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIN_SIGMA, MAX_SIGMA = 0.1, 2.0
STRONG_EVAL_VIEW = 1000

_ENHANCE = ("Contrast", "Color", "Brightness", "Sharpness")
_SHARED = (*geometry.AFFINE_OPS, "AutoContrast", "Equalize", "Solarize", "Posterize", *_ENHANCE)
POOLS: dict[str, tuple[str, ...]] = {
    "paper": (*_SHARED, "Invert"),
    "official": (*_SHARED, "Identity"),
}
_PIXEL_OPS = {
    "AutoContrast": lambda images, _: color.auto_contrast(images),
    "Equalize": lambda images, _: color.equalize(images),
    "Invert": lambda images, _: color.invert(images),
    "Solarize": color.solarize,
    "Posterize": color.posterize,
    "Contrast": color.contrast,
    "Color": color.saturate,
    "Brightness": color.brightness,
    "Sharpness": color.sharpness,
    "Affine": geometry.affine_nearest,
}

# Slots of the counter that a view draws from: crop, flip, 9 of the weak recipe, 4 a strong round.
_FLIP = geometry.NUM_CROP_SLOTS
_WEAK = _FLIP + 1
_STRONG = _WEAK + 9
_ORDERS = np.array(list(itertools.permutations(range(4))))


class ViewSpec(NamedTuple):
    """One view of every picture of a batch."""

    name: str
    """key, weak0, weak1, ..., strong0, ..."""
    size: int
    """Side in pixels."""
    scale: tuple[float, float]
    """Share of the picture's area that the crop takes."""
    strong: bool
    """Whether the strong operations follow the weak recipe."""
    view: int
    """Number of its stream of random numbers."""


class Params(NamedTuple):
    """All that was drawn for the pixels of one view; one row a picture."""

    jitter: Bool[np.ndarray, "B"]
    factors: Float[np.ndarray, "B 4"]
    order: Int64[np.ndarray, "B 4"]
    gray: Bool[np.ndarray, "B"]
    blur: Bool[np.ndarray, "B"]
    sigma: Float[np.ndarray, "B"]
    ops: Int64[np.ndarray, "B rounds"]
    """Position in the pool."""
    applied: Bool[np.ndarray, "B rounds"]
    magnitude: Float[np.ndarray, "B rounds"]
    """In [0, 1); `amount` turns it into pixels, degrees or factors."""
    sign: Float[np.ndarray, "B rounds"]
    """-1 or 1, for shear, translation and rotation."""


def view_specs(options: ViewOptions, method: MethodOptions) -> list[ViewSpec]:
    """The views of a step: the key, the weak queries, the strong queries."""
    weak, strong = options.weak.sizes, options.strong.sizes
    named = [("key", options.size, method.strong_key)]
    named += [(f"weak{i}", size, method.strong_query) for i, size in enumerate(weak)]
    named += [(f"strong{i}", size, True) for i, size in enumerate(strong)]
    low, high = options.scale
    specs = []
    for view, (name, size, is_strong) in enumerate(named):
        share = size / options.size
        specs.append(ViewSpec(name, size, (low * share, min(high * share, 1)), is_strong, view))
    return specs


def strong_eval_options(options: ViewOptions) -> ViewOptions:
    """The recipe of `strong_eval_spec`: the defaults of both kinds of view, without blur."""
    fixed = {"weak": WeakViews(blur=0), "strong": StrongViews()}
    return options.model_copy(update=fixed)


def strong_eval_spec(options: ViewOptions) -> ViewSpec:
    """The strong view of evaluation, one for all recipes so that they can be compared.

    Draw and apply it with `strong_eval_options(options)`.
    """
    return ViewSpec("strong-eval", options.size, options.scale, True, STRONG_EVAL_VIEW)


def crop_params(
    spec: ViewSpec,
    seed: int,
    epoch: int,
    index: Int64[np.ndarray, "B"],
    heights: Int64[np.ndarray, "B"],
    widths: Int64[np.ndarray, "B"],
    flip_probability: float,
) -> tuple[Int64[np.ndarray, "B 4"], Bool[np.ndarray, "B"]]:
    """Boxes (top, left, height, width in pixels) and flips of one view, for workers and devices."""
    u = rng.uniforms(seed, epoch, index, spec.view, np.arange(_FLIP + 1))
    boxes = geometry.crop_boxes(u[:, :_FLIP], heights, widths, spec.scale)
    return boxes, u[:, _FLIP] < flip_probability


def sample(
    options: ViewOptions, spec: ViewSpec, seed: int, epoch: int, index: Int64[np.ndarray, "B"]
) -> Params:
    """Draw the pixel operations of one view: MoCo v2's weak recipe, then the strong rounds.

    Factors of jitter are uniform in [max(0, 1 - s), 1 + s], turns of hue in [-s, s], for the
    strengths s of `options.weak.jitter`; sigma is uniform in [0.1, 2] pixels.
    """
    weak, strong = options.weak, options.strong
    rounds = strong.rounds if spec.strong else 0
    slots = np.arange(_WEAK, _STRONG + 4 * rounds)
    u = rng.uniforms(seed, epoch, index, spec.view, slots)
    strength = np.array(weak.jitter)
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(centre - strength, [0, 0, 0, -strength[3]])
    op, applied, magnitude, sign = u[:, 9:].reshape(len(index), rounds, 4).transpose(2, 0, 1)
    return Params(
        jitter=u[:, 0] < weak.jitter_probability,
        factors=low + (centre + strength - low) * u[:, 1:5],
        order=_ORDERS[(u[:, 5] * len(_ORDERS)).astype(np.int64)],
        gray=u[:, 6] < weak.grayscale,
        blur=u[:, 7] < weak.blur,
        sigma=MIN_SIGMA + (MAX_SIGMA - MIN_SIGMA) * u[:, 8],
        ops=(op * len(POOLS[strong.pool])).astype(np.int64),
        applied=applied < strong.probability,
        magnitude=magnitude,
        sign=np.where(sign < 0.5, -1.0, 1.0),
    )


def amount(
    op: str,
    pool: str,
    magnitude: Float[np.ndarray, "B"],
    sign: Float[np.ndarray, "B"],
    size: int,
) -> Float[np.ndarray, "B"]:
    """What a drawn magnitude means for an operation.

    Official: v = 1..9 with equal probability, as the official code; paper: v uniform in [0, 10).

    Returns:
        Shear in pixels a pixel, shift in whole pixels, degrees, threshold, bits, or factor.
    """
    official = pool == "official"
    v = 1 + np.floor(9 * magnitude) if official else 10 * magnitude
    if op in ("ShearX", "ShearY"):
        return sign * 3 * v / 100
    if op in ("TranslateX", "TranslateY"):
        return sign * np.floor(3 * v * size / 100)
    if op == "Rotate":
        return sign * 3 * v
    if op == "Solarize":
        return 256 - np.floor(256 * v / 10)
    if op == "Posterize":  # the paper's range, 4 to 8 bits, has its upper end too
        return 4 + np.floor((4 if official else 5) * v / 10)
    if op in _ENHANCE:
        return 0.05 + 9 * v / 100
    return np.zeros_like(magnitude)


def _strong_groups(
    params: Params, pool: str, size: int
) -> list[tuple[str, Int64[np.ndarray, "b"], Float[np.ndarray, "b ..."]]]:
    """(operation, rows, amounts or affine coefficients) in the order of application."""
    groups = []
    for k in range(params.ops.shape[1]):
        affine = []
        for number, op in enumerate(POOLS[pool]):
            rows = np.flatnonzero(params.applied[:, k] & (params.ops[:, k] == number))
            if op == "Identity" or not len(rows):
                continue
            drawn = amount(op, pool, params.magnitude[rows, k], params.sign[rows, k], size)
            if op in geometry.AFFINE_OPS:
                affine.append((rows, geometry.affine_coefficients(op, drawn, size)))
            else:
                groups.append((op, rows, drawn))
        if affine:
            rows, coefficients = (np.concatenate(part) for part in zip(*affine, strict=True))
            groups.append(("Affine", rows, coefficients))
    return groups


def apply_strong(
    images: UInt8[Tensor, "B 3 S S"], params: Params, pool: str
) -> UInt8[Tensor, "B 3 S S"]:
    """The strong rounds: in each, every row that drew an operation and applies it is replaced."""
    groups = _strong_groups(params, pool, images.shape[-1])
    if not groups:
        return images
    names, row_arrays, amount_arrays = zip(*groups, strict=True)
    rows = upload(row_arrays, images.device)
    amounts = upload(amount_arrays, images.device)
    images = images.clone()
    for name, chosen, drawn in zip(names, rows, amounts, strict=True):
        images.index_copy_(0, chosen, _PIXEL_OPS[name](images.index_select(0, chosen), drawn))
    return images


def pixels(
    crops: UInt8[Tensor, "B 3 S S"] | Float32[Tensor, "B 3 S S"],
    params: Params,
    options: ViewOptions,
    spec: ViewSpec,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
    fused: bool = False,
) -> Float32[Tensor, "B 3 S S"]:
    """Crops with pixels in [0, 255] -> normalised views, by the operations in `params`.

    Order of the official code: jitter, grayscale, blur, strong operations on uint8, normalise.
    `fused` as in `color.jitter`.
    """
    room = crops.new_empty(crops.shape, dtype=torch.float32)  # channel by channel in memory
    images = torch.div(crops, 255, out=room)
    images = color.jitter(images, params.factors, params.order, params.jitter, fused)
    images = color.grayscale(images, params.gray)
    images = color.blur(images, params.sigma, params.blur)
    if spec.strong:
        rounded = images.mul(255).round_().to(torch.uint8)
        images = apply_strong(rounded, params, options.strong.pool) / 255
    return color.normalize(images, mean, std)


def contact_sheet(rows: list[list[Tensor]], titles: list[str], side: int = 96) -> Image.Image:
    """Pictures in a grid, one row a picture and one column a view, with a title above each column.

    Args:
        rows: (3, h, w) images; uint8 as they are, floats as views normalised by `MEAN` and `STD`.
        titles: one a column.
        side: of a cell, in pixels.
    """
    gap, heading = 4, 16
    width, height = len(titles) * (side + gap) + gap, len(rows) * (side + gap) + heading
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + column * (side + gap), 2), title, fill="black")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image.is_floating_point():
                scale, shift = (torch.tensor(numbers)[:, None, None] for numbers in (STD, MEAN))
                image = (image.cpu() * scale + shift).clamp(0, 1).mul(255).round().to(torch.uint8)
            cell = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            cell = cell.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(cell, (gap + j * (side + gap), heading + i * (side + gap)))
    return sheet

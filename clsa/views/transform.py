"""Draws the crop and the pixel operations of a view, then applies them.

Everything random is drawn first, as NumPy arrays that depend only on (seed, epoch, index, view),
and then applied to whole batches on the device.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

from clsa.system.machine import upload
from clsa.views import color, geometry, rng
from clsa.views.specs import ViewSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIN_SIGMA, MAX_SIGMA = 0.1, 2.0

_ENHANCE = ("Contrast", "Color", "Brightness", "Sharpness")
_SHARED = (*geometry.AFFINE_OPS, "AutoContrast", "Equalize", "Solarize", "Posterize", *_ENHANCE)
POOLS: dict[str, tuple[str, ...]] = {
    "paper": (*_SHARED, "Invert"),
    "official": (*_SHARED, "Identity"),
    "randaugment": (*_SHARED, "Invert", "SolarizeAdd"),
}
_PIXEL_OPS = {
    "AutoContrast": lambda images, _: color.auto_contrast(images),
    "Equalize": lambda images, _: color.equalize(images),
    "Invert": lambda images, _: color.invert(images),
    "Solarize": color.solarize,
    "SolarizeAdd": lambda images, _: color.solarize_add(images),
    "Posterize": color.posterize,
    "Contrast": color.contrast,
    "Color": color.saturate,
    "Brightness": color.brightness,
    "Sharpness": color.sharpness,
    "Affine": geometry.affine_nearest,
}

_FULL_STRENGTH = {
    "ShearX": lambda sign, _: 0.3 * sign,
    "ShearY": lambda sign, _: 0.3 * sign,
    "TranslateX": lambda sign, size: sign * np.floor(0.45 * size),
    "TranslateY": lambda sign, size: sign * np.floor(0.45 * size),
    "Rotate": lambda sign, _: 30 * sign,
    "Solarize": lambda sign, _: np.full_like(sign, 256),
    "Posterize": lambda sign, _: np.full_like(sign, 4),
    **{op: lambda sign, _: np.full_like(sign, 1.9) for op in _ENHANCE},
}

# Slots of the counter that a view draws from: crop, flip, 9 for the weak recipe, 4 for each round
# of operations (at most 20 rounds), solarize.
_FLIP = geometry.NUM_CROP_SLOTS
_WEAK = _FLIP + 1
_ROUNDS = _WEAK + 9
_SOLARIZE = _ROUNDS + 4 * 20
_ORDERS = np.array(list(itertools.permutations(range(4))))


class Params(NamedTuple):
    """Everything that is drawn for the pixels of one view; one row per picture."""

    jitter: Bool[np.ndarray, "B"]
    factors: Float[np.ndarray, "B 4"]
    order: Int64[np.ndarray, "B 4"]
    gray: Bool[np.ndarray, "B"]
    blur: Bool[np.ndarray, "B"]
    sigma: Float[np.ndarray, "B"]
    solarize: Bool[np.ndarray, "B"]
    ops: Int64[np.ndarray, "B rounds"]
    """Index of the operation in its pool."""
    applied: Bool[np.ndarray, "B rounds"]
    magnitude: Float[np.ndarray, "B rounds"]
    """In [0, 1); `amount` turns it into pixels, degrees or factors."""
    sign: Float[np.ndarray, "B rounds"]
    """-1 or 1, for shear, translation and rotation."""


def crop_params(
    spec: ViewSpec,
    seed: int,
    epoch: int,
    index: Int64[np.ndarray, "B"],
    heights: Int64[np.ndarray, "B"],
    widths: Int64[np.ndarray, "B"],
) -> tuple[Int64[np.ndarray, "B 4"], Bool[np.ndarray, "B"]]:
    """Boxes (top, left, height, width in pixels) and flips of one view, for workers and device."""
    if spec.centre:
        return geometry.centre_boxes(heights, widths, spec.centre), np.zeros(len(index), bool)
    u = rng.uniforms(seed, epoch, index, spec.view, np.arange(_FLIP + 1))
    boxes = geometry.crop_boxes(u[:, :_FLIP], heights, widths, spec.scale)
    return boxes, u[:, _FLIP] < spec.weak.flip


def sample(spec: ViewSpec, seed: int, epoch: int, index: Int64[np.ndarray, "B"]) -> Params:
    """Draw the pixel operations of one view: the weak recipe, then the rounds of operations.

    Jitter factors are uniform in [max(0, 1 - s), 1 + s] and hue turns in [-s, s], for the strengths
    s of `weak.jitter`; sigma is uniform in [0.1, 2] pixels.
    """
    weak, ops = spec.weak, spec.ops
    slots = np.append(np.arange(_WEAK, _ROUNDS + 4 * ops.rounds), _SOLARIZE)
    u = rng.uniforms(seed, epoch, index, spec.view, slots)
    strength = np.array(weak.jitter)
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(centre - strength, [0, 0, 0, -strength[3]])
    rounds = u[:, 9:-1].reshape(len(index), ops.rounds, 4)
    op, applied, magnitude, sign = rounds.transpose(2, 0, 1)
    return Params(
        jitter=u[:, 0] < weak.jitter_probability,
        factors=low + (centre + strength - low) * u[:, 1:5],
        order=_ORDERS[(u[:, 5] * len(_ORDERS)).astype(np.int64)],
        gray=u[:, 6] < weak.grayscale,
        blur=u[:, 7] < spec.blur,
        sigma=MIN_SIGMA + (MAX_SIGMA - MIN_SIGMA) * u[:, 8],
        solarize=u[:, -1] < spec.solarize,
        ops=(op * len(POOLS[ops.pool])).astype(np.int64),
        applied=applied < ops.probability,
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
    """Turn a drawn magnitude into the amount that an operation takes.

    Pool official: v = 1..9 with equal probability, as in the official code. Pool paper: v uniform
    in [0, 10). Pool randaugment: full strength, as in InfoMin (timm's magnitude 10; empty
    pixels are black where timm fills with the mean; translations of 45 %).

    Returns:
        Shear in pixels per pixel, shift in whole pixels, degrees, threshold, bits, or factor.
    """
    if pool == "randaugment":
        return _FULL_STRENGTH.get(op, lambda sign, size: np.zeros_like(sign))(sign, size)
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
    if op == "Posterize":  # the paper's range is 4 to 8 bits, 8 included
        return 4 + np.floor((4 if official else 5) * v / 10)
    if op in _ENHANCE:
        return 0.05 + 9 * v / 100
    return np.zeros_like(magnitude)


def _op_groups(
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


def apply_ops(
    images: UInt8[Tensor, "B 3 S S"], params: Params, pool: str
) -> UInt8[Tensor, "B 3 S S"]:
    """Apply each round in turn: replace the rows whose operation of that round is applied."""
    groups = _op_groups(params, pool, images.shape[-1])
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
    spec: ViewSpec,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
    fused: bool = False,
) -> Float32[Tensor, "B 3 S S"]:
    """Turn crops with pixels in [0, 255] into normalised views by the operations in `params`.

    Order of the official code: jitter, grayscale, blur, solarize, operations on uint8, normalise.
    `fused` as in `color.jitter`.
    """
    room = crops.new_empty(crops.shape, dtype=torch.float32)  # contiguous channels
    images = torch.div(crops, 255, out=room)
    images = color.jitter(images, params.factors, params.order, params.jitter, fused)
    images = color.grayscale(images, params.gray)
    images = color.blur(images, params.sigma, params.blur)
    images = color.solarize_half(images, params.solarize)
    if spec.ops.rounds:
        rounded = images.mul(255).round_().to(torch.uint8)
        images = apply_ops(rounded, params, spec.ops.pool) / 255
    return color.normalize(images, mean, std)

"""Measure which strong operations, at which magnitudes, make pictures unrecognisable."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from clsa.diagnose.measures import divergence, positive_statistics, unit
from clsa.evaluate.features.extract import encode
from clsa.loading.loader import eval_images
from clsa.options.run import ViewOptions
from clsa.pictures.sources import Source
from clsa.system.machine import upload
from clsa.views import color, geometry, rng, transform

OPERATIONS = transform.POOLS["paper"]
SWITCHES = ("AutoContrast", "Equalize", "Invert")
FALLING = ("Posterize", "Contrast", "Color", "Brightness", "Sharpness")
LEVELS = (1, 3, 5, 7, 9)
SIGN_VIEW = 1003
UNITS = {"Rotate": "°", "Posterize": " bits", "TranslateX": " px", "TranslateY": " px"}


class Effect(NamedTuple):
    """Effect of one operation at one magnitude on an encoder's view of pictures."""

    operation: str
    level: int
    """v of the official code, 1 to 9; 0 for an operation without magnitude."""
    strength: int
    """Rank of the level, from 0 for the level that changes pictures least."""
    amount: float
    """Shear in pixels per pixel, shift in pixels, degrees, threshold, bits or factor; no sign."""
    retrieved: float
    """Percentage of pictures whose nearest clean picture is their own."""
    divergence: float
    """Mean KL(p_clean || p_distorted) in nats over the bank of clean pictures."""
    cosine: float
    """Mean cosine of a distorted picture with its own clean picture."""

    def text(self) -> str:
        """The magnitude with its unit; an empty string for an operation in `SWITCHES`."""
        if self.operation in SWITCHES:
            return ""
        sign = "±" if self.operation in geometry.AFFINE_OPS else ""
        sign = "≥" if self.operation == "Solarize" else sign
        return f"{sign}{self.amount:.3g}{UNITS.get(self.operation, '')}"


def levels_of(operation: str) -> tuple[int, ...]:
    """Levels v, the mildest first: 1 to 9, or 9 to 1 if a higher v changes pictures less."""
    if operation in SWITCHES:
        return (0,)
    return LEVELS[::-1] if operation in FALLING else LEVELS


def amount_of(operation: str, level: int, size: int) -> float:
    """Amount of level v of the official code at a side of `size` pixels (`transform.amount`)."""
    drawn, plus = np.array([(level - 0.5) / 9]), np.ones(1)
    return float(transform.amount(operation, "official", drawn, plus, size)[0])


def distort(
    images: UInt8[Tensor, "b 3 S S"],
    operation: str,
    level: int,
    index: Int64[np.ndarray, " b"],
    seed: int,
) -> UInt8[Tensor, "b 3 S S"]:
    """Apply one operation to every picture.

    (seed, index) decides the direction of shear, shift and rotation.

    Args:
        images: centre crops.
        operation: one of `OPERATIONS`.
        level: v from 1 to 9; operations in `SWITCHES` ignore it.
        index: numbers of the pictures.
        seed: of the directions.

    Raises:
        ValueError: if the operation is unknown.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation}: one of {', '.join(OPERATIONS)} needed")
    pool, count = "paper" if operation == "Invert" else "official", len(index)
    side = rng.uniforms(seed, 0, index, SIGN_VIEW, np.zeros(1, np.int64))
    no, zero = np.zeros(count, bool), np.zeros(count)
    params = transform.Params(
        jitter=no, factors=np.zeros((count, 4)), order=np.zeros((count, 4), np.int64),
        gray=no, blur=no, sigma=zero, solarize=no,
        ops=np.full((count, 1), transform.POOLS[pool].index(operation)),
        applied=np.ones((count, 1), bool),
        magnitude=np.full((count, 1), (max(level, 1) - 0.5) / 9),
        sign=np.where(side < 0.5, -1.0, 1.0),
    )  # fmt: skip
    return transform.apply_ops(images, params, pool)


def clean_crops(
    source: Source, rows: Int64[np.ndarray, " n"], options: ViewOptions, device: torch.device
) -> tuple[Int64[np.ndarray, " m"], UInt8[Tensor, "m 3 S S"]]:
    """Numbers of the readable pictures, and their centre crops in uint8 for `distort`."""
    numbers, crops = [np.zeros(0, np.int64)], []
    for kept, found in eval_images(source, rows, options.size, options.eval_crop, device):
        numbers.append(kept)
        crops.append(found.round().clamp(0, 255).to(torch.uint8))
    empty = torch.zeros(0, 3, options.size, options.size, dtype=torch.uint8, device=device)
    return np.concatenate(numbers), torch.cat([empty, *crops])


@torch.no_grad()
def measure(
    network: torch.nn.Module,
    images: UInt8[Tensor, "m 3 S S"],
    index: Int64[np.ndarray, " m"],
    temperature: float,
    seed: int,
    batch_size: int = 256,
) -> list[Effect]:
    """Measure every operation at every level on clean crops; call it inside `frozen(network)`.

    The bank holds the clean crops: a distorted picture is retrieved if its own clean crop is nearer
    than every other one (chance: 1 / m). KL compares the distributions over the bank at T.

    Args:
        network: maps pictures to rows; these may have any length.
        images: m >= 2 clean crops (`clean_crops`).
        index: numbers of the crops' pictures in the set.
        temperature: T of the distributions over the clean pictures.
        seed: of the directions of shear, shift and rotation.
        batch_size: number of pictures encoded at a time.
    """
    bank = _rows(network, images, batch_size)
    own = upload([np.arange(len(index))], images.device)[0]
    found = []
    for operation in OPERATIONS:
        for strength, level in enumerate(levels_of(operation)):
            changed = _rows(network, distort(images, operation, level, index, seed), batch_size)
            standing = positive_statistics(changed, bank, own, temperature)
            found.append(
                Effect(
                    operation,
                    level,
                    strength,
                    amount_of(operation, level, images.shape[-1]) if level else 0.0,
                    100 * standing.retrieved.double().mean().item(),
                    divergence(bank, changed, bank, temperature).mean().item(),
                    (unit(changed) * unit(bank)).sum(1).mean().item(),
                )
            )
    return found


def _rows(
    network: torch.nn.Module, images: UInt8[Tensor, "m 3 S S"], batch_size: int
) -> Float32[Tensor, "m F"]:
    shown: Float[Tensor, "m 3 S S"] = color.normalize(images / 255, transform.MEAN, transform.STD)
    return encode(network, shown, batch_size)

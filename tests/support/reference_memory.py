"""Slow, obvious float64 versions of what methods with a memory compute, written as loops."""

import math

import numpy as np
from torch import Tensor


def dot(left: Tensor, right: Tensor) -> float:
    return sum(a * b for a, b in zip(left.double().tolist(), right.double().tolist(), strict=True))


def noise_contrastive(
    query: Tensor,
    own: Tensor,
    sampled: Tensor,
    normalizer: float,
    num_rows: int,
    temperature: float,
) -> float:
    """InstDisc Eq. 5-7: P = exp(v . f / T) / Z, h = P / (P + m / n)."""
    noise = len(sampled) / num_rows
    total = 0.0
    for f, v in zip(query, own, strict=True):
        probability = math.exp(dot(f, v) / temperature) / normalizer
        total -= math.log(probability / (probability + noise))
        for other in sampled:
            probability = math.exp(dot(f, other) / temperature) / normalizer
            total -= math.log(1 - probability / (probability + noise))
    return total / len(query)


def normalizer(
    query: Tensor, own: Tensor, sampled: Tensor, num_rows: int, temperature: float
) -> float:
    """n times the mean of exp(f . v / T) over own and sampled rows of every query."""
    terms = [
        math.exp(dot(f, other) / temperature)
        for f, v in zip(query, own, strict=True)
        for other in [v, *sampled]
    ]
    return num_rows * sum(terms) / len(terms)


def moved(row: Tensor, feature: Tensor, momentum: float) -> list[float]:
    """norm(r v + (1 - r) f)."""
    both = zip(row.double().tolist(), feature.double().tolist(), strict=True)
    mixed = [momentum * v + (1 - momentum) * f for v, f in both]
    length = math.sqrt(sum(x * x for x in mixed))
    return [x / length for x in mixed]


def jigsaw(images: np.ndarray, u: np.ndarray, grid: int, side: int) -> np.ndarray:
    """Patch p of a picture comes from the cell with the p-th smallest order number."""
    cell = images.shape[-1] // grid
    patches = []
    for image, draws in zip(images, u, strict=True):
        order = sorted(range(grid * grid), key=lambda number, draws=draws: draws[number][2])
        for place, number in enumerate(order):
            top = number // grid * cell + math.floor(draws[place][0] * (cell - side + 1))
            left = number % grid * cell + math.floor(draws[place][1] * (cell - side + 1))
            patches.append(image[:, top : top + side, left : left + side])
    return np.stack(patches)

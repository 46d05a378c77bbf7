"""Slow, obvious float64 versions of AdCo's adversary, written as loops over its equations."""

import math

import torch
from torch import Tensor

from tests.support import reference


def adversarial_gradient(
    query: Tensor, keys: Tensor, negatives: Tensor, temperature: float
) -> list[list[float]]:
    """dL/dw_k = (I - u_k u_k^T) (1/B) sum_i p_ik q_i / (T |w_k|), one list per negative."""
    lengths = [math.sqrt(sum(x * x for x in row)) for row in negatives.double().tolist()]
    units = [
        [x / length for x in row]
        for row, length in zip(negatives.double().tolist(), lengths, strict=True)
    ]
    bank = torch.cat([keys.double(), torch.tensor(units, dtype=torch.float64)])
    shares = reference.probabilities(query, bank, temperature)
    result = []
    for k, (unit, length) in enumerate(zip(units, lengths, strict=True)):
        pull = [0.0] * len(unit)
        for q, share in zip(query.double().tolist(), shares, strict=True):
            pull = [a + share[len(keys) + k] * b / len(query) for a, b in zip(pull, q, strict=True)]
        radial = sum(a * b for a, b in zip(pull, unit, strict=True))
        result.append(
            [(a - radial * b) / (temperature * length) for a, b in zip(pull, unit, strict=True)]
        )
    return result


def adversarial_loss(query: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> float:
    """The loss that negatives ascend: the contrastive one over [keys; negatives at unit length]."""
    units = negatives.double() / negatives.double().norm(dim=1, keepdim=True)
    bank = torch.cat([keys.double(), units])
    return reference.info_nce(query, bank, torch.arange(len(query)), temperature)


def ascended(
    rows: list[list[float]],
    velocity: list[list[float]],
    gradients: list[list[list[float]]],
    lr: float,
    momentum: float,
    decay: float,
) -> list[list[float]]:
    """Rows after v <- momentum v - G + decay w; w <- w - lr v for each of `gradients`."""
    rows, velocity = [list(row) for row in rows], [list(row) for row in velocity]
    for gradient in gradients:
        for row, speed, slope in zip(rows, velocity, gradient, strict=True):
            for d in range(len(row)):
                speed[d] = momentum * speed[d] - slope[d] + decay * row[d]
                row[d] = row[d] - lr * speed[d]
    return rows

"""Slow, obvious float64 versions of assignments to prototypes, as loops over the papers' text."""

import math

from torch import Tensor

Matrix = list[list[float]]


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Matrix:
    """SwAV, supplementary A.1: Q^T of K x B, its rows scaled to 1/K, then its columns to 1/B."""
    values = scores.double().tolist()
    top = max(max(row) for row in values)
    columns = zip(*values, strict=True)
    q = [[math.exp((score - top) / epsilon) for score in column] for column in columns]
    total = sum(map(sum, q))
    q = [[entry / total for entry in row] for row in q]
    num_prototypes, batch = len(q), len(q[0])
    for _ in range(iterations):
        q = [[entry / sum(row) / num_prototypes for entry in row] for row in q]
        sums = [sum(row[i] for row in q) for i in range(batch)]
        q = [[entry / sums[i] / batch for i, entry in enumerate(row)] for row in q]
    return [[row[i] * batch for row in q] for i in range(batch)]


def softmax(row: list[float], temperature: float) -> list[float]:
    """exp(x / T) over its sum."""
    top = max(row)
    shares = [math.exp((value - top) / temperature) for value in row]
    return [share / sum(shares) for share in shares]


def sharpened(scores: Tensor, center: Tensor, temperature: float) -> Matrix:
    """DINO, Algorithm 1: softmax((t - C) / tpt)."""
    middle = center.double().tolist()
    return [
        softmax([score - c for score, c in zip(row, middle, strict=True)], temperature)
        for row in scores.double().tolist()
    ]


def swapped_prediction(targets: list[Matrix], scores: list[Tensor], temperature: float) -> float:
    """Mean over pairs of different views, and over pictures, of -sum_k t_k log softmax(s / T)_k."""
    terms = []
    for place, target in enumerate(targets):
        for view, each in enumerate(scores):
            if view == place:
                continue
            for wanted, row in zip(target, each.double().tolist(), strict=True):
                predicted = softmax(row, temperature)
                pairs = zip(wanted, predicted, strict=True)
                terms.append(-sum(t * math.log(p) for t, p in pairs))
    return sum(terms) / len(terms)

"""Slow, obvious float64 versions of the losses, written as loops over the papers' equations."""

import math

import torch
from torch import Tensor


def _visible(row: int, num_rows: int, candidates: Tensor | None) -> list[int]:
    if candidates is None:
        return list(range(num_rows))
    num_masked = candidates.shape[1]
    return [j for j in range(num_rows) if j >= num_masked or bool(candidates[row, j])]


def probabilities(
    query: Tensor, bank: Tensor, temperature: float, candidates: Tensor | None = None
) -> list[dict[int, float]]:
    """p(z_j | q_i) for every visible j, one dictionary per query."""
    result = []
    for i, q in enumerate(query.double().tolist()):
        logits = {
            j: sum(a * b for a, b in zip(q, bank[j].double().tolist(), strict=True)) / temperature
            for j in _visible(i, len(bank), candidates)
        }
        top = max(logits.values())
        total = sum(math.exp(value - top) for value in logits.values())
        result.append({j: math.exp(value - top) / total for j, value in logits.items()})
    return result


def info_nce(
    query: Tensor,
    bank: Tensor,
    positive: Tensor,
    temperature: float,
    candidates: Tensor | None = None,
) -> float:
    """CLSA Eq. 1-3: mean over i of -log p(z_i | q_i)."""
    rows = probabilities(query, bank, temperature, candidates)
    terms = [-math.log(row[int(y)]) for row, y in zip(rows, positive, strict=True)]
    return sum(terms) / len(terms)


def distribution_divergence(
    weak: Tensor,
    strong: Tensor,
    bank: Tensor,
    temperature: float,
    target_temperature: float,
    candidates: Tensor | None = None,
) -> float:
    """CLSA Eq. 6: mean over i of -sum_j p(z_j | q_i) log p(z_j | s_i)."""
    targets = probabilities(weak, bank, target_temperature, candidates)
    predicted = probabilities(strong, bank, temperature, candidates)
    terms = [
        -sum(t[j] * math.log(r[j]) for j in t) for t, r in zip(targets, predicted, strict=True)
    ]
    return sum(terms) / len(terms)


def entropy(query: Tensor, bank: Tensor, temperature: float) -> float:
    """Mean entropy of p(. | q_i) in nats."""
    rows = probabilities(query, bank, temperature)
    return sum(-sum(p * math.log(p) for p in row.values()) for row in rows) / len(rows)


def written_out(
    weak: list[Tensor],
    strong: list[Tensor],
    bank: Tensor,
    positive: Tensor,
    temperature: float = 0.2,
) -> Tensor:
    """CLSA* as the official code computes it: one softmax matrix per pair, one bank copy per term.

    The target of a weak query is the softmax of its contrast logits, detached. Differentiable
    torch, any dtype; the streaming losses are timed and compared against it.
    """
    loss = weak[0].new_zeros(())
    for query in weak:
        logits = query @ bank.clone().T / temperature
        loss = loss + torch.nn.functional.cross_entropy(logits, positive)
        target = torch.softmax(logits.detach(), dim=1)
        for distorted in strong:
            predicted = torch.softmax(distorted @ bank.clone().T / temperature, dim=1)
            loss = loss - (target * torch.log(predicted)).sum(1).mean()
    return loss


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> float:
    """SimCLR Eq. 1 and Algorithm 1: mean of l(i, j) over both directions of every pair."""
    rows = torch.cat([first, second]).double().tolist()
    half = len(first)

    def similarity(i: int, j: int) -> float:
        return sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / temperature

    def loss(i: int, j: int) -> float:
        others = [similarity(i, k) for k in range(len(rows)) if k != i]
        top = max(others)
        total = sum(math.exp(value - top) for value in others)
        return top + math.log(total) - similarity(i, j)

    return sum(loss(i, i + half) + loss(i + half, i) for i in range(half)) / len(rows)


def cosine_regression(prediction: Tensor, target: Tensor) -> float:
    """BYOL Eq. 2, as written: squared distance of the normalised rows, averaged."""
    total = 0.0
    for p, t in zip(prediction.double().tolist(), target.double().tolist(), strict=True):
        length, size = (math.sqrt(sum(x * x for x in row)) for row in (p, t))
        total += sum((a / length - b / size) ** 2 for a, b in zip(p, t, strict=True))
    return total / len(prediction)


def suncet(rows: Tensor, labels: Tensor, temperature: float) -> float:
    """SuNCEt: mean over i of -log of the share of i's class among all others, if it has any."""
    terms = []
    for i in range(len(rows)):
        alike = others = 0.0
        for j in range(len(rows)):
            if j != i:
                weight = math.exp(float(rows[i].double() @ rows[j].double()) / temperature)
                others += weight
                alike += weight if int(labels[i]) == int(labels[j]) >= 0 else 0.0
        if alike:
            terms.append(-math.log(alike / others))
    return sum(terms) / len(terms) if terms else 0.0

"""Soft assignments to prototypes or to a bank that learns, and the losses of predicting them.

Letters: B pictures, K prototypes. Scores are similarities of rows and prototypes, without a
temperature. Nothing here exchanges data between processes: the caller gathers the scores that must
be balanced together.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Scores = Float[Tensor, "B K"]


def similarity(rows: Float[Tensor, "B D"], prototypes: Float[Tensor, "K D"]) -> Scores:
    """Scores rows . prototypes, in float32 or wider even under autocast.

    The 8 bits of bfloat16 would move a logit at a temperature of 0.05 by up to 0.04.
    """
    kind = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        return rows.to(kind) @ prototypes.to(kind).T


@torch.no_grad()
def sinkhorn(scores: Scores, epsilon: float = 0.05, iterations: int = 3) -> Scores:
    """Assignments that use all prototypes about equally (SwAV, Caron et al. 2020, Eq. 3-5).

    Q = diag(u) exp(S / epsilon) diag(v), found by repeated scaling: first each prototype's share of
    the pictures to 1/K, then each picture to a sum of 1. At the end the sums of the pictures are
    exact, but after few repeats a prototype may hold more than its share. Deviation from the
    official code: computed on logarithms, so that no epsilon overflows and no prototype's sum is
    ever zero.

    Args:
        scores: scores of all pictures to balance: the global batch and a queue.
        epsilon: > 0; the smaller, the harder the assignments.
        iterations: repeats of both scalings, at least 1.

    Returns:
        Detached assignments, rows of sum 1.
    """
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"positive epsilon and iterations needed, got {epsilon}, {iterations}")
    logits = scores / epsilon
    for _ in range(iterations):
        logits = logits - logits.logsumexp(0, keepdim=True)
        logits = logits.log_softmax(1)
    return logits.exp()


@torch.no_grad()
def sharpened(scores: Scores, center: Float[Tensor, " K"], temperature: float) -> Scores:
    """The teacher's assignments: t = softmax((g - c) / T_t), detached (DINO, Caron et al. 2021).

    Subtracting the centre keeps one prototype from taking all pictures; a low temperature keeps
    the assignments from becoming uniform. Only both together prevent collapse.

    Args:
        scores: g, the teacher's scores.
        center: c, a running mean of g over pictures.
        temperature: T_t > 0, below the student's.
    """
    return torch.softmax((scores - center) / temperature, dim=1)


def entropy(assignments: Scores) -> Float[Tensor, ""]:
    """Mean entropy of assignments in nats: 0 for one prototype each, ln K for uniform ones."""
    return torch.special.entr(assignments).sum(1).mean()


def swapped_prediction(
    targets: list[Scores], scores: list[Scores], temperature: float = 0.1
) -> Float[Tensor, ""]:
    """Predict the assignment of each assigning view from every other view (SwAV Eq. 1-2; DINO).

    L = 1 / (A (V - 1)) sum_{a <= A} sum_{v <= V, v != a} mean_i - sum_k t_ik log p_ik, where t is
    targets[a] and p = softmax(scores[v] / T). The targets of a view are summed first, so that each
    view's logarithms are taken once. L is ln K when nothing is learned.

    Args:
        targets: assignments of the first A views, rows of sum 1; they receive no gradient.
        scores: of all V views, in the same order.
        temperature: T > 0.

    Raises:
        ValueError: if there is no pair of different views, or there are fewer scores than targets.
    """
    num_pairs = len(targets) * (len(scores) - 1)
    if num_pairs < 1 or len(scores) < len(targets):
        raise ValueError(f"two views needed, got {len(targets)} targets, {len(scores)} scores")
    terms = []
    for view, each in enumerate(scores):
        others = [target.detach() for place, target in enumerate(targets) if place != view]
        if others:
            total = torch.stack(others).sum(0)
            terms.append(-(total * torch.log_softmax(each / temperature, dim=1)).sum(1).mean())
    return torch.stack(terms).sum() / num_pairs


def soft_bank_cross_entropy(
    teacher: Float[Tensor, "b D"],
    teacher_bank: Float[Tensor, "N D"],
    teacher_temperature: float,
    student: Float[Tensor, "b D"],
    student_bank: Float[Tensor, "N D"],
    temperature: float,
    candidates: Bool[Tensor, " N"],
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Cross-entropy of a student's similarities to its bank, given a teacher's to its own (CCSSL).

    CE_i = - sum_j t_ij log s_ij with s = softmax(q Z^T / T) and t = softmax(q_t Z_t^T / T_t) over
    the candidate rows; KL(t || s) = CE - H(t). CLSA's divergence is the same, with one bank that
    does not learn. Here the student's bank receives a gradient and the teacher receives none.
    B x N logits are held, in float32.

    Args:
        teacher, teacher_bank, student, student_bank: unit rows.
        teacher_temperature, temperature: T_t and T, > 0.
        candidates: rows of the banks that count; if none is marked, all rows count.

    Returns:
        CE and H(t) of each query, in nats.
    """
    hidden = ~(candidates | ~candidates.any())
    with torch.autocast(student.device.type, enabled=False):
        with torch.no_grad():
            logits = teacher.float() @ teacher_bank.float().T / teacher_temperature
            target = logits.masked_fill(hidden, -torch.inf).log_softmax(1)
        logits = student.float() @ student_bank.float().T / temperature
        predicted = logits.masked_fill(hidden, -torch.inf).log_softmax(1).masked_fill(hidden, 0.0)
        known = target.masked_fill(hidden, 0.0)
        weight = target.exp()
        return -(weight * predicted).sum(1), -(weight * known).sum(1)

"""The contrastive loss of mixed pictures, which have two positives (CLIM)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clsa.learning.losses import Stream, bank_statistics


def row_losses(
    rest: Stream,
    keys: Float[Tensor, "B D"],
    positive: Int[Tensor, " b"],
    candidates: Bool[Tensor, "b B"] | None,
) -> Float[Tensor, " b"]:
    """`losses.info_nce` of each query over the bank [keys; rest], from its stream over the rest.

    log(sum over keys + sum over rest) = logaddexp of the two lse, so several sets of keys share one
    pass over the rest of the bank.

    Args:
        rest: queries and their statistics over the rest.
        keys: detached keys.
        positive: row of each query's positive in `keys`.
        candidates: which keys each query may see; None: all.
    """
    lse, _ = bank_statistics(rest.query, keys, rest.temperature, candidates)
    own = (rest.query.to(lse.dtype) * keys[positive]).sum(1)
    return torch.logaddexp(lse, rest.lse) - own / rest.temperature


def mixed_contrast(
    rest: list[Stream],
    weights: list[float],
    own: list[Float[Tensor, "B D"]],
    partners: list[Float[Tensor, "B D"]],
    share: Float[Tensor, " b"],
    positive: Int[Tensor, " b"],
    candidates: Bool[Tensor, "b B"] | None,
) -> Float[Tensor, ""]:
    """L = sum_q w_q sum_r mean_i [ lambda_i NCE(q_i, k_i^r) + (1 - lambda_i) NCE(q_i, k~_i^r) ].

    CLIM, Section 3.2.2 and multi-resolution. Both keys have the same negatives.

    Args:
        rest: each set of mixed queries with its statistics over the bank without the batch's keys.
        weights: w, one per set of queries.
        own: keys of the pictures themselves, one set per resolution r.
        partners: keys of their partners, likewise; an empty list: lambda is 1.
        share: lambda.
        positive, candidates: as in `row_losses`.
    """
    terms = []
    for stream, weight in zip(rest, weights, strict=True):
        rows = sum_of_rows(stream, own, positive, candidates)
        if partners:
            others = sum_of_rows(stream, partners, positive, candidates)
            rows = share * rows + (1 - share) * others
        terms.append(weight * rows.mean())
    return torch.stack(terms).sum()


def with_both(
    own: Float[Tensor, "B D"],
    partners: Float[Tensor, "B D"],
    rest: Float[Tensor, "K D"],
    candidates: Bool[Tensor, "b B"] | None,
) -> tuple[Float[Tensor, "N D"], Bool[Tensor, "b M"] | None]:
    """The bank [own keys; partners' keys; rest], and what queries may see of it."""
    both = None if candidates is None else torch.cat([candidates, candidates], 1)
    return torch.cat([own, partners, rest]), both


def sum_of_rows(
    rest: Stream, keys: list[Tensor], positive: Tensor, candidates: Tensor | None
) -> Float[Tensor, " b"]:
    """`row_losses`, summed over sets of keys."""
    return torch.stack([row_losses(rest, each, positive, candidates) for each in keys]).sum(0)

"""Measures of representations: positives, negatives, classes and spread.

Pure functions of tensors, computed in float64, because similarities of an untrained encoder differ
only in late digits. Letters: B queries, N bank rows, K = N - 1 negatives of each query, n pictures,
F width of a row. The functions scale rows to unit length unless they say otherwise. Similarities
are computed in tiles of at most `MAX_TILE` numbers, never for all queries or all pairs at once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_TILE = 1 << 22
RANKME_EPSILON = 1e-7

PerQuery = Float[Tensor, "B"]


class Standing(NamedTuple):
    """How queries compare with their positive and their negatives; one entry per query."""

    positive: PerQuery
    """P+ = p(z_i | query), the share of the positive; 1 / N if all rows are equally similar."""
    variance: PerQuery
    """Var- = (1/K) sum_k p_k^2 - ((1 - P+) / K)^2 over the negatives."""
    entropy: PerQuery
    """H(p) in nats, at most ln N; exp H is roughly the number of rows that share p."""
    retrieved: Bool[Tensor, "B"]
    """Whether the positive is nearer than every other row (a tie counts as a miss)."""


def unit(rows: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
    """The rows in float64, of length 1."""
    return F.normalize(rows.double(), dim=1)


def _log_shares(
    queries: Float[Tensor, "b F"], bank: Float[Tensor, "N F"], temperature: float
) -> Float[Tensor, "b N"]:
    return (queries @ bank.T / temperature).log_softmax(1)


def _check(rows: Tensor, bank: Tensor, temperature: float) -> int:
    """Number of rows in a tile; raises ValueError for invalid arguments."""
    if rows.ndim != 2 or bank.ndim != 2 or rows.shape[1] != bank.shape[1]:
        raise ValueError(f"rows (B, F) and bank (N, F) needed, got {rows.shape}, {bank.shape}")
    if len(bank) < 2:
        raise ValueError("the bank needs at least two rows")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return max(1, MAX_TILE // len(bank))


@torch.no_grad()
def positive_statistics(
    queries: Float[Tensor, "B F"],
    bank: Float[Tensor, "N F"],
    positive: Int[Tensor, "B"],
    temperature: float,
) -> Standing:
    """Statistics of each query's similarities p = softmax(q Z^T / T) (CLSA Fig. 3 and 6).

    All queries use one bank: the positive of query i is row positive_i, and its K = N - 1 negatives
    are the other rows. Var- is computed as the mean squared distance from the mean (1 - P+) / K,
    which is equal and loses no digits. If p is uniform, P+ = 1 / (K + 1) and Var- = 0; if all of p
    is on one negative, Var- = 1/K - 1/K^2.

    Args:
        queries: B rows.
        bank: N >= 2 rows, which include the positive of each query.
        positive: number of the bank row that is each query's positive.
        temperature: T > 0.

    Raises:
        ValueError: if shapes do not match, the bank has one row, or T <= 0.
    """
    step, bank = _check(queries, bank, temperature), unit(bank)
    if positive.shape != (len(queries),):
        raise ValueError(f"one positive per query needed, got {positive.shape}")
    found = []
    for rows, own in zip(unit(queries).split(step), positive.split(step), strict=True):
        logs = _log_shares(rows, bank, temperature)
        shares = logs.exp()
        entropy = -(shares * logs).sum(1)  # logs are finite, so 0 ln 0 = 0
        share, mine = shares.gather(1, own[:, None]), logs.gather(1, own[:, None])
        logs.scatter_(1, own[:, None], -torch.inf)
        count = len(bank) - 1
        rest = shares.scatter(1, own[:, None], 0.0)
        from_mean = (rest - rest.sum(1, keepdim=True) / count).scatter_(1, own[:, None], 0.0)
        variance = from_mean.square().sum(1) / count
        retrieved = mine[:, 0] > logs.amax(1)
        found.append(Standing(share[:, 0], variance, entropy, retrieved))
    return Standing(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@torch.no_grad()
def divergence(
    targets: Float[Tensor, "B F"],
    others: Float[Tensor, "B F"],
    bank: Float[Tensor, "N F"],
    temperature: float,
) -> PerQuery:
    """KL(t || r) = sum_j t_j ln(t_j / r_j) in nats, with t and r distributions over the bank.

    t belongs to a row of `targets` (a weak query, a clean picture), r to the row of `others` with
    the same number.

    Raises:
        ValueError: as `positive_statistics` does, or if targets and others differ in shape.
    """
    step, bank = _check(targets, bank, temperature), unit(bank)
    if targets.shape != others.shape:
        raise ValueError(f"as many targets as others needed: {targets.shape}, {others.shape}")
    found = []
    for mine, theirs in zip(unit(targets).split(step), unit(others).split(step), strict=True):
        logs = _log_shares(mine, bank, temperature)
        found.append((logs.exp() * (logs - _log_shares(theirs, bank, temperature))).sum(1))
    return torch.cat(found).clamp(min=0)


def curve_distance(first: Float[Tensor, "n"], second: Float[Tensor, "m"]) -> float:
    """Kolmogorov-Smirnov distance max_x |F(x) - G(x)| of two samples: 0 alike, 1 apart."""
    first, second = first.double().sort().values, second.double().sort().values
    places = torch.cat([first, second])
    below = [
        torch.searchsorted(sample, places, right=True) / len(sample) for sample in (first, second)
    ]
    return (below[0].double() - below[1].double()).abs().max().item()


def intra_class_similarity(
    features: Float[Tensor, "n F"], labels: Int[Tensor, "n"]
) -> dict[int, float]:
    """Mean cosine of two pictures of a class: (|sum f|^2 - n) / (n (n - 1)), by class.

    The CLIM paper reports the mean over classes: MoCo v2 .58, CLIM .65, supervised .75 on ImageNet.
    Classes with fewer than two pictures are left out; label -1 means no class.
    """
    rows, found = unit(features), {}
    for label in labels[labels >= 0].unique().tolist():
        mine = rows[labels == label]
        count = len(mine)
        if count > 1:
            # a row of zeros has no direction: its cosine with every other row counts as 0
            total, own = mine.sum(0).square().sum(), mine.square().sum()
            found[int(label)] = ((total - own) / (count * (count - 1))).item()
    return found


def between_class_similarity(features: Float[Tensor, "n F"], labels: Int[Tensor, "n"]) -> float:
    """Mean cosine of two pictures of different classes, to compare `intra_class_similarity` with.

    (|sum_all f|^2 - sum_c |sum_{i in c} f|^2) / (n^2 - sum_c n_c^2); NaN if there is one class.
    """
    known = labels >= 0
    rows, labels = unit(features[known]), labels[known]
    classes, place = labels.unique(return_inverse=True)
    sums = rows.new_zeros(len(classes), rows.shape[1]).index_add_(0, place, rows)
    counts = torch.bincount(place, minlength=len(classes)).double()
    pairs = counts.sum().square() - counts.square().sum()
    return ((rows.sum(0).square().sum() - sums.square().sum()) / pairs).item()


def alignment(first: Float[Tensor, "n F"], second: Float[Tensor, "n F"]) -> float:
    """mean_i |a_i - b_i|^2 of two views (Wang and Isola 2020): 0 equal, 2 unrelated, 4 opposite.

    Raises:
        ValueError: if the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"two views of the same pictures needed: {first.shape}, {second.shape}")
    return (unit(first) - unit(second)).square().sum(1).mean().item()


def uniformity(features: Float[Tensor, "n F"]) -> float:
    """ln mean_{i < j} exp(-2 |f_i - f_j|^2) (Wang and Isola 2020), |f| = 1; lower is more spread.

    0 for equal rows, -8 for an antipodal pair, about -4 for rows spread over a high-dimensional
    sphere.

    Raises:
        ValueError: if there are fewer than two rows.
    """
    rows = unit(features)
    count = len(rows)
    if count < 2:
        raise ValueError("at least two rows are needed")
    total = rows.new_zeros(())
    for chunk in rows.split(max(1, MAX_TILE // count)):
        squared = (2 - 2 * chunk @ rows.T).clamp_(min=0)
        total += (-2 * squared).exp_().sum()
    # the sum has every pair twice, and every row with itself (exp 0 = 1)
    return ((total - count) / (count * (count - 1))).log().item()


def singular_values(features: Float[Tensor, "n F"]) -> Float[Tensor, "r"]:
    """Singular values of the unchanged rows (neither centred nor scaled), largest first."""
    return torch.linalg.svdvals(features.double())


def rankme(features: Float[Tensor, "n F"]) -> float:
    """Effective rank exp(-sum_k p_k ln p_k), p = sigma / sum sigma + 1e-7 (Garrido et al. 2023).

    sigma are the `singular_values`. The result is at most min(n, F) and approaches that from
    below as n grows; the paper takes 25,600 pictures. The identity I_3 gives 3, a matrix of rank
    one gives 1.
    """
    sigma = singular_values(features)
    shares = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny) + RANKME_EPSILON
    return (-(shares * shares.log()).sum()).exp().item()


def feature_spread(features: Float[Tensor, "n F"]) -> float:
    """Mean over features of the standard deviation over unit rows, times sqrt(F).

    SimSiam's indicator of collapse (Chen and He 2021): 0 if all rows are equal, near 1 if they are
    spread over the sphere.
    """
    return spread(unit(features)).item()


def spread(rows: Float[Tensor, "n F"]) -> Float[Tensor, ""]:
    """`feature_spread` of rows that already have unit length; the result stays on their device."""
    return rows.std(0, correction=0).mean() * rows.shape[1] ** 0.5

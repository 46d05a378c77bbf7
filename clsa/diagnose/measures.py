"""What representations are like: numbers about positives, negatives, classes and spread.

Pure functions of tensors, in float64: similarities of an untrained encoder differ late. Letters: B
queries, N bank rows, K = N - 1 negatives of each, n pictures, F width of a row. Rows are scaled to
unit length here unless a function says otherwise. No tensor of more than `MAX_TILE` numbers is
held, so neither the N similarities of all queries nor those of all pairs.
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
    """How queries stand to their positive and to the negatives; one entry a query."""

    positive: PerQuery
    """P+ = p(z_i | query), the share of the positive; 1 / N where nothing is told apart."""
    variance: PerQuery
    """Var- = (1/K) sum_k p_k^2 - ((1 - P+) / K)^2 over the negatives."""
    entropy: PerQuery
    """H(p) in nats, at most ln N; exp H is about how many rows share the probability."""
    retrieved: Bool[Tensor, "B"]
    """Whether the positive is nearer than every other row (a tie is a miss)."""


def unit(rows: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
    """The rows in float64, of length 1."""
    return F.normalize(rows.double(), dim=1)


def _log_shares(
    queries: Float[Tensor, "b F"], bank: Float[Tensor, "N F"], temperature: float
) -> Float[Tensor, "b N"]:
    return (queries @ bank.T / temperature).log_softmax(1)


def _check(rows: Tensor, bank: Tensor, temperature: float) -> int:
    """How many rows make a tile; raises ValueError for what does not fit."""
    if rows.ndim != 2 or bank.ndim != 2 or rows.shape[1] != bank.shape[1]:
        raise ValueError(f"rows (B, F) and bank (N, F) needed, got {rows.shape}, {bank.shape}")
    if len(bank) < 2:
        raise ValueError("a bank of at least two rows is needed")
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
    """What each query's similarity distribution p = softmax(q Z^T / T) says (CLSA Fig. 3 and 6).

    One bank serves all queries: the positive of query i is row positive_i, its K = N - 1 negatives
    are the other rows. Var- is taken as the mean squared distance from the mean (1 - P+) / K, which
    is the same and loses no digits. Uniform: P+ = 1 / (K + 1), Var- = 0; all on one negative:
    Var- = 1/K - 1/K^2.

    Args:
        queries: B rows.
        bank: N >= 2 rows, each query's positive among them.
        positive: bank row of each query's positive.
        temperature: T > 0.

    Raises:
        ValueError: for shapes that do not fit, a bank of one row, or T <= 0.
    """
    step, bank = _check(queries, bank, temperature), unit(bank)
    if positive.shape != (len(queries),):
        raise ValueError(f"one positive a query needed, got {positive.shape}")
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
    """KL(t || r) = sum_j t_j ln(t_j / r_j) in nats, t and r the distributions over the bank.

    t of the target (the weak query, the clean picture), r of the other row of the same number.

    Raises:
        ValueError: as `positive_statistics`.
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
    Only classes of two pictures or more are there; label -1 is no class.
    """
    rows, found = unit(features), {}
    for label in labels[labels >= 0].unique().tolist():
        mine = rows[labels == label]
        count = len(mine)
        if count > 1:
            # a row of zeros has no direction, and counts as unlike all others
            total, own = mine.sum(0).square().sum(), mine.square().sum()
            found[int(label)] = ((total - own) / (count * (count - 1))).item()
    return found


def between_class_similarity(features: Float[Tensor, "n F"], labels: Int[Tensor, "n"]) -> float:
    """Mean cosine of two pictures of different classes: what `intra_class_similarity` must beat.

    (|sum_all f|^2 - sum_c |sum_{i in c} f|^2) / (n^2 - sum_c n_c^2); NaN with one class.
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
        ValueError: for shapes that differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"two views of the same pictures needed: {first.shape}, {second.shape}")
    return (unit(first) - unit(second)).square().sum(1).mean().item()


def uniformity(features: Float[Tensor, "n F"]) -> float:
    """ln mean_{i < j} exp(-2 |f_i - f_j|^2) (Wang and Isola 2020), |f| = 1; lower is more spread.

    0 for equal rows, -8 for an antipodal pair, about -4 for rows all over a wide sphere.

    Raises:
        ValueError: for fewer than two rows.
    """
    rows = unit(features)
    count = len(rows)
    if count < 2:
        raise ValueError("at least two rows are needed")
    total = rows.new_zeros(())
    for chunk in rows.split(max(1, MAX_TILE // count)):
        squared = (2 - 2 * chunk @ rows.T).clamp_(min=0)
        total += (-2 * squared).exp_().sum()
    # every pair came twice, and every row met itself (exp 0 = 1)
    return ((total - count) / (count * (count - 1))).log().item()


def singular_values(features: Float[Tensor, "n F"]) -> Float[Tensor, "r"]:
    """Singular values of the rows as they are (neither centred nor scaled), largest first."""
    return torch.linalg.svdvals(features.double())


def rankme(features: Float[Tensor, "n F"]) -> float:
    """Effective rank exp(-sum_k p_k ln p_k), p = sigma / sum sigma + 1e-7 (Garrido et al. 2023).

    sigma: `singular_values`. At most min(n, F), which it approaches from below as n grows: the
    paper takes 25,600 pictures. I_3 gives 3, rank one 1.
    """
    sigma = singular_values(features)
    shares = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny) + RANKME_EPSILON
    return (-(shares * shares.log()).sum()).exp().item()


def feature_spread(features: Float[Tensor, "n F"]) -> float:
    """Mean over features of their standard deviation over unit rows, times sqrt(F).

    SimSiam's sign of collapse (Chen and He 2021): 0 when all rows are equal, near 1 when they are
    spread over the sphere.
    """
    return spread(unit(features)).item()


def spread(rows: Float[Tensor, "n F"]) -> Float[Tensor, ""]:
    """`feature_spread` of rows that are of unit length already, where they are."""
    return rows.std(0, correction=0).mean() * rows.shape[1] ** 0.5

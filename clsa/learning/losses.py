"""Losses: pure functions of tensors and a temperature, most built on one pass over a bank.

Letters: B queries, N bank rows, M of them covered by `candidates`, D projection dim.
Callers normalise the rows (L2) unless they have reasons not to; nothing here normalises. A bank
never receives a gradient, and no tensor larger than B x `chunk_for(...)` is allocated for it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 1024  # bank rows per tile; 1024 x 128 queries of float32 stay in a core's cache
CUDA_CHUNK = 16384

Queries = Float[Tensor, "B D"]
PerQuery = Float[Tensor, "B"]


def bank_statistics(
    query: Queries,
    bank: Float[Tensor, "N D"],
    temperature: float,
    candidates: Bool[Tensor, "B M"] | None = None,
) -> tuple[PerQuery, Queries]:
    """Log-partition and expected key of each query's similarity distribution over the bank.

    lse_i = log sum_j exp(q_i . z_j / T) and E_i = sum_j w_ij z_j with w_i = softmax(q_i Z^T / T).
    Every loss of this file and its gradient follow from these two, since d lse_i / d q_i = E_i / T
    and sum_j w_ij (s . z_j) = s . E_i: one streaming pass with a running maximum (the online
    softmax of Milakov and Gimelshein 2018) replaces the B x N matrices of probabilities.

    Args:
        query: rows to compare, any floating type; only `lse` carries a gradient to them.
        bank: rows compared with; must not require a gradient.
        temperature: T > 0.
        candidates: which of the first M bank rows each query may see; all queries see the other
            N - M. None: all queries see all rows. Each query must see at least one row.

    Returns:
        lse (B,) and expected_key (B, D), in float32 at least; expected_key is detached.

    Raises:
        ValueError: for a bank that requires a gradient, shapes that do not fit, or T <= 0. A query
            that sees no row is not detected (the host would have to wait): its lse is -inf.
    """
    if bank.requires_grad:
        raise ValueError("the bank must not require a gradient: detach it")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if query.ndim != 2 or bank.ndim != 2 or query.shape[1] != bank.shape[1]:
        raise ValueError(f"query (B, D) and bank (N, D) needed, got {query.shape}, {bank.shape}")
    if candidates is not None and (
        len(candidates) != len(query) or candidates.shape[1] > len(bank)
    ):
        raise ValueError(f"candidates (B, M <= N) needed, got {candidates.shape}")
    lse, expected_key = _BankStatistics.apply(query, bank, temperature, candidates)
    return lse, expected_key


class _BankStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, bank, temperature, candidates):
        with torch.autocast(query.device.type, enabled=False):
            lse, expected_key = _stream(query, bank, temperature, candidates)
        ctx.save_for_backward(expected_key)
        ctx.temperature, ctx.dtype = temperature, query.dtype
        ctx.mark_non_differentiable(expected_key)
        return lse, expected_key

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_lse, _):
        (expected_key,) = ctx.saved_tensors
        grad = expected_key * (grad_lse / ctx.temperature)[:, None]
        return grad.to(ctx.dtype), None, None, None


def chunk_for(rows: Tensor) -> int:
    """Bank rows per tile, on the device of `rows`."""
    return CUDA_CHUNK if rows.is_cuda else CHUNK


def _stream(
    query: Queries, bank: Tensor, temperature: float, candidates: Tensor | None
) -> tuple[PerQuery, Queries]:
    kind = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(kind) / temperature
    count, dim = scaled.shape
    maximum = scaled.new_full((count, 1), torch.finfo(kind).min)  # finite: (-inf) - (-inf) is NaN
    total = scaled.new_zeros(count, 1)
    expected = scaled.new_zeros(count, dim)
    chunk = chunk_for(scaled)
    num_masked = 0 if candidates is None else candidates.shape[1]
    for start in range(0, len(bank), chunk):
        rows = bank[start : start + chunk].to(kind)
        tile = scaled @ rows.T
        masked = min(num_masked - start, len(rows))
        if masked > 0:
            assert candidates is not None
            hidden = ~candidates[:, start : start + masked]
            tile[:, :masked].masked_fill_(hidden, -torch.inf)
        previous = maximum
        maximum = torch.maximum(previous, tile.amax(1, keepdim=True))
        tile.sub_(maximum).exp_()
        shrink = (previous - maximum).exp_()
        total.mul_(shrink).add_(tile.sum(1, keepdim=True))
        expected.mul_(shrink).addmm_(tile, rows)
    return (maximum + total.log()).squeeze(1), expected / total


class Stream(NamedTuple):
    """One set of queries with its statistics over a bank, shared by the losses that need it."""

    query: Queries
    temperature: float
    lse: PerQuery
    expected_key: Queries

    def at(self, temperature: float, bank: Tensor, candidates: Tensor | None) -> "Stream":
        """The same queries over the same bank at `temperature`, without gradient."""
        if temperature == self.temperature:
            return self
        return streams([self.query.detach()], bank, temperature, candidates)[0]

    def entropy(self) -> PerQuery:
        """Entropy of the similarity distribution in nats: H = lse - q . E / T."""
        return self.lse - dot(self.query, self.expected_key) / self.temperature


class Divergence(NamedTuple):
    """The divergence of all pairs of targets and predictions, and how far it is from its floor."""

    divergence: Float[Tensor, ""]
    """Summed over the pairs."""
    target_entropy: Float[Tensor, ""]
    """Mean H(t) in nats: the floor that the divergence per pair cannot go below."""
    kl: Float[Tensor, ""]
    """Mean KL(t || r) per pair in nats: divergence per pair minus its floor."""


class Losses(NamedTuple):
    """The terms of CLSA: `contrast`, summed over the weak queries, and those of `Divergence`."""

    contrast: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    target_entropy: Float[Tensor, ""]
    kl: Float[Tensor, ""]


def streams(
    queries: list[Queries],
    bank: Float[Tensor, "N D"],
    temperature: float,
    candidates: Bool[Tensor, "B M"] | None = None,
) -> list[Stream]:
    """`bank_statistics` of each set of queries, from which `contrast` and `divergence` follow."""
    if not queries:
        raise ValueError("at least one set of queries is needed")
    return [
        Stream(query, temperature, *bank_statistics(query, bank, temperature, candidates))
        for query in queries
    ]


def contrast(
    weak: list[Stream], bank: Float[Tensor, "N D"], positive: Int[Tensor, " B"]
) -> Float[Tensor, ""]:
    """`info_nce` summed over sets of queries, from their streams over `bank`."""
    keys = bank[positive].to(weak[0].lse.dtype)
    terms = [stream.lse - dot(stream.query, keys) / stream.temperature for stream in weak]
    return torch.stack(terms).sum(0).mean()


def divergence(targets: list[Stream], predicted: list[Stream]) -> Divergence:
    """`distribution_divergence` of all pairs, from their streams over the same bank.

    sum_w sum_s L_D(w -> s) = mean_i sum_s [ W lse_s - s . (sum_w E_w) / T ]: W + S streams serve
    W x S pairs. The targets receive no gradient.
    """
    expected = torch.stack([stream.expected_key for stream in targets]).sum(0)
    terms = [
        len(targets) * stream.lse - dot(stream.query, expected) / stream.temperature
        for stream in predicted
    ]
    total = torch.stack(terms).sum(0).mean()
    with torch.no_grad():
        entropy = torch.stack([stream.entropy().mean() for stream in targets]).mean()
        kl = total / (len(targets) * len(predicted)) - entropy
    return Divergence(total, entropy, kl)


def info_nce(
    query: Queries,
    bank: Float[Tensor, "N D"],
    positive: Int[Tensor, " B"],
    temperature: float = 0.2,
    candidates: Bool[Tensor, "B M"] | None = None,
) -> Float[Tensor, ""]:
    """Contrastive loss: L_C = mean_i [ lse(q_i Z^T / T) - q_i . z_{y_i} / T ], CLSA Eq. 1-3.

    Gradient: d L_C / d q_i = (E_i - z_{y_i}) / (T B). The loss is ln N when nothing is learned.

    Args:
        query: (B, D) weak queries.
        bank: (N, D) keys, including the positives.
        positive: bank row of each query's positive, int64; must be among its candidates.
        temperature: T > 0.
        candidates: see `bank_statistics`.
    """
    return contrast(streams([query], bank, temperature, candidates), bank, positive)


def lowest_info_nce(num_candidates: int, dim: int, temperature: float) -> float:
    """About the lowest `info_nce`: positives at similarity 1, negatives spread over the sphere.

    The similarities of the negatives then have variance 1/D, so that the loss is
    ln(1 + (N - 1) exp(1 / (2 D T^2) - 1 / T)): 6.19 for N = 65,537, D = 128, T = 0.2.
    """
    spread = 1 / (2 * dim * temperature**2) - 1 / temperature
    return math.log1p((num_candidates - 1) * math.exp(spread))


def distribution_divergence(
    weak: Queries | list[Queries],
    strong: Queries | list[Queries],
    bank: Float[Tensor, "N D"],
    temperature: float = 0.2,
    target_temperature: float | None = None,
    candidates: Bool[Tensor, "B M"] | None = None,
) -> Float[Tensor, ""]:
    """Distributional divergence (DDM): L_D = mean_i - sum_j t_ij log r_ij, CLSA Eq. 6-7.

    t = softmax(q Z^T / T_t) of the weak query, detached, is the target for r = softmax(s Z^T / T)
    of the strong one. With E_t the target's expected key, L_D = lse_s - s . E_t / T and
    d L_D / d s = (E_r - E_t) / (T B); no gradient flows to the weak query or the bank. Deviations
    from the official code: no log of a softmax (it underflows at small T), no B x N matrix.

    Args:
        weak: target queries, or a list of W of them.
        strong: predicted queries, or a list of S; W + S streams give the sum of the W x S pairs.
        bank: (N, D) keys.
        temperature: T of the strong distribution.
        target_temperature: T_t of the weak one; None: T.
        candidates: see `bank_statistics`; the same for weak and strong.
    """
    targets = [weak] if isinstance(weak, Tensor) else weak
    predicted = [strong] if isinstance(strong, Tensor) else strong
    cold = temperature if target_temperature is None else target_temperature
    target_streams = streams([query.detach() for query in targets], bank, cold, candidates)
    return divergence(target_streams, streams(predicted, bank, temperature, candidates)).divergence


def contrast_and_divergence(
    weak: list[Queries],
    strong: list[Queries],
    bank: Float[Tensor, "N D"],
    positive: Int[Tensor, " B"],
    temperature: float = 0.2,
    strong_temperature: float = 0.2,
    target_temperature: float = 0.2,
    candidates: Bool[Tensor, "B M"] | None = None,
    target: list[Queries] | None = None,
) -> Losses:
    """CLSA's two terms: `info_nce` of the weak queries, `distribution_divergence` of all pairs.

    The weak streams serve both terms when the target is the weak queries at the same temperature,
    so W = S = 5 costs ten streams for 5 + 25 terms.

    Args:
        weak, strong, bank, positive, candidates: as in the two losses.
        temperature: of the contrastive loss.
        strong_temperature, target_temperature: T and T_t of the divergence.
        target: queries that give the target instead of `weak` (for example the keys).
    """
    weak_streams = streams(weak, bank, temperature, candidates)
    if target is None:
        targets = [stream.at(target_temperature, bank, candidates) for stream in weak_streams]
    else:
        rows = [query.detach() for query in target]
        targets = streams(rows, bank, target_temperature, candidates)
    predicted = streams(strong, bank, strong_temperature, candidates)
    total = contrast(weak_streams, bank, positive)
    return Losses(total, *divergence(targets, predicted))


def dot(left: Tensor, right: Tensor) -> PerQuery:
    """Similarity of each row of `left` with the same row of `right`, in the type of `right`."""
    return (left.to(right.dtype) * right).sum(1)


def noise_contrastive(
    query: Queries,
    own: Queries,
    sampled: Float[Tensor, "M D"],
    log_normalizer: Float[Tensor, ""],
    num_rows: int,
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """Noise-contrastive estimation of a softmax over n rows by M of them (Wu et al. 2018, Eq. 5-7).

    Noise has probability 1/n, and h = P / (P + M/n) tells P(v | q) = exp(q . v / T) / Z from it:
    L = mean_i [ -ln h(own_i) - sum_j ln(1 - h(sampled_j)) ]. With a = q . v / T - ln(Z M / n), h is
    the logistic function of a, so that nothing overflows. If P = 1/n everywhere, then
    L = ln(1 + M) + M ln(1 + 1/M). Logits of B x M are held, in float32 or wider.

    Args:
        query: (B, D) queries; only these receive a gradient.
        own: (B, D) each query's own row.
        sampled: (M, D) rows drawn from all n with replacement; own rows may be among them.
        log_normalizer: ln Z, which is not trained.
        num_rows: n.
        temperature: T > 0.
    """
    kind = torch.promote_types(query.dtype, torch.float32)
    query, own, sampled = query.to(kind), own.detach().to(kind), sampled.detach().to(kind)
    shift = log_normalizer.detach() + math.log(len(sampled) / num_rows)
    with torch.autocast(query.device.type, enabled=False):
        negatives = query @ sampled.T / temperature - shift
    positives = dot(query, own) / temperature - shift
    return -(F.logsigmoid(positives) + F.logsigmoid(-negatives).sum(1)).mean()

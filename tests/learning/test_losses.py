import math

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor

from clsa.learning import losses
from clsa.learning.losses import (
    bank_statistics,
    contrast_and_divergence,
    distribution_divergence,
    info_nce,
)
from tests.support import reference


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.fixture(params=[1, 3, 7, 20, 1024])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(losses, "CHUNK", request.param)
    return request.param


MASKS = {
    "all": None,
    "own": torch.eye(4, dtype=torch.bool),
    "all but self": ~torch.eye(4, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS)
def test_losses_equal_float64_loops(chunk: int, mask: str) -> None:
    weak, strong, bank = unit(4, 6), unit(4, 6, seed=1), unit(20, 6, seed=2)
    positive = torch.tensor([0, 1, 2, 3]) if mask != "all but self" else torch.tensor([1, 0, 3, 2])
    args = (bank, positive, 0.2, MASKS[mask])
    expected = reference.info_nce(weak, *args)
    assert abs(info_nce(weak, *args).item() - expected) < 1e-10
    got = distribution_divergence(weak, strong, bank, 0.2, 0.1, MASKS[mask]).item()
    assert (
        abs(got - reference.distribution_divergence(weak, strong, bank, 0.2, 0.1, MASKS[mask]))
        < 1e-10
    )


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_equal_autograd_of_the_written_out_loss(chunk: int, mask: str) -> None:
    weak = unit(4, 6).requires_grad_()
    strong = unit(4, 6, seed=1).requires_grad_()
    bank, positive = unit(20, 6, seed=2), torch.arange(4)
    hidden = torch.zeros(4, 20, dtype=torch.bool)
    candidates = MASKS[mask]
    if candidates is not None:
        hidden[:, :4] = ~candidates
        positive = torch.tensor([4, 5, 6, 7])
    logits = [(x @ bank.T / 0.2).masked_fill(hidden, -torch.inf) for x in (weak, strong)]
    plain = F.cross_entropy(logits[0], positive)
    target = torch.softmax(logits[0].detach(), 1)
    plain = plain - (target * torch.log_softmax(logits[1], 1)).masked_fill(hidden, 0).sum(1).mean()
    wanted = torch.autograd.grad(plain, [weak, strong])
    terms = contrast_and_divergence([weak], [strong], bank, positive, candidates=candidates)
    got = torch.autograd.grad(terms.contrast + terms.divergence, [weak, strong])
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    weak, bank = unit(2, 3), unit(5, 3, seed=2)
    strong = unit(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distribution_divergence(weak, s, bank), strong)
    query = weak.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: info_nce(q, bank, torch.arange(2)), query)


def test_hand_computed_values() -> None:
    """methods: K = 1, T = 1, weak logits (1, 0), strong logits (0, 1)."""
    bank = torch.eye(2, dtype=torch.float64)
    weak = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    strong = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    terms = contrast_and_divergence([weak], [strong], bank, torch.tensor([0]), 1.0, 1.0, 1.0)
    assert terms.contrast.item() == pytest.approx(0.313262, abs=1e-6)
    assert terms.divergence.item() == pytest.approx(1.044320, abs=1e-6)
    assert terms.target_entropy.item() == pytest.approx(0.582203, abs=1e-6)
    assert terms.kl.item() == pytest.approx((math.e - 1) / (math.e + 1), abs=1e-9)


@pytest.mark.parametrize(("length", "value"), [(65536, 11.090370), (4096, 8.318010)])
def test_orthogonal_queries_give_the_log_of_the_bank(length: int, value: float) -> None:
    bank = torch.zeros(length + 1, 4)
    bank[:, 0] = 1
    query = torch.tensor([[0.0, 1, 0, 0]])
    assert info_nce(query, bank, torch.tensor([0])).item() == pytest.approx(value, abs=1e-5)


def test_equal_queries_leave_only_the_entropy() -> None:
    query, bank = unit(4, 6), unit(20, 6, seed=2)
    strong = query.clone().requires_grad_()
    terms = contrast_and_divergence([query], [strong], bank, torch.arange(4))
    assert terms.kl.item() == pytest.approx(0, abs=1e-12)
    assert terms.target_entropy.item() == pytest.approx(reference.entropy(query, bank, 0.2))
    (gradient,) = torch.autograd.grad(terms.divergence, strong)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_equal_bank_rows_give_log_n_and_no_gradient() -> None:
    bank = unit(1, 6).expand(20, 6).contiguous()
    weak, strong = unit(4, 6, seed=1).requires_grad_(), unit(4, 6, seed=2).requires_grad_()
    terms = contrast_and_divergence([weak], [strong], bank, torch.arange(4))
    assert terms.contrast.item() == pytest.approx(math.log(20))
    assert terms.divergence.item() == pytest.approx(math.log(20))
    for gradient in torch.autograd.grad(terms.contrast + terms.divergence, [weak, strong]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_pairs_equal_streams_five_by_five() -> None:
    weak = [unit(4, 6, seed=i) for i in range(5)]
    strong = [unit(4, 6, seed=10 + i).requires_grad_() for i in range(5)]
    bank, positive = unit(20, 6, seed=99), torch.arange(4)
    together = distribution_divergence(weak, strong, bank)
    apart = sum(distribution_divergence(w, s, bank) for w in weak for s in strong)
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=0)
    terms = contrast_and_divergence(weak, strong, bank, positive)
    torch.testing.assert_close(terms.divergence, together, atol=1e-12, rtol=0)
    total = terms.contrast + terms.divergence
    plain = reference.written_out(weak, strong, bank, positive)
    torch.testing.assert_close(total, plain, atol=1e-10, rtol=0)
    for a, b in zip(
        torch.autograd.grad(total, strong), torch.autograd.grad(plain, strong), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    pair_kl = together.item() / 25 - sum(reference.entropy(w, bank, 0.2) for w in weak) / 5
    assert terms.kl.item() == pytest.approx(pair_kl, abs=1e-10)


def test_cold_target_with_the_positive_on_top_is_info_nce_of_the_strong_query() -> None:
    bank = unit(20, 6)
    weak, strong, positive = bank[:4].clone(), unit(4, 6, seed=1), torch.arange(4)
    cold = distribution_divergence(weak, strong, bank, 0.2, target_temperature=1e-4)
    torch.testing.assert_close(cold, info_nce(strong, bank, positive), atol=1e-9, rtol=0)


def test_hot_target_is_the_mean_over_the_bank() -> None:
    weak, strong, bank = unit(4, 6), unit(4, 6, seed=1), unit(20, 6, seed=2)
    hot = distribution_divergence(weak, strong, bank, 0.2, target_temperature=1e9)
    lse, _ = bank_statistics(strong, bank, 0.2)
    wanted = (lse - (strong @ bank.T).mean(1) / 0.2).mean()
    torch.testing.assert_close(hot, wanted, atol=1e-7, rtol=0)


def test_divergence_sends_nothing_to_the_weak_query_or_the_bank() -> None:
    weak, strong = unit(4, 6).requires_grad_(), unit(4, 6, seed=1).requires_grad_()
    bank = unit(20, 6, seed=2)
    distribution_divergence(weak, strong, bank).backward()
    assert weak.grad is None and strong.grad is not None
    weak.grad = strong.grad = None
    contrast_and_divergence([weak], [strong], bank, torch.arange(4)).divergence.backward()
    assert weak.grad is None or not weak.grad.any()
    with pytest.raises(ValueError, match="gradient"):
        bank_statistics(weak, bank.clone().requires_grad_(), 0.2)


def test_gradient_is_bounded_and_tangent_after_normalisation() -> None:
    raw = (3 * unit(4, 6, seed=1)).requires_grad_()
    weak, bank = unit(4, 6), unit(20, 6, seed=2)
    strong = F.normalize(raw, dim=1)
    strong.retain_grad()
    distribution_divergence(weak, strong, bank, 0.2).backward()
    assert strong.grad is not None and raw.grad is not None
    assert (strong.grad.norm(dim=1) <= 2 / (0.2 * 4)).all()
    radial = (raw * raw.grad).sum(1)
    torch.testing.assert_close(radial, torch.zeros_like(radial), atol=1e-12, rtol=0)


def test_order_of_the_bank_does_not_matter() -> None:
    weak, strong, bank = unit(4, 6), unit(4, 6, seed=1), unit(20, 6, seed=2)
    shuffled = bank[torch.randperm(20, generator=torch.Generator().manual_seed(3))]
    a, b = (distribution_divergence(weak, strong, z) for z in (bank, shuffled))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_two_shards_merge_to_the_whole() -> None:
    query, bank = unit(4, 6), unit(20, 6, seed=2)
    lse, expected = bank_statistics(query, bank, 0.2)
    parts = [bank_statistics(query, shard, 0.2) for shard in (bank[:13], bank[13:])]
    weights = torch.softmax(torch.stack([part[0] for part in parts]), 0)
    torch.testing.assert_close(torch.logaddexp(parts[0][0], parts[1][0]), lse)
    merged = sum(w[:, None] * part[1] for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("temperature", [0.01, 0.2, 5.0])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_low_temperatures_and_long_rows_stay_finite_and_right(
    temperature: float, scale: float
) -> None:
    query, bank = scale * unit(4, 6), scale * unit(20, 6, seed=2)
    lse, expected = bank_statistics(query.float(), bank.float(), temperature)
    wanted = torch.logsumexp(query @ bank.T / temperature, 1)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-5, atol=1e-5)
    assert expected.isfinite().all()


def test_half_precision_queries_accumulate_in_float32_also_under_autocast() -> None:
    query, bank = unit(4, 64).bfloat16().requires_grad_(), unit(300, 64, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(query, bank, torch.arange(4))
    assert loss.dtype == torch.float32
    wanted = F.cross_entropy(query.detach().double() @ bank.double().T / 0.2, torch.arange(4))
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    loss.backward()
    assert query.grad is not None and query.grad.dtype == torch.bfloat16


def test_nothing_larger_than_queries_times_chunk_is_allocated() -> None:
    """The largest tensor that the dispatcher sees, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [item for item in tree_flatten(out)[0] if isinstance(item, Tensor)]
            self.numel = max([self.numel, *(item.numel() for item in tensors)])
            return out

    weak = [unit(32, 16, seed=i).requires_grad_() for i in range(3)]
    strong = [unit(32, 16, seed=9 + i).requires_grad_() for i in range(3)]
    bank = unit(10_000, 16, seed=2)
    with Largest() as seen:
        terms = contrast_and_divergence(weak, strong, bank, torch.arange(32))
        (terms.contrast + terms.divergence).backward()
    assert seen.numel == 32 * losses.CHUNK


@pytest.mark.parametrize(
    ("query", "bank", "temperature", "candidates"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), 0.2, None),
        (torch.ones(2, 3), torch.ones(4, 3), 0.0, None),
        (torch.ones(2, 3), torch.ones(4, 3), 0.2, torch.ones(2, 5, dtype=torch.bool)),
    ],
)
def test_shapes_and_temperatures_that_make_no_sense_are_refused(
    query: Tensor, bank: Tensor, temperature: float, candidates: Tensor | None
) -> None:
    with pytest.raises((ValueError, TypeCheckError), match=r"needed|positive|bank|candidates"):
        bank_statistics(query, bank, temperature, candidates)

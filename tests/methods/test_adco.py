from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.learning import bank
from clsa.learning.bank import LearnedNegatives
from clsa.learning.losses import info_nce, streams
from clsa.methods.adco import AdCo
from clsa.methods.method import Extent
from clsa.options.run import RunOptions
from tests.support import reference_adco
from tests.support.contract import batch_of, train

EXTENT = Extent(num_pictures=24, num_classes=3, steps_per_epoch=3, num_steps=12)


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def negatives_of(length: int = 9, dim: int = 5, seed: int = 7) -> LearnedNegatives:
    """Negatives in float64 whose lengths differ."""
    negatives = LearnedNegatives(length, dim, seed).double()
    negatives.rows.mul_(torch.linspace(0.3, 4, length, dtype=torch.float64)[:, None])
    return negatives


def gradient_of(negatives: LearnedNegatives, query: Tensor, keys: Tensor, cold: float) -> Tensor:
    (stream,) = streams([query], torch.cat([keys, negatives.unit()]), cold)
    return negatives.gradient(query, stream.lse, cold)


def build(**method: Any) -> AdCo:
    sizes = method.pop("sizes", (16,))
    values = {
        "batch_size": 8,
        "views": {"size": 16, "weak": {"sizes": sizes, "blur": 0.0}},
        "model": {
            "encoder": "resnet10-w32",
            "projector_hidden": 32,
            "projector_dim": 16,
            "norm_groups": 2,
        },
        "method": {"name": "adco", "num_negatives": 20, "key_momentum": 0.9, **method},
    }
    return AdCo(RunOptions.parse(values, "test"), EXTENT)


@pytest.mark.parametrize("chunk", [1, 4, 9, 4096])
@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_gradient_equals_the_loop_and_autograd(
    chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "NEGATIVES_CHUNK", chunk)
    negatives, query, keys = negatives_of(), unit(4, 5), unit(4, 5, seed=1)
    got = gradient_of(negatives, query, keys, temperature)
    loop = reference_adco.adversarial_gradient(query, keys, negatives.rows, temperature)
    torch.testing.assert_close(got, torch.tensor(loop, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    rows = negatives.rows.clone().requires_grad_()
    logits = query @ torch.cat([keys, F.normalize(rows)]).T / temperature
    (wanted,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(4)), rows)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_gradient_equals_finite_differences_of_the_loss() -> None:
    negatives, query, keys = negatives_of(3, 4), unit(2, 4), unit(2, 4, seed=1)
    got, tiny = gradient_of(negatives, query, keys, 0.3), 1e-6
    for k in range(3):
        for d in range(4):
            values = []
            for sign in (1, -1):
                moved = negatives.rows.clone()
                moved[k, d] += sign * tiny
                values.append(reference_adco.adversarial_loss(query, keys, moved, 0.3))
            assert (values[0] - values[1]) / (2 * tiny) == pytest.approx(got[k, d].item(), abs=1e-8)


def test_gradient_is_tangent_to_the_sphere_and_shrinks_with_the_length() -> None:
    negatives, query, keys = negatives_of(), unit(4, 5), unit(4, 5, seed=1)
    got = gradient_of(negatives, query, keys, 0.1)
    assert got.norm(dim=1).min() > 1e-6
    radial = (got * negatives.rows).sum(1)
    torch.testing.assert_close(radial, torch.zeros_like(radial), rtol=0, atol=1e-13)
    negatives.rows.mul_(2)
    torch.testing.assert_close(gradient_of(negatives, query, keys, 0.1), got / 2)


def test_small_steps_up_raise_the_loss_by_the_square_of_the_gradient() -> None:
    negatives, query, keys = negatives_of(), unit(4, 5), unit(4, 5, seed=1)
    before = reference_adco.adversarial_loss(query, keys, negatives.rows, 0.1)
    gradient = gradient_of(negatives, query, keys, 0.1)
    negatives.ascend(gradient, lr=1e-4, momentum=0.9, decay=0.0)
    rise = reference_adco.adversarial_loss(query, keys, negatives.rows, 0.1) - before
    assert rise == pytest.approx(1e-4 * gradient.square().sum().item(), rel=1e-2) and rise > 0


def test_a_negative_close_to_a_query_comes_closer_and_more_likely() -> None:
    negatives, query, keys = LearnedNegatives(9, 5, 7).double(), unit(4, 5), unit(4, 5, seed=1)
    negatives.rows[3] = query[2] + 1.2 * unit(1, 5, seed=9)[0]
    similarities, shares = [], []
    for _ in range(20):
        logits = query @ torch.cat([keys, negatives.unit()]).T / 0.1
        shares.append(torch.softmax(logits, 1)[2, 4 + 3].item())
        similarities.append(logits[2, 4 + 3].item() * 0.1)
        gradient = gradient_of(negatives, query, keys, 0.1)
        negatives.ascend(gradient, lr=1e-2, momentum=0.0, decay=0.0)
    assert similarities == sorted(similarities) and similarities[-1] > similarities[0] + 0.01
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.01


def test_ascent_equals_the_loop_and_decay_shrinks() -> None:
    negatives = negatives_of()
    first, speed = negatives.rows.tolist(), negatives.velocity.tolist()
    gradients = [unit(9, 5, seed=seed) for seed in range(3)]
    for gradient in gradients:
        negatives.ascend(gradient, lr=3.0, momentum=0.9, decay=1e-2)
    loop = reference_adco.ascended(first, speed, [g.tolist() for g in gradients], 3.0, 0.9, 1e-2)
    torch.testing.assert_close(negatives.rows, torch.tensor(loop, dtype=torch.float64))
    still = negatives_of()
    lengths = still.rows.norm(dim=1)
    still.ascend(torch.zeros_like(still.rows), lr=3.0, momentum=0.9, decay=1e-2)
    torch.testing.assert_close(still.rows.norm(dim=1), 0.97 * lengths)


def test_a_temperature_of_two_hundredths_stays_finite_in_float32() -> None:
    keys = unit(8, 16).float()
    negatives = LearnedNegatives(300, 16, seed=1)
    negatives.rows[:8] = keys  # similarity 1: exp(1 / T) alone would be 5e21
    got = gradient_of(negatives, keys, keys, 0.02)
    assert got.isfinite().all() and got.any()
    negatives.rows[20:] = 0  # decayed away: nothing has drawn them
    assert gradient_of(negatives, keys, keys, 0.02).isfinite().all()


def test_negatives_are_filled_in_order_before_they_ascend() -> None:
    """20 rows take three batches of 8; the third has room for four keys."""
    method = build()
    assert method.fill_steps == 3
    first = method.negatives.rows.clone()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(20))
    sent = []
    for step in range(3):
        state = method(batch_of(method, step)).state
        sent.append(state)
        method.after_step(state, step)
        filled = min(20, 8 * (step + 1))
        assert torch.equal(method.negatives.rows[:filled], torch.cat(sent)[:filled])
        assert torch.equal(method.negatives.rows[filled:], first[filled:])
    assert not method.negatives.velocity.any()


def test_key_network_follows_and_is_copied_once_when_the_negatives_are_full() -> None:
    method = build()
    for step in range(5):
        old = [parameter.clone() for parameter in method.key_network.parameters()]
        train(method, 1, step)
        share = 0.0 if step == 2 else 0.9
        pairs = zip(old, method.key_network.parameters(), method.network.parameters(), strict=True)
        for before, key, query in pairs:
            torch.testing.assert_close(key, share * before + (1 - share) * query)
            assert step != 2 or torch.equal(key, query)


@pytest.mark.parametrize(("reduce", "sizes"), [("sum", (16, 16)), ("mean", (16, 16)), ("sum", ())])
def test_step_computes_what_the_equations_say(reduce: str, sizes: tuple[int, ...]) -> None:
    method = build(reduce=reduce, sizes=sizes or (16,))
    train(method, 4)
    batch = batch_of(method, 4)
    output = method(batch)
    (comparison,) = output.comparisons
    keys, units = comparison.bank.split([8, 20])
    torch.testing.assert_close(units, F.normalize(method.negatives.rows))
    queries = [stream.query for stream in comparison.queries]  # pyright: ignore
    weight = 1 / len(queries) if reduce == "mean" else 1.0
    positive = torch.arange(8)
    losses = [info_nce(query, comparison.bank, positive, 0.12) for query in queries]
    torch.testing.assert_close(output.losses["contrast"], weight * torch.stack(losses).sum())
    rows = method.negatives.rows
    wanted = sum(
        weight * torch.tensor(reference_adco.adversarial_gradient(query, keys, rows, 0.02))
        for query in queries
    )
    torch.testing.assert_close(output.state, wanted, rtol=1e-3, atol=1e-6)
    # Only after_step moves them, by v = .9 v - G + decay w; one ascent came before.
    speed = 0.9 * method.negatives.velocity - output.state + 1e-4 * rows
    expected = rows - 3.0 * speed
    method.after_step(output.state, 4)
    torch.testing.assert_close(method.negatives.rows, expected)


def test_the_optimiser_has_no_negatives_and_the_loss_sends_them_no_gradient() -> None:
    method = build()
    assert not any(name.startswith("negatives") for name, _ in method.named_parameters())
    output = method(batch_of(method, 5))
    assert not output.state.requires_grad and not output.comparisons[0].bank.requires_grad

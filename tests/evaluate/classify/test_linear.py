import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from clsa.evaluate.classify import logistic as module
from clsa.evaluate.classify.linear import fitting, linear, rate_at
from clsa.evaluate.classify.linear_fast import fit, linear_fast
from clsa.evaluate.classify.logistic import fit_logistic, logistic, predict_logistic
from clsa.evaluate.features.extract import frozen
from clsa.evaluate.features.split import hold_out
from clsa.evaluate.results.heads import new_layer
from clsa.evaluate.results.records import Found, accuracies
from clsa.options.cards import FinetuneCard, LinearCard, LinearFastCard
from clsa.options.protocols import CARDS
from clsa.options.run import DataOptions
from clsa.pictures.sources import Pictures
from clsa.views import rng

CARD = LinearCard(about="", source="", epochs=4, batch_size=16, final_lr=0.01)


def problem(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    centres = torch.randn(4, 12, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(count, 12, generator=generator), labels


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_fit_equals_scikit_learn(l2: float) -> None:
    (x, y), (asked, _) = problem(1, 300), problem(2, 50)
    reference = LogisticRegression(C=1 / (len(x) * l2), tol=1e-10, max_iter=10_000)
    reference.fit(x.double().numpy(), y.numpy())
    weights = fit_logistic(x, y, 4, l2, tolerance=1e-8)
    found = predict_logistic(asked, weights).softmax(1)
    np.testing.assert_allclose(found, reference.predict_proba(asked.double().numpy()), atol=1e-4)


def test_gradient_is_that_of_the_loss_in_chunks_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem(1, 100)
    weights = torch.randn(4, 13, dtype=torch.float64, requires_grad=True)
    logits = x.double() @ weights[:, :-1].T + weights[:, -1]
    loss = nn.functional.cross_entropy(logits, y) + 0.05 * weights[:, :-1].square().sum()
    loss.backward()
    for chunk in (1000, 7):
        monkeypatch.setattr(module, "CHUNK", chunk)
        found, gradient = module._loss_and_gradient(weights.detach(), x, y, 0.1)
        torch.testing.assert_close(found, loss.detach())
        torch.testing.assert_close(gradient, weights.grad)


def values(found: list[Found]) -> dict[str, float]:
    return {one.metric: one.value for one in found}


def test_logistic_is_good_deterministic_and_ignores_scale_and_constants() -> None:
    bank, (asked, labels) = problem(1, 400), problem(2, 200)
    card = CARDS["logistic"]
    found, layer = logistic(bank, (asked, labels), 4, card, seed=0)
    assert found == logistic(bank, (asked, labels), 4, card, seed=0)[0]
    best = LogisticRegression().fit(bank[0].numpy(), bank[1].numpy())
    top1 = values(found)["top1"]
    assert abs(top1 - 100 * best.score(asked.numpy(), labels.numpy())) < 4
    assert 100 * (layer(asked).argmax(1) == labels).float().mean() == pytest.approx(top1)
    stretched = torch.cat([bank[0] * 1000 + 7, torch.full((400, 1), 0.3)], 1), bank[1]
    asked = torch.cat([asked * 1000 + 7, torch.full((200, 1), 0.3)], 1)
    again = values(logistic(stretched, (asked, labels), 4, card, seed=0)[0])["top1"]
    assert again == pytest.approx(top1, abs=1)


def slow_sgd(
    bank: tuple[torch.Tensor, torch.Tensor], rate: float, card: LinearFastCard
) -> nn.Linear:
    """One rate at a time, by autograd and torch's optimiser."""
    layer = new_layer(bank[0].shape[1], 4, seed=5)
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=1.0, momentum=card.momentum, weight_decay=card.weight_decay
    )
    for epoch in range(card.epochs):
        order = torch.from_numpy(rng.permutation(5, epoch, len(bank[1])))
        for start in range(0, len(order) - card.batch_size + 1, card.batch_size):
            rows = order[start : start + card.batch_size]
            optimizer.param_groups[0]["lr"] = (
                rate / 2 * (1 + math.cos(math.pi * epoch / card.epochs))
            )
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(bank[0][rows]), bank[1][rows]).backward()
            optimizer.step()
    return layer


def test_rates_learned_together_equal_rates_learned_one_by_one() -> None:
    bank, rates = problem(1, 100), (0.1, 3.0)
    card = LinearFastCard(about="", source="", epochs=3, batch_size=32, weight_decay=0.01)
    weights, biases = fit(bank, 4, rates, card, seed=5)
    for rate, found, bias in zip(rates, weights, biases, strict=True):
        slow = slow_sgd(bank, rate, card)
        torch.testing.assert_close(found, slow.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias, slow.bias.detach(), rtol=1e-4, atol=1e-5)


def test_the_rate_is_chosen_without_the_queries_and_suits_any_scale() -> None:
    bank, queries = problem(1, 400), problem(2, 200)
    card = CARDS["linear-fast"]
    found, layer = linear_fast(bank, queries, 4, card, seed=0)
    other = queries[0], (queries[1] + 1) % 4
    assert torch.equal(linear_fast(bank, other, 4, card, seed=0)[1].weight, layer.weight)
    reference = LogisticRegression().fit(bank[0].numpy(), bank[1].numpy())
    best = 100 * reference.score(queries[0].numpy(), queries[1].numpy())
    for scale in (0.1, 1.0, 10.0):
        scaled = (bank[0] * scale, bank[1]), (queries[0] * scale, queries[1])
        assert abs(values(linear_fast(*scaled, 4, card, seed=0)[0])["top1"] - best) < 5
    assert {(one.chosen, one.epoch) for one in found} == {("last", 100)}


def test_hold_out_is_a_fifth_and_the_rest() -> None:
    kept, held = hold_out(101, seed=3, slot=0)
    assert len(held) == 20 and sorted([*kept, *held]) == list(range(101))
    assert held.tolist() == hold_out(101, seed=3, slot=0)[1].tolist()
    assert held.tolist() != hold_out(101, seed=3, slot=1)[1].tolist()
    assert [len(rows) for rows in hold_out(2, seed=0, slot=0)] == [1, 1]


def test_balanced_accuracy_weighs_classes_alike() -> None:
    labels = torch.tensor([0] * 8 + [3] * 2)
    found = accuracies(torch.tensor([0] * 10), labels)
    assert found == {"top1": 80.0, "balanced": 50.0}


def test_rates_of_the_cards() -> None:
    """CLSA's cosine from 10 to 0.01; MoCo's steps at epochs 60 and 80; SwAV's at 12 and 16."""
    clsa, moco, tuning = CARDS["linear-clsa"], CARDS["linear-moco"], CARDS["finetune"]
    assert isinstance(clsa, LinearCard) and isinstance(moco, LinearCard)
    assert isinstance(tuning, FinetuneCard)
    rates = [rate_at(epoch, clsa.lr, clsa) for epoch in (0, 50, 100)]
    assert rates == pytest.approx([10, 5.005, 0.01])
    rates = [rate_at(epoch, moco.lr, moco) for epoch in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    rates = [rate_at(epoch, 1.0, tuning) for epoch in (0, 11, 12, 15, 16, 19)]
    assert rates == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])
    clim = CARDS["semi-10-clim"]
    assert isinstance(clim, FinetuneCard)
    rates = [rate_at(epoch, clim.lr, clim) for epoch in (19, 20, 39, 40)]
    assert rates == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6])


def test_batches_of_small_sets_can_be_shared() -> None:
    assert [fitting(256, count) for count in (1, 3, 7, 8, 21, 255, 256, 900)] == [
        1, 2, 4, 8, 16, 248, 256, 256,
    ]  # fmt: skip


def test_classifier_starts_small_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    first = new_layer(500, 100, seed=0)
    torch.manual_seed(2)
    assert torch.equal(first.weight, new_layer(500, 100, seed=0).weight)
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.02) and not first.bias.any()


def colours() -> tuple[Pictures, nn.Module]:
    """Reddish, greenish and bluish noise, and an encoder that takes the mean colour."""
    generator = np.random.default_rng(0)
    labels = np.arange(48) % 3
    images = generator.integers(0, 100, (48, 16, 16, 3)).astype(np.uint8)
    images[np.arange(48), :, :, labels] += 100
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    return Pictures(images, labels, ["red", "green", "blue"]), encoder


def test_the_papers_protocol_learns_and_repeats() -> None:
    source, encoder = colours()
    queries = torch.eye(3) - 0.5, torch.arange(3)
    with frozen(encoder):
        found, layer = linear(encoder, source, queries, 8, CARD, 0, DataOptions())
        again, same = linear(encoder, source, queries, 8, CARD, 0, DataOptions())
    assert found == again and torch.equal(layer.weight, same.weight)
    by = {(one.metric, one.chosen): one for one in found}
    assert set(by) == {(m, c) for m in ("top1", "balanced") for c in ("last", "best")}
    assert by["top1", "best"].value == 100.0 >= by["top1", "last"].value
    assert by["top1", "last"].epoch == 4 >= (by["top1", "best"].epoch or 9)


def test_every_epoch_sees_fresh_crops() -> None:
    source, encoder = colours()
    seen: list[torch.Tensor] = []
    encoder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].clone()))
    with frozen(encoder):
        whole = CARD.model_copy(update={"batch_size": 48, "epochs": 2})
        linear(encoder, source, (torch.eye(3), torch.arange(3)), 8, whole, 0, DataOptions())
    first, second = (images.sum((1, 2, 3)).sort().values for images in seen)
    assert len(first) == 48 and (first - second).abs().max() > 1

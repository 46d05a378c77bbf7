from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from clsa.command_options import EvaluateOptions
from clsa.evaluate import linear_fast as module
from clsa.evaluate.features import frozen
from clsa.evaluate.linear import linear, lr_at, new_classifier
from clsa.evaluate.linear_fast import fit_logistic, linear_fast, predict_logistic
from clsa.evaluate.results import accuracies
from clsa.evaluate.split import hold_out
from clsa.options import DataOptions
from clsa.sources import Pictures

OPTIONS = EvaluateOptions(run=Path("unused"), linear_epochs=4, batch_size=16)


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


def test_fast_is_good_deterministic_and_deaf_to_scale_and_constants() -> None:
    bank, (asked, labels) = problem(1, 400), problem(2, 200)
    found = linear_fast(bank, (asked, labels), 4, seed=0)
    assert found == linear_fast(bank, (asked, labels), 4, seed=0)
    best = LogisticRegression().fit(bank[0].numpy(), bank[1].numpy())
    assert abs(found["top1"] - 100 * best.score(asked.numpy(), labels.numpy())) < 4
    stretched = torch.cat([bank[0] * 1000 + 7, torch.full((400, 1), 0.3)], 1), bank[1]
    asked = torch.cat([asked * 1000 + 7, torch.full((200, 1), 0.3)], 1)
    assert linear_fast(stretched, (asked, labels), 4, seed=0)["top1"] == pytest.approx(
        found["top1"], abs=1
    )


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


def test_rate_falls_from_the_first_to_the_final_along_a_cosine() -> None:
    options = EvaluateOptions(run=Path("unused"))
    rates = [lr_at(epoch, options) for epoch in (0, 50, 100)]
    assert rates == pytest.approx([10, 5.005, 0.01])


def test_classifier_starts_small_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    first = new_classifier(500, 100, seed=0)
    torch.manual_seed(2)
    assert torch.equal(first.weight, new_classifier(500, 100, seed=0).weight)
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
        found = linear(encoder, source, queries, 8, OPTIONS, DataOptions())
        assert found == linear(encoder, source, queries, 8, OPTIONS, DataOptions())
    assert set(found) == {"top1", "balanced", "top1-best", "balanced-best"}
    assert found["top1-best"] == 100.0 >= found["top1"]


def test_every_epoch_sees_fresh_crops() -> None:
    source, encoder = colours()
    seen: list[torch.Tensor] = []
    encoder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].clone()))
    with frozen(encoder):
        whole = OPTIONS.model_copy(update={"batch_size": 48, "linear_epochs": 2})
        linear(encoder, source, (torch.eye(3), torch.arange(3)), 8, whole, DataOptions())
    first, second = (images.sum((1, 2, 3)).sort().values for images in seen)
    assert len(first) == 48 and (first - second).abs().max() > 1

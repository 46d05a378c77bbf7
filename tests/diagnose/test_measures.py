"""Measures against hand-computed values and slow loops, and under changes they must ignore."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.diagnose import measures
from clsa.diagnose.measures import (
    alignment,
    between_class_similarity,
    curve_distance,
    divergence,
    feature_spread,
    intra_class_similarity,
    positive_statistics,
    rankme,
    singular_values,
    uniformity,
)
from clsa.learning import losses


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator)


def shares(query: Tensor, bank: Tensor, temperature: float) -> list[float]:
    """softmax(q Z^T / T), one number at a time."""
    query = query.double() / query.double().norm()
    cosines = [float((query * z.double() / z.double().norm()).sum()) for z in bank]
    weights = [math.exp(cosine / temperature) for cosine in cosines]
    return [weight / sum(weights) for weight in weights]


# ---- positives and negatives


def test_equal_rows_share_evenly() -> None:
    bank = torch.ones(8, 3)
    found = positive_statistics(torch.ones(2, 3), bank, torch.tensor([0, 5]), 0.2)
    assert found.positive.tolist() == pytest.approx([1 / 8, 1 / 8], rel=1e-12)
    assert found.variance.tolist() == pytest.approx([0, 0], abs=1e-30)
    assert found.entropy.tolist() == pytest.approx([math.log(8)] * 2, rel=1e-12)
    assert not found.retrieved.any()  # nothing is nearer than the rest


def test_all_on_one_negative() -> None:
    """Var- = 1/K - 1/K^2 with K = 4."""
    bank = torch.eye(5)
    found = positive_statistics(bank[3:4], bank, torch.tensor([0]), 0.001)
    assert found.positive.item() == 0 and found.entropy.item() == pytest.approx(0, abs=1e-12)
    assert found.variance.item() == pytest.approx(1 / 4 - 1 / 16, rel=1e-12)


def test_all_on_the_positive() -> None:
    bank = torch.eye(5)
    found = positive_statistics(bank[:2], bank, torch.tensor([0, 1]), 0.001)
    assert found.positive.tolist() == [1, 1] and found.variance.tolist() == [0, 0]
    assert found.retrieved.all()


def test_against_a_loop_in_any_tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank, positive = rows(7, 5), rows(11, 5, 1), torch.arange(7) + 2
    whole = positive_statistics(queries, bank, positive, 0.3)
    for i, (query, own) in enumerate(zip(queries, positive.tolist(), strict=True)):
        p = shares(query, bank, 0.3)
        negatives = [share for j, share in enumerate(p) if j != own]
        variance = sum(share**2 for share in negatives) / 10 - ((1 - p[own]) / 10) ** 2
        assert whole.positive[i].item() == pytest.approx(p[own], rel=1e-12)
        assert whole.variance[i].item() == pytest.approx(variance, rel=1e-10)
        entropy = -sum(share * math.log(share) for share in p)
        assert whole.entropy[i].item() == pytest.approx(entropy, rel=1e-12)
        assert whole.retrieved[i].item() == (p[own] == max(p))
    monkeypatch.setattr(measures, "MAX_TILE", 25)
    for part, again in zip(whole, positive_statistics(queries, bank, positive, 0.3), strict=True):
        assert torch.allclose(part.double(), again.double(), rtol=1e-13)


def test_bank_order_and_length_of_rows_do_not_matter() -> None:
    queries, bank, positive = rows(4, 6), rows(9, 6, 1), torch.arange(4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    one = positive_statistics(queries, bank, positive, 0.2)
    other = positive_statistics(3 * queries, 7 * bank[order], order.argsort()[positive], 0.2)
    for first, second in zip(one, other, strict=True):
        assert torch.allclose(first.double(), second.double(), rtol=1e-5)


def test_positive_share_is_that_of_the_loss() -> None:
    queries, bank = F.normalize(rows(6, 4).double()), F.normalize(rows(10, 4, 1).double())
    positive = torch.arange(6)
    found = positive_statistics(queries, bank, positive, 0.2)
    loss = losses.info_nce(queries, bank, positive, 0.2).item()
    assert -found.positive.log().mean().item() == pytest.approx(loss, rel=1e-12)
    (stream,) = losses.streams([queries], bank, 0.2)
    assert torch.allclose(found.entropy, stream.entropy(), rtol=1e-10)


def test_divergence_by_hand() -> None:
    """K = 1, T = 1, logits (1, 0) against (0, 1): KL = (e - 1) / (e + 1)."""
    bank = torch.eye(2)
    expected = (math.e - 1) / (math.e + 1)
    assert divergence(bank[:1], bank[1:], bank, 1.0).item() == pytest.approx(expected, rel=1e-12)
    assert divergence(bank, bank, bank, 1.0).tolist() == [0, 0]


def test_divergence_is_the_loss_less_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    weak, strong, bank = (F.normalize(rows(6, 4, seed).double()) for seed in range(3))
    found = divergence(weak, strong, bank, 0.2)
    terms = losses.divergence(*(losses.streams([each], bank, 0.2) for each in (weak, strong)))
    assert found.mean().item() == pytest.approx(terms.kl.item(), rel=1e-10)
    monkeypatch.setattr(measures, "MAX_TILE", 7)
    assert torch.allclose(found, divergence(weak, strong, bank, 0.2), rtol=1e-12)


@pytest.mark.parametrize(
    ("queries", "bank", "positive", "temperature", "why"),
    [
        (rows(2, 3), rows(4, 2), torch.zeros(2).long(), 0.2, "rows"),
        (rows(2, 3), rows(1, 3), torch.zeros(2).long(), 0.2, "two rows"),
        (rows(2, 3), rows(4, 3), torch.zeros(3).long(), 0.2, "one positive per query"),
        (rows(2, 3), rows(4, 3), torch.zeros(2).long(), 0.0, "temperature"),
    ],
)
def test_rows_and_temperatures_that_do_not_fit_are_refused(
    queries: Tensor, bank: Tensor, positive: Tensor, temperature: float, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        positive_statistics(queries, bank, positive, temperature)


def test_views_of_other_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="same pictures"):
        alignment(rows(2, 3), rows(3, 3))
    with pytest.raises(ValueError, match="as many"):
        divergence(rows(2, 3), rows(3, 3), rows(4, 3), 0.2)
    with pytest.raises(ValueError, match="two rows"):
        uniformity(rows(1, 3))


def test_distance_of_curves() -> None:
    same = torch.tensor([1.0, 2.0, 3.0])
    assert curve_distance(same, same) == 0 and curve_distance(same, same + 10) == 1
    first, second = rows(40, 1)[:, 0], rows(30, 1, 1)[:, 0] + 0.5
    slow = max(
        abs((first <= x).double().mean() - (second <= x).double().mean()).item()
        for x in torch.cat([first, second])
    )
    assert curve_distance(first, second) == pytest.approx(slow, rel=1e-6)
    assert curve_distance(first.exp(), second.exp()) == curve_distance(first, second)


# ---- classes


def test_classes_that_agree_and_that_do_not() -> None:
    labels = torch.tensor([4, 4, 4, 2, 2, 7, -1])
    features = torch.cat([torch.ones(3, 8), torch.eye(8)[:2], torch.eye(8)[2:4]])
    assert intra_class_similarity(features, labels) == pytest.approx({4: 1.0, 2: 0.0}, abs=1e-12)


def test_similarity_of_classes_against_loops() -> None:
    features, labels = rows(12, 5), torch.arange(12) % 3
    unit = F.normalize(features.double())
    alike: dict[int, list[float]] = {0: [], 1: [], 2: []}
    apart = []
    for i, j in itertools.combinations(range(12), 2):
        cosine = float(unit[i] @ unit[j])
        alike[i % 3].append(cosine) if i % 3 == j % 3 else apart.append(cosine)
    expected = {label: sum(each) / len(each) for label, each in alike.items()}
    assert intra_class_similarity(features, labels) == pytest.approx(expected, rel=1e-12)
    between = between_class_similarity(features, labels)
    assert between == pytest.approx(sum(apart) / len(apart), rel=1e-12)
    order = torch.arange(11, -1, -1)
    assert intra_class_similarity(5 * features[order], labels[order]) == pytest.approx(expected)


def test_one_class_has_no_between_class_similarity() -> None:
    assert math.isnan(between_class_similarity(rows(3, 2), torch.zeros(3).long()))
    assert intra_class_similarity(rows(3, 2), torch.tensor([-1, -1, 0])) == {}


# ---- spread


def test_equal_rows_are_aligned_and_not_uniform() -> None:
    same = torch.tensor([[3.0, 4.0]]).repeat(5, 1)
    assert alignment(same, same) == 0
    assert uniformity(same) == pytest.approx(0, abs=1e-12)
    assert rankme(same) == pytest.approx(1, abs=1e-4) and feature_spread(same) < 1e-12


def test_opposite_rows() -> None:
    pair = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert uniformity(pair) == pytest.approx(-8, rel=1e-12)
    assert alignment(pair, -pair) == pytest.approx(4, rel=1e-12)
    assert alignment(pair, pair.flip(1)) == pytest.approx(2, rel=1e-12)


def test_uniformity_against_a_loop_in_any_tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    features = rows(13, 4)
    unit = F.normalize(features.double())
    terms = [
        math.exp(-2 * float((unit[i] - unit[j]).square().sum()))
        for i, j in itertools.combinations(range(13), 2)
    ]
    expected = math.log(sum(terms) / len(terms))
    assert uniformity(features) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(measures, "MAX_TILE", 30)
    assert uniformity(features) == pytest.approx(expected, rel=1e-12)


def test_ranks_by_hand() -> None:
    assert rankme(torch.eye(3)) == pytest.approx(3, abs=1e-4)
    assert rankme(torch.outer(torch.arange(1.0, 5), torch.ones(3))) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), abs=1e-4
    )
    turned = torch.linalg.qr(rows(6, 6).double()).Q
    features = rows(20, 6).double()
    assert rankme(features @ turned) == pytest.approx(rankme(features), rel=1e-9)
    assert rankme(5 * features) == pytest.approx(rankme(features), rel=1e-9)
    sigma = singular_values(torch.diag(torch.tensor([1.0, 3.0])))
    assert sigma.tolist() == pytest.approx([3, 1])


def test_wide_spread_is_near_one() -> None:
    assert feature_spread(rows(4000, 32)) == pytest.approx(1, abs=0.02)

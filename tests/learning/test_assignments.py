"""Assignments to prototypes (SwAV, DINO), and the loss of predicting them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.learning.assignments import entropy, sharpened, similarity, sinkhorn, swapped_prediction
from clsa.learning.bank import Prototypes
from tests.support import reference_assignments as reference


def scores_of(*shape: int, seed: int = 0) -> Tensor:
    """Cosines in [-1, 1], float64."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---- Sinkhorn


@pytest.mark.parametrize(
    ("epsilon", "wanted"),
    [(0.05, [[0.997527, 0.002473], [0.002473, 0.997527]]),
     (0.5, [[0.645656, 0.354344], [0.354344, 0.645656]])],
)  # fmt: skip
def test_sinkhorn_of_two_pictures_by_hand(epsilon: float, wanted: list[list[float]]) -> None:
    """methods 3.6: both pictures prefer prototype 0; balancing gives the second one the other."""
    scores = matrix([[0.9, 0.1], [0.6, 0.4]])
    got = sinkhorn(scores, epsilon, 3)
    torch.testing.assert_close(got, matrix(wanted), atol=1e-6, rtol=0)
    assert torch.softmax(scores / epsilon, 1)[1].argmax() == 0 != got[1].argmax()


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("epsilon", [0.02, 0.05, 0.5, 5.0])
def test_sinkhorn_equals_a_float64_loop(epsilon: float, iterations: int) -> None:
    scores = scores_of(7, 4)
    wanted = matrix(reference.sinkhorn(scores, epsilon, iterations))
    torch.testing.assert_close(sinkhorn(scores, epsilon, iterations), wanted, atol=1e-12, rtol=0)
    single = sinkhorn(scores.float(), epsilon, iterations)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, atol=2e-5, rtol=0)


def test_every_picture_is_assigned_once_and_every_prototype_gets_its_share() -> None:
    scores = scores_of(12, 4)
    scores[:, 0] += 1.5  # all pictures prefer it
    few, many = sinkhorn(scores, 0.05, 3), sinkhorn(scores, 0.05, 1000)
    for codes in (few, many):
        torch.testing.assert_close(codes.sum(1), torch.ones(12).double(), atol=1e-12, rtol=0)
        assert (codes >= 0).all()
    torch.testing.assert_close(many.sum(0), torch.full((4,), 3.0).double(), atol=1e-5, rtol=0)
    alone = torch.softmax(scores / 0.05, 1).sum(0)
    assert alone.max() > 10 and few.sum(0).max() < 5


def test_equal_pictures_are_spread_evenly_whatever_they_prefer() -> None:
    same = scores_of(1, 5).expand(8, 5)
    uniform = torch.full((8, 5), 0.2, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(same, 0.05, 3), uniform, atol=1e-12, rtol=0)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-3, 1e3])
def test_no_epsilon_overflows_or_empties_a_prototype(epsilon: float) -> None:
    """exp(1 / 1e-6) overflows, and exp(-1 / 1e-6) would leave a prototype's sum at zero."""
    scores = scores_of(7, 4).float()
    scores[:, 0] = -1  # no picture prefers it
    codes = sinkhorn(scores, epsilon, 3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(7), atol=1e-5, rtol=0)


def test_order_of_pictures_and_prototypes_does_not_matter() -> None:
    scores = scores_of(7, 4)
    codes = sinkhorn(scores)
    torch.testing.assert_close(sinkhorn(scores.flip(0)).flip(0), codes, atol=1e-12, rtol=0)
    torch.testing.assert_close(sinkhorn(scores.flip(1)).flip(1), codes, atol=1e-12, rtol=0)


def test_assignments_carry_no_gradient() -> None:
    scores = scores_of(7, 4).requires_grad_()
    assert not sinkhorn(scores).requires_grad
    assert not sharpened(scores, torch.zeros(4).double(), 0.04).requires_grad


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.0, 3), (-1.0, 3), (0.05, 0)])
def test_sinkhorn_refuses_invalid_arguments(epsilon: float, iterations: int) -> None:
    with pytest.raises(ValueError, match="positive epsilon and iterations"):
        sinkhorn(scores_of(2, 2), epsilon, iterations)


# ---- the teacher's assignments


@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_sharpened_equals_a_float64_loop(temperature: float) -> None:
    scores, center = scores_of(5, 6), scores_of(6, seed=1)
    wanted = matrix(reference.sharpened(scores, center, temperature))
    torch.testing.assert_close(sharpened(scores, center, temperature), wanted, atol=1e-12, rtol=0)


def test_the_centre_removes_what_all_pictures_share() -> None:
    shared = scores_of(1, 6)
    got = sharpened(shared.expand(5, 6), shared[0], 0.04)
    torch.testing.assert_close(got, torch.ones(5, 6).double() / 6, atol=1e-12, rtol=0)
    assert entropy(got).item() == pytest.approx(math.log(6))


def test_entropy_of_one_choice_is_zero() -> None:
    assert entropy(torch.eye(4)).item() == 0
    half = torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0]])
    assert entropy(half).item() == pytest.approx(math.log(2) / 2)


# ---- predicting them


@pytest.mark.parametrize(("assigning", "views"), [(1, 2), (2, 2), (2, 5), (3, 3)])
def test_swapped_prediction_equals_a_float64_loop(assigning: int, views: int) -> None:
    scores = [scores_of(5, 6, seed=seed) for seed in range(views)]
    targets = [sinkhorn(each) for each in scores[:assigning]]
    wanted = reference.swapped_prediction([each.tolist() for each in targets], scores, 0.1)
    assert swapped_prediction(targets, scores, 0.1).item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("count", [10, 3000])
def test_a_uniform_student_of_a_uniform_teacher_loses_the_log_of_the_prototypes(count: int) -> None:
    flat = torch.zeros(4, count)
    targets = [sharpened(flat, torch.zeros(count), 0.04)] * 2
    loss = swapped_prediction(targets, [flat] * 4, 0.1)
    assert loss.item() == pytest.approx(math.log(count), rel=1e-6)


def test_gradient_is_the_difference_of_predicted_and_assigned() -> None:
    """d L / d s_v = (n_v p - sum_a t_a) / (T B pairs), n_v the number of targets for view v."""
    scores = [scores_of(5, 6, seed=seed).requires_grad_() for seed in range(4)]
    targets = [sinkhorn(each).requires_grad_() for each in scores[:2]]
    swapped_prediction(targets, scores, 0.1).backward()
    assert all(target.grad is None for target in targets)
    pairs = 2 * 3
    for view, each in enumerate(scores):
        others = [target.detach() for place, target in enumerate(targets) if place != view]
        predicted = torch.softmax(each.detach() / 0.1, 1)
        wanted = (len(others) * predicted - sum(others)) / (0.1 * 5 * pairs)
        assert each.grad is not None
        torch.testing.assert_close(each.grad, wanted, atol=1e-12, rtol=0)


def test_a_view_never_predicts_its_own_assignment() -> None:
    first, second = scores_of(5, 6), scores_of(5, 6, seed=1)
    target = sinkhorn(first)
    alone = swapped_prediction([target], [first, second], 0.1)
    changed = swapped_prediction([target], [scores_of(5, 6, seed=9), second], 0.1)
    assert torch.equal(alone, changed)


def test_two_views_are_needed() -> None:
    scores = scores_of(5, 6)
    for targets, views in (([scores], [scores]), ([], [scores]), ([scores] * 3, [scores] * 2)):
        with pytest.raises(ValueError, match="two views needed"):
            swapped_prediction(targets, views, 0.1)


def test_scores_are_in_float32_under_autocast() -> None:
    rows, prototypes = scores_of(5, 64), scores_of(7, 64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = similarity(rows.float(), prototypes.float())
        codes = sinkhorn(got)
        loss = swapped_prediction([codes], [got, got], 0.1)
    assert got.dtype == codes.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(got.double(), rows @ prototypes.T, atol=1e-4, rtol=0)
    assert similarity(rows.bfloat16(), prototypes.float()).dtype == torch.float32


# ---- prototypes


def test_prototypes_start_as_unit_rows_of_their_seed() -> None:
    rows = Prototypes(9, 5, 3).rows
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(9))
    assert torch.equal(rows, Prototypes(9, 5, 3).rows)
    assert not torch.equal(rows, Prototypes(9, 5, 4).rows)


def test_frozen_prototypes_are_the_same_rows_with_a_gradient_of_zero() -> None:
    prototypes = Prototypes(9, 5, 3)
    assert torch.equal(prototypes(frozen=True), prototypes())
    (prototypes(frozen=True) * scores_of(9, 5).float()).sum().backward()
    assert prototypes.rows.grad is not None and not prototypes.rows.grad.any()
    prototypes().sum().backward()
    assert (prototypes.rows.grad == 1).all()


def test_normalised_prototypes_keep_their_direction() -> None:
    prototypes = Prototypes(9, 5, 3)
    before = prototypes.rows.detach().clone()
    with torch.no_grad():
        prototypes.rows.mul_(torch.linspace(0.1, 5, 9)[:, None])
    prototypes.normalise()
    torch.testing.assert_close(prototypes.rows.detach(), before)
    assert F.cosine_similarity(prototypes.rows, before).min() > 1 - 1e-6
    assert prototypes.rows.requires_grad and prototypes.rows.is_leaf

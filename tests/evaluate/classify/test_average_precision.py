from itertools import pairwise, product

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from clsa.evaluate.classify.average_precision import average_precision
from clsa.evaluate.classify.voc07 import mean_ap, per_picture_ap


def slow(right: list[bool], positives: int, points: str) -> float:
    """By the definition: for every recall, the best precision at that recall or a higher one."""
    hits, pairs = 0, []
    for place, one in enumerate(right, start=1):
        hits += one
        pairs.append((hits / positives, hits / place))

    def envelope(recall: float) -> float:
        return max((p for r, p in pairs if r >= recall - 1e-12), default=0.0)

    if points == "11":
        return sum(envelope(k / 10) for k in range(11)) / 11
    recalls = [0.0, *sorted({r for r, _ in pairs})]
    steps = pairwise(recalls)
    return sum((high - low) * envelope(high) for low, high in steps)


def test_values_worked_out_by_hand() -> None:
    """(+, -, +) with 2 to find: precision 1 up to recall 1/2, then 2/3."""
    right = np.array([True, False, True])
    assert average_precision(right, 2, "11") == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert average_precision(right, 2, "11") == pytest.approx(0.848485, abs=1e-6)
    assert average_precision(right, 2, "all") == pytest.approx(0.833333, abs=1e-6)
    assert average_precision(right, 4, "all") == pytest.approx((1 + 2 / 3) / 4)  # two never found
    for points in ("all", "11"):
        assert average_precision(np.array([True] * 3), 3, points) == 1.0
        assert average_precision(np.array([False] * 3), 3, points) == 0.0
        assert average_precision(np.zeros(0, bool), 3, points) == 0.0


@pytest.mark.parametrize("points", ["all", "11"])
def test_every_short_ranking_against_the_definition(points: str) -> None:
    for length in range(1, 8):
        for right in product([False, True], repeat=length):
            for missed in (0, 1, 3):
                positives = sum(right) + missed
                if positives:
                    found = average_precision(np.array(right), positives, points)  # pyright: ignore
                    assert found == pytest.approx(slow(list(right), positives, points), abs=1e-12)


def test_per_picture_and_per_class_ap_differ() -> None:
    scores, there = np.array([[0.2, 0.1], [0.8, 0.9]]), np.array([[1, 0], [0, 1]])
    assert per_picture_ap(scores, there == 1) == 100.0
    assert mean_ap(scores, there, "all", dropped=True) == 75.0


def test_per_picture_equals_scikit_learn_with_ties_and_empty_pictures() -> None:
    drawn = np.random.default_rng(0)
    scores = drawn.integers(0, 6, (60, 7)) / 6.0  # many ties
    there = drawn.random((60, 7)) < 0.3
    there[:5] = False
    shown = there.any(1)
    reference = [
        average_precision_score(t, s) for t, s in zip(there[shown], scores[shown], strict=True)
    ]
    assert per_picture_ap(scores, there) == pytest.approx(100 * np.mean(reference), abs=1e-9)


def test_the_mean_over_classes_bounds_scikit_learns() -> None:
    """scikit-learn takes no envelope, so its average precision is never larger; often equal."""
    drawn = np.random.default_rng(1)
    scores, there = drawn.normal(size=(200, 5)), drawn.random((200, 5)) < 0.2
    plain = 100 * average_precision_score(there, scores, average="macro")
    found = mean_ap(scores, there.astype(int), "all", dropped=True)
    assert plain <= found < plain + 3
    perfect = there + scores / 100
    assert mean_ap(perfect, there.astype(int), "all", dropped=True) == 100.0


def test_difficult_ones_are_dropped_or_wrong_and_an_empty_class_is_left_out() -> None:
    scores = np.array([[0.9, 0.0], [0.8, 0.0], [0.7, 0.0]])
    targets = np.array([[-1, 0], [1, 0], [0, 0]])
    assert mean_ap(scores, targets, "all", dropped=True) == 100.0
    assert mean_ap(scores, targets, "all", dropped=False) == 50.0


def test_of_equal_scores_the_earlier_picture_comes_first() -> None:
    scores = np.full((2, 1), 0.5)
    assert mean_ap(scores, np.array([[1], [0]]), "all", dropped=True) == 100.0
    assert mean_ap(scores, np.array([[0], [1]]), "all", dropped=True) == 50.0

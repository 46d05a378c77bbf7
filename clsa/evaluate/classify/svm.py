"""Support vector machines on frozen features: VOC07, and few pictures per class."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from clsa.evaluate.classify.voc07 import DIFFICULT, THERE, mean_ap
from clsa.evaluate.results.records import Found
from clsa.options.cards import LowshotCard, SvmCard
from clsa.system.extras import require
from clsa.views import rng

EPSILON = 1e-5
FALLBACK = 0.5


def machine(cost: float) -> Any:
    """An unfitted LinearSVC of scikit-learn, with the settings of VISSL's and PCL's scripts.

    Squared hinge, L2, dual, tolerance 1e-4, at most 2,000 iterations; positives weigh double.
    """
    svm = require("sklearn.svm", "evaluation", "support vector machine")
    return svm.LinearSVC(
        C=cost, class_weight={1: 2.0, -1: 1.0}, penalty="l2", loss="squared_hinge", dual=True,
        tol=1e-4, max_iter=2000, random_state=0,
    )  # fmt: skip


def scaled(features: Float[np.ndarray, "n F"]) -> Float[np.ndarray, "n F"]:
    """f / (|f| + 1e-5)."""
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + EPSILON)


def voc07_svm(
    train: tuple[Float[np.ndarray, "N F"], Int64[np.ndarray, "N C"]],
    test: tuple[Float[np.ndarray, "n F"], Int64[np.ndarray, "n C"]],
    card: SvmCard,
) -> list[Found]:
    """`map` in percent, by all-points AP, of one support vector machine per class.

    As VISSL does, C is chosen for each class by average precision over three folds of `trainval`.
    PCL takes 0.5 for all (`--change costs=[0.5]`); here a class with fewer positives or negatives
    than folds gets 0.5.

    Args:
        train, test: features and targets (see `voc07.Marked`).
        card: costs, number of folds, and what to do with difficult objects.
    """
    (features, targets), asked = (train, scaled(test[0]))
    features = scaled(features)
    scores = np.zeros(test[1].shape)
    for column in range(targets.shape[1]):
        known = targets[:, column] != DIFFICULT
        kept = known if card.train_difficult == "dropped" else np.full(len(known), True)
        wanted = np.where(targets[kept, column] == THERE, 1, -1)
        if len(np.unique(wanted)) < 2:
            continue
        cost = chosen_cost(features[kept], wanted, card)
        fitted = machine(cost).fit(features[kept], wanted)
        scores[:, column] = fitted.decision_function(asked)
    dropped = card.test_difficult == "dropped"
    return [Found("map", mean_ap(scores, test[1], "all", dropped))]


def chosen_cost(
    features: Float[np.ndarray, "n F"], wanted: Int64[np.ndarray, "n"], card: SvmCard
) -> float:
    """The cost with the highest mean average precision over the folds; the first of equals."""
    if len(card.costs) == 1:
        return card.costs[0]
    if min((wanted == 1).sum(), (wanted == -1).sum()) < card.folds:
        return FALLBACK
    selection = require("sklearn.model_selection", "evaluation", "choice of C")
    found = [
        selection.cross_val_score(
            machine(cost), features, wanted, cv=card.folds, scoring="average_precision"
        ).mean()
        for cost in card.costs
    ]
    return card.costs[int(np.argmax(found))]


def lowshot(
    bank: tuple[Float[np.ndarray, "N F"], Int64[np.ndarray, "N"]],
    queries: tuple[Float[np.ndarray, "n F"], Int64[np.ndarray, "n"]],
    num_classes: int,
    card: LowshotCard,
    seed: int,
) -> list[Found]:
    """`top1-kK` in percent for each number K of pictures per class: the mean over the draws.

    Each class gets a machine against the rest. The class with the highest decision value wins; of
    equal values the first class. If a class has fewer than K pictures, all of them are used.
    """
    features, asked = scaled(bank[0]), scaled(queries[0])
    found = []
    for shots in card.shots:
        right = []
        for draw in range(card.draws):
            rows = drawn(bank[1], shots, seed, draw)
            scores = np.full((len(asked), num_classes), -np.inf)
            for place in np.unique(bank[1][rows]):
                wanted = np.where(bank[1][rows] == place, 1, -1)
                fitted = machine(card.cost).fit(features[rows], wanted)
                scores[:, place] = fitted.decision_function(asked)
            right.append((scores.argmax(1) == queries[1]).mean())
        found.append(Found(f"top1-k{shots}", 100 * float(np.mean(right))))
    return found


def drawn(
    labels: Int64[np.ndarray, "n"], shots: int, seed: int, draw: int
) -> Int64[np.ndarray, "m"]:
    """Rows of up to `shots` pictures of each class, chosen by (seed, draw)."""
    slots = np.array([draw], np.int64)
    rows = np.arange(len(labels), dtype=np.int64)
    order = np.argsort(rng.uniforms(seed, 0, rows, rng.LOWSHOT, slots)[:, 0], kind="stable")
    chosen = [order[labels[order] == place][:shots] for place in np.unique(labels)]
    return np.sort(np.concatenate(chosen))

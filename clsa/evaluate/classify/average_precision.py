"""Average precision of a ranking, by both of VOC's conventions."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Points = Literal["all", "11"]


def average_precision(
    right: Bool[np.ndarray, " n"], num_positives: int, points: Points = "all"
) -> float:
    """Average precision, in [0, 1], of answers ranked by falling score.

    With P(k) and R(k) the precision and the recall of the first k answers: "all" (VOC from 2010 on)
    sums (R(k) - R(k-1)) max_{j >= k} P(j); "11" (VOC 2007) is the mean over r in {0, 0.1, ..., 1}
    of max {P(k): R(k) >= r}, or 0 if no R(k) reaches r. With two positives, the ranking right,
    wrong, right has 0.8333 by "all" and 0.8485 by "11".

    Args:
        right: whether each answer is right, the surest first.
        num_positives: number of positives, found or not.
        points: which convention.

    Returns:
        The average precision; NaN if there are no positives.
    """
    if num_positives == 0:
        return float("nan")
    precision, recall = curve(right, num_positives)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # maximum over this and all later answers
    if points == "all":
        return float(np.sum(np.diff(recall, prepend=0.0) * best))
    # compare counts, not shares: in floats, 0.1 * 3 is not 0.3
    needed = np.searchsorted(np.cumsum(right) * 10, np.arange(11) * num_positives)
    return float(np.append(best, 0.0)[needed].mean())


def curve(
    right: Bool[np.ndarray, " n"], num_positives: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Precision and recall of the first 1, 2, ... answers."""
    found = np.cumsum(right)
    return found / np.arange(1, len(right) + 1), found / num_positives

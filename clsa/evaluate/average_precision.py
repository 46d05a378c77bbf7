"""Average precision of a ranking, by the two conventions of VOC."""

from typing import Literal

import numpy as np
from jaxtyping import Bool

RECALLS = np.arange(11) / 10


def average_precision(
    right: Bool[np.ndarray, " n"], num_positives: int, points: Literal["all", "11"]
) -> float:
    """Average precision in [0, 1] of answers sorted from the surest on.

    With recall R_i and precision P_i after i answers and the envelope E(r) = max over R_i >= r of
    P_i (0 where there is none): "all" (VOC from 2010 on, and the scripts of VISSL and PCL) is the
    area under E, sum_i (R_i - R_(i-1)) E(R_i); "11" (VOC 2007) the mean of E(0), E(0.1), ..., E(1).
    Of the ranking (+, -, +) with 2 positives they are 0.8333 and 0.8485.

    Args:
        right: whether each answer is right, the surest first.
        num_positives: all that there was to find, at least 1.
    """
    hits = np.cumsum(right)
    recall = hits / num_positives
    precision = hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if points == "all":
        return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
    first = np.searchsorted(hits, RECALLS * num_positives - 1e-9)  # of recall r or more
    return float(np.sum(envelope[first[first < len(right)]]) / len(RECALLS))

"""The losses of this package, for use on their own: pure functions of tensors and a temperature.

    from clsa import losses

    loss = losses.info_nce(query, bank, positive, temperature=0.2)

They need no run, no options and no other part of clsa. Each docstring gives the equation and its
source; shapes are in the signatures: B batch, N candidates, K prototypes, D projection dim.
"""

from clsa.learning.assignments import (
    entropy,
    sharpened,
    similarity,
    sinkhorn,
    soft_bank_cross_entropy,
    swapped_prediction,
)
from clsa.learning.losses import (
    Divergence,
    Losses,
    Stream,
    bank_statistics,
    contrast,
    contrast_and_divergence,
    cosine_regression,
    distribution_divergence,
    divergence,
    info_nce,
    lowest_info_nce,
    noise_contrastive,
    nt_xent,
    streams,
    suncet,
)
from clsa.learning.mixture_loss import mixed_contrast

__all__ = [
    "Divergence",
    "Losses",
    "Stream",
    "bank_statistics",
    "contrast",
    "contrast_and_divergence",
    "cosine_regression",
    "distribution_divergence",
    "divergence",
    "entropy",
    "info_nce",
    "lowest_info_nce",
    "mixed_contrast",
    "noise_contrastive",
    "nt_xent",
    "sharpened",
    "similarity",
    "sinkhorn",
    "soft_bank_cross_entropy",
    "streams",
    "suncet",
    "swapped_prediction",
]

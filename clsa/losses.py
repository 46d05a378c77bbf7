"""The losses of this package, to be used alone: pure functions of tensors and a temperature.

    from clsa import losses

    loss = losses.info_nce(query, bank, positive, temperature=0.2)

They need no run and no options. Rows of queries, keys and banks are expected to be normalised.
Each docstring gives the equation and its source; shapes stand in the signatures: b and B rows of
this process and of all, N rows of a bank, M of them that may be hidden, K prototypes, D projection
dim. Under torch.distributed, `nt_xent` and `suncet` use the rows of all processes.

    over a bank of rows
      info_nce                   contrast with one positive (MoCo)
      distribution_divergence    CLSA's divergence between a weak and a strong query
      contrast_and_divergence    both in one pass
      bank_statistics            the pass itself: log-sum-exp and mean similarity of each query
      noise_contrastive          InstDisc
      soft_bank_cross_entropy    relations to a bank (continual pretraining)
      lowest_info_nce            the smallest value that info_nce can take
    between the rows of a batch
      nt_xent                    SimCLR
      suncet                     rows of one class attract each other
      cosine_regression          BYOL, SimSiam
    between assignments to prototypes
      swapped_prediction         SwAV, DINO
      sinkhorn, sharpened        targets of SwAV, of DINO
      similarity, entropy
    to share one pass among several losses
      streams                    queries with their statistics over a bank, as `Stream`
      contrast, divergence       of such streams; `Divergence`, `Losses` are what comes back
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
    distribution_divergence,
    divergence,
    info_nce,
    lowest_info_nce,
    noise_contrastive,
    streams,
)
from clsa.learning.pair_losses import cosine_regression, nt_xent, suncet

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

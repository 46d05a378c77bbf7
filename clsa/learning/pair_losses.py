"""Losses between the rows of a batch: SimCLR, SuNCEt, BYOL and SimSiam."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clsa.learning.bank import own_rows
from clsa.learning.losses import Queries, dot
from clsa.system import dist


def nt_xent(first: Queries, second: Queries, temperature: float = 0.1) -> Float[Tensor, ""]:
    """SimCLR's loss over both views of the global batch (Chen et al. 2020, Eq. 1).

    l(i, j) = -log[ exp(z_i . z_j / T) / sum_{k != i} exp(z_i . z_k / T) ] over the 2B rows of all
    ranks, L = 1/2B sum over both directions of every pair. A row never sees itself; all other
    rows are candidates, and all receive gradient, across ranks too. Deviation: the official code
    returns twice this loss (the sum of two means). Logits of 2b x 2B are held, in float32.

    Args:
        first, second: unit rows of this rank's pictures, the same number on every rank.
        temperature: T > 0.
    """
    kind = torch.promote_types(first.dtype, torch.float32)
    first, second = first.to(kind), second.to(kind)
    everyone = torch.cat([dist.all_gather_with_grad(rows) for rows in (first, second)])
    own, count = own_rows(len(first), first.device), len(everyone) // 2
    itself, positive = torch.cat([own, own + count]), torch.cat([own + count, own])
    with torch.autocast(first.device.type, enabled=False):
        logits = torch.cat([first, second]) @ everyone.T / temperature
        return F.cross_entropy(logits.scatter_(1, itself[:, None], -torch.inf), positive)


def suncet(rows: Queries, labels: Int[Tensor, " B"], temperature: float = 0.1) -> Float[Tensor, ""]:
    """Supervised noise contrastive estimation over the labelled rows of all ranks (SuNCEt, Assran
    et al. 2020): rows of one class attract.

    L = mean_i -log[ sum_{j != i, y_j = y_i} exp(z_i . z_j / T) / sum_{j != i} exp(z_i . z_j / T) ]:
    the sum over a class is inside the logarithm. L is 0 for one class, and for equal rows of c
    classes with b rows each -ln((b - 1) / (c b - 1)). Every row takes gradient, across ranks too.
    The mean over i leaves out rows of unknown class, or alone in their class (they stand in for
    unreadable pictures).

    Args:
        rows: unit rows of this rank, the same number on every rank.
        labels: classes of the rows, -1 unknown.
        temperature: T > 0.
    """
    kind = torch.promote_types(rows.dtype, torch.float32)
    rows = rows.to(kind)
    everyone, classes = dist.all_gather_with_grad(rows), dist.all_gather(labels)
    own = own_rows(len(rows), rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        logits = (rows @ everyone.T / temperature).scatter(1, own[:, None], -torch.inf)
        same = (labels[:, None] == classes) & (classes >= 0)
        alike = same.scatter(1, own[:, None], False)
        counts = alike.any(1, keepdim=True)  # else both sums are equal: loss and gradient are 0
        terms = logits.logsumexp(1) - logits.masked_fill(~alike & counts, -torch.inf).logsumexp(1)
        number = dist.all_sum(counts.sum().to(kind)).clamp(min=1)
        return terms.sum() * dist.world_size() / number


def cosine_regression(prediction: Queries, target: Queries) -> Float[Tensor, ""]:
    """Squared distance of unit rows (BYOL, Grill et al. 2020, Eq. 2): mean_i 2 - 2 p_i . t_i.

    In [0, 4]. The target receives no gradient. SimSiam's -cos is half of this loss, minus one.

    Args:
        prediction, target: unit rows.
    """
    kind = torch.promote_types(prediction.dtype, torch.float32)
    return (2 - 2 * dot(prediction, target.detach().to(kind))).mean()

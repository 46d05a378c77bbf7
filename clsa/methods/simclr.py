"""SimCLR (Chen et al. 2020): the other pictures of a large batch are the negatives."""

import math

import torch

from clsa.learning.bank import own_rows
from clsa.learning.losses import lowest_info_nce
from clsa.learning.models import Network
from clsa.learning.pair_losses import nt_xent
from clsa.methods.method import Batch, Comparison, Extent, Landmarks, Method, Output
from clsa.options.methods import SimCLROptions
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.views.specs import weak_specs


class SimCLR(Method):
    """Two views of a picture attract, all other views in the global batch repel: L = nt_xent(a, b).

    One network encodes both views, with gradient; there is no momentum copy and no queue. With
    `stronger`, view a of picture i and its strong views are compared with all b_j and with a_j,
    j != i, detached; and the same with a and b swapped. Batches of 512 and more give the target
    enough modes.
    """

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, SimCLROptions)
        self.options = options.method
        self.view_specs = weak_specs(options.views, least=2, most=2)
        self.network = Network(options.model, options.seed, [spec.size for spec in self.view_specs])
        count = 2 * options.batch_size - 1
        floor = lowest_info_nce(count, self.network.dim, self.options.temperature)
        self.landmarks = Landmarks("contrast", math.log(count), floor)

    def forward(self, batch: Batch) -> Output:
        """The contrastive loss, mean over both directions of every pair."""
        first, second = (self.network(view) for view in batch.views)
        loss = nt_xent(first, second, self.options.temperature)
        keys = [dist.all_gather(rows) for rows in (first, second)]
        own, count = own_rows(len(first), first.device), len(keys[0])
        everyone = torch.arange(2 * count, device=first.device)
        others = everyone != own[:, None] + count  # never the query itself
        comparisons = [
            Comparison([first], torch.cat([keys[1], keys[0]]), own, others),
            Comparison([second], torch.cat([keys[0], keys[1]]), own, others),
        ]
        return Output({"contrast": loss}, None, comparisons, {})

    def after_step(self, state: None, step: int) -> None:
        """Do nothing: there is no bank and no key network."""

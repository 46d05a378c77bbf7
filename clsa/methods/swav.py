"""SwAV (Caron et al. 2020): predict a view's balanced assignment to prototypes from the others."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from clsa.learning.assignments import similarity, sinkhorn, swapped_prediction
from clsa.learning.bank import KeyQueue, Prototypes, own_rows
from clsa.learning.losses import lowest_info_nce
from clsa.learning.models import Network
from clsa.methods.method import Batch, Comparison, Extent, Landmarks, Method, Output
from clsa.options.methods import SwAVOptions
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.views.specs import weak_specs


class SwAV(Method):
    """L = swapped_prediction(Q, z C^T, T), assignments Q of the full-size views (Eq. 1-5).

    z = g(f(view)) and the prototypes C have unit length; C is trained by gradient. Q_a is the
    `sinkhorn` of view a of the global batch and, for small batches, of a queue of past projections
    of that view, whose scores are recomputed. Small crops take part in prediction but get no
    assignment. Every rank balances the rows of all ranks and keeps its own. The queue collects from
    `queue_epoch` on and is used once full. C is frozen for `freeze_steps`. With `stronger`, C is
    the bank.

    Deviations from the code: C is normalised after a step, not before the next one, which gives the
    same scores; each view is encoded on its own, so each has its own batch norm statistics.
    """

    has_positives = False

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, SwAVOptions)
        self.options = options.method
        self.view_specs = weak_specs(options.views, least=2)
        self.num_assigning = len(self.view_specs) - len(options.views.local.sizes)
        self.network = Network(options.model, options.seed, [spec.size for spec in self.view_specs])
        count, dim = self.options.num_prototypes, self.network.dim
        self.prototypes = Prototypes(count, dim, options.seed + 2)
        # one row holds the projections of all assigning views, side by side
        length, width = self.options.queue_size, self.num_assigning * dim
        self.queue = KeyQueue(length, width, options.seed) if length else None
        self.first_queued = self.options.queue_epoch * extent.steps_per_epoch
        floor = lowest_info_nce(count, dim, self.options.temperature)
        self.landmarks = Landmarks("swapped_prediction", math.log(count), floor)

    def forward(self, batch: Batch) -> Output:
        """The cross-entropy with the assignments of the full-size views."""
        rows = self.prototypes(frozen=batch.step < self.options.freeze_steps)
        bank = rows.detach()
        queries = [self.network(view) for view in batch.views]
        assigning = queries[: self.num_assigning]
        keys = dist.all_gather(torch.cat(assigning, dim=1))
        collected = len(keys) * (batch.step - self.first_queued)
        balanced = keys
        if self.queue is not None and collected >= len(self.queue.rows):
            balanced = torch.cat([keys, self.queue.rows])
        own, epsilon = own_rows(len(queries[0]), bank.device), self.options.epsilon
        targets = [
            sinkhorn(similarity(every, bank), epsilon, self.options.sinkhorn_iterations)[own]
            for every in balanced.chunk(self.num_assigning, dim=1)
        ]
        scores = [similarity(query, rows) for query in queries]
        loss = swapped_prediction(targets, scores, self.options.temperature)
        comparisons = [Comparison([query], bank) for query in assigning]
        return Output({"swapped_prediction": loss}, keys, comparisons, {})

    def after_step(self, state: Float[Tensor, "B W"], step: int) -> None:
        """Put the prototypes back to unit length, then collect the full-size views' projections."""
        self.prototypes.normalise()
        if self.queue is not None and step >= self.first_queued:
            self.queue.enqueue(state)

"""PCL (Li et al. 2021): momentum contrast, and contrast with the centres of clusters."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from clsa.learning.bank import KeyQueue, keys_with_queue
from clsa.learning.clustering import Clusters
from clsa.learning.losses import contrast, info_nce, lowest_info_nce, streams
from clsa.learning.models import Network, encode_shuffled, momentum_copy, move_towards
from clsa.methods.method import Batch, Comparison, Embed, Extent, Landmarks, Method, Output, sum_of
from clsa.options.methods import PCLOptions
from clsa.options.run import RunOptions
from clsa.views import rng
from clsa.views.specs import weak_specs


class PCL(Method):
    """MoCo's loss and a prototype term: L = sum_w [ info_nce(q_w, [own key; queue]) + L_P(q_w) ].

    L_P = 1/M sum_m mean_i - log exp(q_i . c_i / phi_i) / sum_c exp(q_i . c / phi_c), where c_i is
    the centre of the picture's cluster and phi its concentration (`clustering.concentrations`); the
    sum runs over the batch's clusters and `num_negatives` others. The M clusterings differ in size.
    From `warmup_epochs` on they are recomputed before each epoch, from the key network's
    projections of centre crops; until then L_P is 0. The divergence of `Stronger` uses the keys and
    the queue.

    Deviations from PCL's code: see `Clusters.compare`; and k-means runs on the CPU of rank 0 while
    the other ranks wait, which is too slow for the paper's number of clusters on ImageNet.
    """

    has_keys, holds_pictures = True, True

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, PCLOptions)
        self.options, self.seed = options.method, options.seed
        self.steps_per_epoch = extent.steps_per_epoch
        self.view_specs = weak_specs(options.views, keyed=True, least=2)
        num_queries, temperature = len(self.view_specs) - 1, self.options.temperature
        sizes = [spec.size for spec in self.view_specs]
        self.network = Network(options.model, options.seed, sizes)
        self.key_network = momentum_copy(self.network)
        dim, length = self.network.dim, self.options.queue_size
        self.queue = KeyQueue(length, dim, options.seed)
        self.clusterings = nn.ModuleList(
            Clusters(extent.num_pictures, count, dim, temperature, options.seed + number)
            for number, count in enumerate(self.options.num_clusters)
        )
        floor = num_queries * lowest_info_nce(length + 1, dim, temperature)
        self.landmarks = Landmarks("contrast", num_queries * math.log(length + 1), floor)

    def before_epoch(self, epoch: int, embed: Embed) -> dict[str, float]:
        """Cluster the whole set, after the warm-up; returns the share of the largest cluster."""
        if epoch < self.options.warmup_epochs:
            return {}
        features, numbers = embed(self.key_network), np.arange(len(self.clusterings))
        draws = rng.uniforms(self.seed, epoch, numbers, rng.CLUSTERS, np.arange(1))[:, 0]
        largest = 0.0
        for clusters, draw in zip(self.clusterings, draws, strict=True):
            assert isinstance(clusters, Clusters)
            clusters.fit(features, int(draw * 2**31))
            largest = max(largest, clusters.assignment.bincount().max().item() / len(features))
        return {"largest_cluster": largest}

    def forward(self, batch: Batch) -> Output:
        """The contrast of every weak query with keys, and with cluster centres."""
        key, *weak = batch.views
        queries = [self.network(view) for view in weak]
        keys = encode_shuffled(self.key_network, key, self.seed, batch.step)
        bank, positive, candidates = keys_with_queue(keys, self.queue, batch_negatives=False)
        compared = streams(queries, bank, self.options.temperature, candidates)
        losses = {"contrast": contrast(compared, bank, positive)}
        if batch.step // self.steps_per_epoch >= self.options.warmup_epochs:
            losses["prototypes"] = self._prototypes(queries, batch)
        comparison = Comparison(compared, bank, positive, candidates)
        return Output(losses, keys, [comparison], {})

    def _prototypes(self, queries: list[Float[Tensor, "b D"]], batch: Batch) -> Float[Tensor, ""]:
        terms = []
        for number, clusters in enumerate(self.clusterings):
            assert isinstance(clusters, Clusters)
            centres = torch.arange(len(clusters.centroids), device=batch.index.device)
            slot = torch.full((1,), number, device=batch.index.device)
            draws = rng.uniforms(self.seed, batch.step, centres, rng.NEGATIVES, slot)[:, 0]
            bank, own, candidates = clusters.compare(batch.index, draws, self.options.num_negatives)
            terms += [info_nce(query, bank, own, 1.0, candidates) for query in queries]
        return sum_of(terms) / len(self.clusterings)

    def after_step(self, state: Float[Tensor, "B D"], step: int) -> None:
        """Move the key network towards the query network, then enqueue the keys just used."""
        move_towards(self.key_network, self.network, self.options.key_momentum)
        self.queue.enqueue(state)

"""MoCo v1 and v2 (He et al. 2020; Chen et al. 2020), with one weak query or several."""

import math
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from clsa.bank import KeyQueue, keys_with_queue
from clsa.losses import info_nce, lowest_info_nce
from clsa.methods.method import Batch, Method, Output, sum_of
from clsa.models import Network, encode_shuffled, momentum_copy, move_towards
from clsa.options import RunOptions
from clsa.views import view_specs


class Comparison(NamedTuple):
    """Weak queries and what they are compared with."""

    weak: list[Float[Tensor, "b D"]]
    keys: Float[Tensor, "B D"]
    """Keys of the global batch, detached."""
    bank: Float[Tensor, "N D"]
    positive: Int[Tensor, " b"]
    candidates: Bool[Tensor, "b B"] | None


class MoCo(Method):
    """Momentum contrast: L = sum_w info_nce(q_w, [keys; queue]).

    q = g(f(T'x)) from the trained network; k = g_xi(f_xi(Tx)) from its momentum copy, which sees
    the batch shuffled; the queue holds the keys of past batches. With several weak queries (as
    CLSA* and AdCo use) the terms are summed, each at its own crop size.
    """

    def __init__(self, options: RunOptions):
        super().__init__(options)
        self.view_specs = view_specs(options.views, options.method)
        self.num_weak = len(options.views.weak.sizes)
        sizes = [spec.size for spec in self.view_specs]
        self.network = Network(options.model, options.seed, [*sizes, options.views.size])
        self.key_network = momentum_copy(self.network)
        dim = options.model.projector_dim
        self.queue = KeyQueue(self.options.queue_size, dim, options.seed)
        batch_keys = options.batch_size if self.options.bank == "batch+queue" else 1
        self.weak_weight = 1 / self.num_weak if self.options.reduce == "mean" else 1.0
        count = batch_keys + self.options.queue_size
        terms = self.weak_weight * self.num_weak
        self.chance = terms * math.log(count)
        self.floor = terms * lowest_info_nce(count, dim, self.options.temperature)

    def compare(self, batch: Batch) -> Comparison:
        """Encode the key and the weak queries, and lay out the bank; changes nothing."""
        key_view, weak_views = batch.views[0], batch.views[1 : 1 + self.num_weak]
        weak = [self.network(view) for view in weak_views]
        keys = encode_shuffled(self.key_network, key_view, self.seed, batch.step)
        everyone = self.options.bank == "batch+queue"
        return Comparison(weak, keys, *keys_with_queue(keys, self.queue, everyone))

    def forward(self, batch: Batch) -> Output:
        """The contrastive loss of every weak query."""
        weak, keys, bank, positive, candidates = self.compare(batch)
        shared = (bank, positive, self.options.temperature, candidates)
        loss = self.weak_weight * sum_of(info_nce(query, *shared) for query in weak)
        return Output({"contrast": loss}, keys, {})

    def after_step(self, state: Float[Tensor, "B D"], step: int) -> None:
        """Move the key network towards the query network, then enqueue the keys just used."""
        move_towards(self.key_network, self.network, self.options.key_momentum)
        self.queue.enqueue(state)

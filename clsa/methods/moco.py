"""MoCo v1 and v2 (He et al. 2020; Chen et al. 2020), with one weak query or several."""

import math

from jaxtyping import Float
from torch import Tensor

from clsa.learning.bank import KeyQueue, keys_with_queue
from clsa.learning.losses import contrast, lowest_info_nce, streams
from clsa.learning.models import Network, encode_shuffled, momentum_copy, move_towards
from clsa.learning.optim import momentum_at
from clsa.methods.method import Batch, Comparison, Extent, Landmarks, Method, Output, sum_of
from clsa.options.methods import MoCoOptions
from clsa.options.run import RunOptions
from clsa.views import rng
from clsa.views.specs import weak_specs


class MoCo(Method):
    """Momentum contrast: L = sum_w info_nce(q_w, [keys; queue]).

    q = g(f(T'x)) from the trained network; k = g_xi(f_xi(Tx)) from its momentum copy, which sees
    the batch shuffled; the queue holds the keys of past batches. With several weak queries (as
    CLSA* and AdCo use) the terms are summed, each at its own crop size. With `symmetric`, each of
    the two views is the query once and the key once, with a shuffle of its own; the loss is the
    mean of both directions, and the keys of both views are queued.
    """

    has_keys = True

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, MoCoOptions)
        self.options, self.seed, self.num_steps = options.method, options.seed, extent.num_steps
        key, *weak = weak_specs(
            options.views, keyed=True, least=2, most=2 if options.method.symmetric else None
        )
        strong_key, strong_query = self.options.strong_key, self.options.strong_query
        self.view_specs = [key._replace(ops=options.strong) if strong_key else key]
        self.view_specs += [s._replace(ops=options.strong) if strong_query else s for s in weak]
        sizes = [spec.size for spec in self.view_specs]
        self.network = Network(options.model, options.seed, sizes)
        self.key_network = momentum_copy(self.network)
        self.queue = KeyQueue(self.options.queue_size, self.network.dim, options.seed)
        batch_keys = options.batch_size if self.options.bank == "batch+queue" else 1
        count = batch_keys + self.options.queue_size
        self.weight = 1 / len(weak) if self.options.reduce == "mean" else 1.0
        floor = lowest_info_nce(count, self.network.dim, self.options.temperature)
        terms = self.weight * len(weak)
        self.landmarks = Landmarks("contrast", terms * math.log(count), terms * floor)

    def forward(self, batch: Batch) -> Output:
        """The contrastive loss of every weak query."""
        key, *weak = batch.views
        parts = [(key, weak, rng.PERMUTATION)]
        if self.options.symmetric:
            parts.append((weak[0], [key], rng.SECOND_PERMUTATION))
        losses, comparisons, all_keys = [], [], []
        for key_view, query_views, stream in parts:
            queries = [self.network(view) for view in query_views]
            keys = encode_shuffled(self.key_network, key_view, self.seed, batch.step, stream)
            everyone = self.options.bank == "batch+queue"
            bank, positive, candidates = keys_with_queue(keys, self.queue, everyone)
            compared = streams(queries, bank, self.options.temperature, candidates)
            losses.append(self.weight / len(parts) * contrast(compared, bank, positive))
            comparisons.append(Comparison(compared, bank, positive, candidates))
            all_keys.append(keys)
        return Output({"contrast": sum_of(losses)}, all_keys, comparisons, {})

    def after_step(self, state: list[Float[Tensor, "B D"]], step: int) -> None:
        """Move the key network towards the query network, then enqueue the keys just used."""
        momentum = momentum_at(self.options, step, self.num_steps)
        move_towards(self.key_network, self.network, momentum)
        for keys in state:
            self.queue.enqueue(keys)

"""AdCo (Hu et al. 2021): momentum contrast against negatives that are learned adversarially."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from clsa.learning.bank import LearnedNegatives, own_rows
from clsa.learning.losses import contrast, lowest_info_nce, streams
from clsa.learning.models import Network, encode_shuffled, momentum_copy, move_towards
from clsa.methods.method import Batch, Comparison, Extent, Landmarks, Method, Output
from clsa.options.methods import AdCoOptions
from clsa.options.run import RunOptions
from clsa.views.specs import weak_specs


class AdCo(Method):
    """The network descends L = sum_w info_nce(q_w, [keys; negatives]), the negatives ascend it.

    Queries and keys are as in MoCo; the negatives w_k replace the queue. After the network's step
    they move by G, the gradient of L at `negative_temperature`, computed before that step:
    v <- .9 v - G + 1e-4 w; w <- w - 3 v. They have a decay and a learning rate of their own.

    Start, as in the code: in the first ceil(K / B) steps the negatives do not ascend but are filled
    with the keys of the batches; then the query network is copied to the key network, once.
    Deviations from the code: these steps are part of the schedule, not before it; the other keys
    of the batch are negatives from the start; there is no symmetric variant. The divergence of
    `Stronger` does not move the negatives: they would learn to make similarities unpredictable.
    """

    has_keys = True

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, AdCoOptions)
        self.options, self.seed = options.method, options.seed
        self.view_specs = weak_specs(options.views, keyed=True, least=2)
        num_queries = len(self.view_specs) - 1
        sizes = [spec.size for spec in self.view_specs]
        self.network = Network(options.model, options.seed, sizes)
        self.key_network = momentum_copy(self.network)
        length = self.options.num_negatives
        self.negatives = LearnedNegatives(length, self.network.dim, options.seed)
        self.batch_size = options.batch_size
        self.fill_steps = math.ceil(length / options.batch_size)
        self.weight = 1 / num_queries if self.options.reduce == "mean" else 1.0
        count, terms = options.batch_size + length, self.weight * num_queries
        floor = lowest_info_nce(count, self.network.dim, self.options.temperature)
        self.landmarks = Landmarks("contrast", terms * math.log(count), terms * floor)

    def forward(self, batch: Batch) -> Output:
        """The contrastive loss of every weak query; the state is what moves the negatives."""
        key, *weak = batch.views
        queries = [self.network(view) for view in weak]
        keys = encode_shuffled(self.key_network, key, self.seed, batch.step)
        bank, own = torch.cat([keys, self.negatives.unit()]), own_rows(len(key), keys.device)
        compared = streams(queries, bank, self.options.temperature)
        state = keys
        if batch.step >= self.fill_steps:
            temperature = self.options.negative_temperature
            cold = [stream.at(temperature, bank, None) for stream in compared]
            every = torch.cat([stream.query for stream in cold])
            lse = torch.cat([stream.lse for stream in cold])
            state = self.weight * len(weak) * self.negatives.gradient(every, lse, temperature)
        loss = self.weight * contrast(compared, bank, own)
        return Output({"contrast": loss}, state, [Comparison(compared, bank, own)], {})

    def after_step(self, state: Float[Tensor, "rows D"], step: int) -> None:
        """Move the key network, then the negatives: up the gradient, or to keys while filling."""
        last = step == self.fill_steps - 1
        move_towards(self.key_network, self.network, 0.0 if last else self.options.key_momentum)
        if step < self.fill_steps:
            self.negatives.fill(state, step * self.batch_size)
        else:
            self.negatives.ascend(
                state,
                self.options.negative_lr,
                self.options.negative_momentum,
                self.options.negative_decay,
            )

"""BYOL (Grill et al. 2020): predict the momentum network's projection of the other view."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clsa.learning.bank import KeyQueue, own_rows
from clsa.learning.models import Network, build_predictor, momentum_copy, move_towards
from clsa.learning.optim import momentum_at
from clsa.learning.pair_losses import cosine_regression
from clsa.methods.method import Batch, Extent, Landmarks, Method, Output, crossed, sum_of
from clsa.options.methods import BYOLOptions
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.views.specs import weak_specs


class BYOL(Method):
    """No negatives: L = |q(a) - k(b)|^2 + |q(b) - k(a)|^2, in [0, 8] (Eq. 2).

    q = norm(h(g(f(view)))) with the predictor h, k = norm(g_xi(f_xi(view))) from the momentum copy,
    in train mode and without gradient. Predictor and momentum together prevent the constant
    solution. With `stronger`, queries are compared with the batch's keys of the other view and a
    queue of past keys. The authors of CLSA described it so when asked, but left the choice of bank
    open. The momentum copy moves after the step, as in the code (byol_experiment.py, `_update_fn`).
    Deviation: the last linear layers have a bias.
    """

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, BYOLOptions)
        self.options, self.num_steps = options.method, extent.num_steps
        self.view_specs = weak_specs(options.views, least=2, most=2)
        self.network = Network(options.model, options.seed, [spec.size for spec in self.view_specs])
        hidden = self.options.predictor_hidden
        self.predictor = build_predictor(
            options.model, self.network.dim, hidden, "hidden", options.seed + 2
        )
        self.key_network = momentum_copy(self.network)
        self.queue = KeyQueue(self.options.queue_size, self.network.dim, options.seed)
        self.landmarks = Landmarks("regression", 4.0, 0.0)

    def forward(self, batch: Batch) -> Output:
        """The squared distance of each view's predictions to the other view's keys, summed."""
        first, second = batch.views
        queries = [self.query(view, batch) for view in (first, second)]
        with torch.no_grad():
            keys = [dist.all_gather(self.key_network(view)) for view in (second, first)]
        own, pairs = own_rows(len(first), first.device), list(zip(queries, keys, strict=True))
        loss = sum_of(cosine_regression(query, others[own]) for query, others in pairs)
        return Output({"regression": loss}, keys, crossed(queries, keys, self.queue), {})

    def after_step(self, state: list[Float[Tensor, "B D"]], step: int) -> None:
        """Move the key network towards the network, then enqueue both views' keys."""
        momentum = momentum_at(self.options, step, self.num_steps)
        move_towards(self.key_network, self.network, momentum)
        for keys in state:
            self.queue.enqueue(keys)

    def query(self, images: Float[Tensor, "b 3 S S"], batch: Batch) -> Float[Tensor, "b D"]:
        """Predictions of unit length."""
        return F.normalize(self.predictor(self.network.project(images)).float(), dim=1)

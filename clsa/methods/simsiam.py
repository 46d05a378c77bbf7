"""SimSiam (Chen and He 2021): predict the same network's projection of the other view."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clsa.learning.bank import KeyQueue, own_rows
from clsa.learning.models import Network, build_predictor
from clsa.learning.pair_losses import cosine_regression
from clsa.methods.method import Batch, Extent, Landmarks, Method, Output, crossed, sum_of
from clsa.options.methods import SimSiamOptions
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.views.specs import weak_specs


class SimSiam(Method):
    """Neither negatives nor a momentum copy: L = -1/2 [cos(p_a, sg z_b) + cos(p_b, sg z_a)].

    z = g(f(view)) and p = h(z) with the predictor h; L is in [-1, 1] (Eq. 1-4). Stopping the
    gradient at the target (sg) prevents the constant solution; `channel_std` shows this: about
    1/sqrt(D) when healthy, 0 when collapsed. With `stronger`, queries are compared with the batch's
    z of the other view and a queue of past z, which is short because z drifts as fast as the
    weights.
    """

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, SimSiamOptions)
        self.options = options.method
        self.view_specs = weak_specs(options.views, least=2, most=2)
        self.network = Network(options.model, options.seed, [spec.size for spec in self.view_specs])
        hidden = self.options.predictor_hidden
        self.predictor = build_predictor(
            options.model, self.network.dim, hidden, "hidden", options.seed + 2
        )
        self.fixed_rate = (self.predictor,) if self.options.fixed_predictor_rate else ()
        self.queue = KeyQueue(self.options.queue_size, self.network.dim, options.seed)
        self.landmarks = Landmarks("regression", 0.0, -1.0)

    def forward(self, batch: Batch) -> Output:
        """The mean negative cosine between predictions and the other view's projections."""
        first, second = (self.network.project(view) for view in batch.views)
        queries = [self._predict(rows) for rows in (first, second)]
        keys = [dist.all_gather(F.normalize(rows, dim=1)) for rows in (second, first)]
        own, pairs = own_rows(len(first), first.device), list(zip(queries, keys, strict=True))
        terms = sum_of(cosine_regression(query, others[own]) for query, others in pairs)
        loss = terms / 4 - 1
        return Output(
            {"regression": loss},
            keys,
            crossed(queries, keys, self.queue),
            {"channel_std": spread(keys[0])},
        )

    def after_step(self, state: list[Float[Tensor, "B D"]], step: int) -> None:
        """Enqueue both views' projections."""
        for keys in state:
            self.queue.enqueue(keys)

    def query(self, images: Float[Tensor, "b 3 S S"], batch: Batch) -> Float[Tensor, "b D"]:
        """Predictions of unit length."""
        return self._predict(self.network.project(images))

    def _predict(self, projections: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        return F.normalize(self.predictor(projections).float(), dim=1)


def spread(rows: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Standard deviation over unit rows, mean over channels: 1/sqrt(D) at best, 0 if equal rows."""
    return rows.std(0, correction=0).mean()

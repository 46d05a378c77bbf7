"""CLIM (Li et al. 2020) around a method with keys: mix pictures with neighbours, resolutions."""

import functools
import math
from typing import cast

from jaxtyping import Float
from torch import Tensor

from clsa.learning.losses import streams
from clsa.learning.mixture_loss import mixed_contrast, with_both
from clsa.learning.models import Network, encode_shuffled, require_sizes
from clsa.learning.neighbours import Neighbours, Partners
from clsa.methods.method import Batch, Comparison, Embed, Extent, Method, Output
from clsa.methods.wrappers.wrapper import Wrapper
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.system.errors import ClsaError
from clsa.views import rng
from clsa.views.mixing import Mixture, draw, mix
from clsa.views.specs import at_sizes


class CLIM(Wrapper):
    """Center-wise local image mixture: a query sees a mix of a picture and its partner.

    L_mix = mean_i lambda_i NCE(f_q(x_mix), f_k(x_i)) + (1 - lambda_i) NCE(f_q(x_mix), f_k(x~_i))
    replaces the method's contrast, for each of its weak queries; other terms (PCL's prototypes)
    stay, computed on x_mix. The partner x~_i is one of the positives of `Neighbours`, drawn again
    at each visit; partners follow the anchors in the batch. With resolutions R, a view has the same
    crop, colours and box at each resolution: L = mean over R x R of L_mix(x_mix^r, x^r') (the
    paper's sum with `reduce="sum"`); local queries have one size. Before the first refresh there
    are no partners, and L is the method's contrast at all resolutions.

    lambda is computed from the box at the largest size. Keys come from unmixed views; only the
    picture's own key, at full size, is queued. Around AdCo the negatives learn only from the term
    of the own key. The divergence of `Stronger` compares mixed weak and mixed strong queries with
    both keys and the rest of the bank.
    """

    def __init__(self, base: Method, options: RunOptions, extent: Extent):
        super().__init__(base, options, extent)
        self.options, self.seed, self.batch_size = options.mixture, options.seed, options.batch_size
        if not base.has_keys or getattr(options.method, "symmetric", False):
            what, why = f"--clim with {options.method.name}", "none of its views is only a key"
            raise ClsaError(what, why, "use moco (without method.symmetric), adco or pcl")
        sizes, num_queries = options.mixture.resolutions, len(base.view_specs) - 1
        require_sizes(base.network.encoder, options.model.encoder, sizes)
        self.num_main = 1 + len(options.views.weak.sizes)  # key and non-local queries
        self.view_specs = base.view_specs + at_sizes(base.view_specs[: self.num_main], sizes)
        self.first = math.ceil(options.mixture.start * extent.num_steps / extent.steps_per_epoch)
        self.neighbours = Neighbours(extent.num_pictures, options.mixture, options.seed)
        self.count = options.batch_size // dist.world_size()  # pictures, without partners
        share = 1 / (1 + len(sizes)) if self.options.reduce == "mean" else 1.0
        main, local = [share] * (self.num_main - 1), [1.0] * (1 + num_queries - self.num_main)
        self.weights = [share * weight for weight in main + local + main * len(sizes)]
        self.landmarks = base.landmarks.scaled(sum(self.weights) * (1 + len(sizes)) / num_queries)

    def refreshes(self, epoch: int) -> bool:
        """Every `mixture.refresh_epochs` epochs, from `mixture.start` on."""
        return epoch >= self.first and (epoch - self.first) % self.options.refresh_epochs == 0

    def before_epoch(self, epoch: int, embed: Embed) -> dict[str, float]:
        """Embed the set with the key network and choose positives; then as the inner method."""
        embed, found = functools.cache(embed), {}  # PCL asks for the same
        if self.refreshes(epoch):
            found = self.neighbours.fit(lambda: embed(cast(Network, self.base.key_network)), epoch)
        return found | self.base.before_epoch(epoch, embed)

    def companions(self) -> Partners | None:
        """One partner per picture, after the first refresh."""
        return self.neighbours.partners(self.batch_size)

    def query(self, images: Float[Tensor, "rows 3 S S"], batch: Batch) -> Float[Tensor, "b D"]:
        """As the inner method, on views of pictures mixed with their partners."""
        return self.base.query(self._mixed(images, batch), batch.part(0, self.count))

    def _mixture(self, batch: Batch) -> Mixture:
        size, index = max(spec.size for spec in self.view_specs), batch.index[: self.count]
        return draw(self.options, size, self.seed, batch.step, index)

    def _mixed(self, images: Float[Tensor, "rows 3 S S"], batch: Batch) -> Tensor:
        if len(images) == self.count or self.options.mixing == "none":
            return images[: self.count]
        return mix(images[: self.count], images[self.count :], self._mixture(batch))

    def _keys(self, views: list[Tensor], batch: Batch, first: int) -> list[Float[Tensor, "B D"]]:
        network, step = cast(Network, self.base.key_network), batch.step
        first += rng.MIXTURE_KEYS  # each set of keys has its own stream of draws
        return [encode_shuffled(network, v, self.seed, step, s) for s, v in enumerate(views, first)]

    def forward(self, batch: Batch) -> Output:
        """The contrast of every mixed query with both keys, at all pairs of resolutions."""
        split, count = len(self.base.view_specs), self.count
        key, others = batch.views[0], batch.views[split:]
        views = [key[:count], *(self._mixed(view, batch) for view in batch.views[1:split])]
        output = self.base(batch.part(0, count)._replace(views=views))
        ((compared, bank, positive, candidates),) = output.comparisons
        keys, rest = bank.split([count * dist.world_size(), len(bank) - count * dist.world_size()])
        extra = others[:: self.num_main]
        own = [keys, *self._keys([view[:count] for view in extra], batch, 0)]
        partners = [view[count:] for view in (key, *extra) if len(view) > count]
        partners = self._keys(partners, batch, len(extra))
        more = [view for place, view in enumerate(others) if place % self.num_main]
        queries = [each.query for each in compared] + [self.query(view, batch) for view in more]
        loss = mixed_contrast(
            streams(queries, rest, compared[0].temperature), self.weights, own, partners,
            self._mixture(batch).share, positive, candidates,
        )  # fmt: skip
        losses, metrics = {**output.losses, "contrast": self.base.weight * loss}, output.metrics
        if partners:
            metrics = {**metrics, "partner_similarity": (own[0] * partners[0]).sum(1).mean()}
            bank, candidates = with_both(own[0], partners[0], rest, candidates)
        comparison = Comparison(queries[: len(compared)], bank, positive, candidates)
        return Output(losses, output.state, [comparison], metrics)

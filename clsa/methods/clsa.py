"""CLSA: contrastive learning with stronger augmentations (Wang and Qi, 2021)."""

from jaxtyping import Float
from torch import Tensor

from clsa.losses import contrast_and_divergence, info_nce
from clsa.methods.method import Batch, Method, Output, sum_of
from clsa.methods.moco import MoCo
from clsa.models import Network
from clsa.options import RunOptions


class CLSA(Method):
    """A MoCo, plus the divergence of strong views: L = L_C + beta L_D (CLSA Eq. 8).

    L_D is summed over all pairs of weak and strong queries (25 for CLSA*), or averaged with
    `reduce="mean"`. Where paper and official code differ (bank, pool, number of weak queries) the
    default is the code's and `clsa-paper`, `clsa-multi-paper` give the equations'. Deviation from
    the code: positives are found by the global rank, so several machines work.

    `target="key"` takes the target from the key network, `"one-hot"` replaces L_D by L_C of the
    strong query (the paper's Table 5, 68.0).
    """

    def __init__(self, options: RunOptions):
        super().__init__(options)
        self.base = MoCo(options)
        self.view_specs = self.base.view_specs
        self.chance, self.floor = self.base.chance, self.base.floor
        num_targets = self.base.num_weak if options.method.target == "query" else 1
        num_pairs = num_targets * len(options.views.strong.sizes)
        share = 1 / num_pairs if options.method.reduce == "mean" else 1.0
        self.strong_weight = options.method.beta * share

    @property
    def network(self) -> Network:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The MoCo's: weak and strong queries share it."""
        return self.base.network

    def forward(self, batch: Batch) -> Output:
        """Both terms; each strong view goes through the network on its own (own statistics)."""
        weak, keys, bank, positive, candidates = self.base.compare(batch)
        strong = [self.network(view) for view in batch.views[1 + len(weak) :]]
        options, weight = self.options, self.base.weak_weight
        if options.target == "one-hot":
            shared = (bank, positive, options.temperature, candidates)
            losses = {
                "contrast": weight * sum_of(info_nce(query, *shared) for query in weak),
                "strong_contrast": self.strong_weight
                * sum_of(info_nce(query, *shared) for query in strong),
            }
            return Output(losses, keys, {})
        target = [bank[positive]] if options.target == "key" else None
        terms = contrast_and_divergence(
            weak, strong, bank, positive, options.temperature, options.strong_temperature,
            options.target_temperature, candidates, target,
        )  # fmt: skip
        losses = {
            "contrast": weight * terms.contrast,
            "divergence": self.strong_weight * terms.divergence,
        }
        return Output(losses, keys, {"target_entropy": terms.target_entropy, "kl": terms.kl})

    def after_step(self, state: Float[Tensor, "B D"], step: int) -> None:
        """As the MoCo inside."""
        self.base.after_step(state, step)

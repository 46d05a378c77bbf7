"""CLSA's divergence around any method (Wang and Qi 2021): learning from stronger augmentations."""

import torch
from jaxtyping import Float
from torch import Tensor

from clsa.learning.losses import Stream, contrast, divergence, streams
from clsa.methods.method import Batch, Comparison, Extent, Method, Output, sum_of
from clsa.methods.wrappers.wrapper import Wrapper
from clsa.options.run import RunOptions
from clsa.system.errors import ClsaError
from clsa.views.specs import strong_specs


class Stronger(Wrapper):
    """A method plus the divergence of strong views: L = L_base + beta L_D (CLSA Eq. 8).

    L_D = mean_i - sum_j t_ij log r_ij (Eq. 6-7): t compares a weak query of the method with its
    bank, r a strong query with the same rows. L_D is summed over the pairs of weak and strong
    queries (25 for CLSA*), or averaged with `reduce="mean"`. Methods that average their loss over
    weak views return one comparison per view, and L_D is averaged over these too. Around MoCo this
    is CLSA, as its code computes it (`bank="batch+queue"`) or as its equations say (`"queue"`).
    Deviation from the code: positives are found by the global rank, so several machines work.

    `target="key"` computes the target from the positive; `"one-hot"` replaces L_D by L_C of the
    strong query (Table 5, 68.0). Both need a method with positives.
    """

    def __init__(self, base: Method, options: RunOptions, extent: Extent):
        super().__init__(base, options, extent)
        self.options = options.strong
        if self.options.target != "query" and not base.has_positives:
            raise ClsaError(
                f"strong.target {self.options.target}",
                "this method compares with prototypes, none of which is the positive",
                "set strong.target to `query`",
            )
        strong = strong_specs(options.views, options.strong, len(base.view_specs))
        self.view_specs = base.view_specs + strong

    def forward(self, batch: Batch) -> Output:
        """Both terms; each strong view goes through the network alone (own batch statistics)."""
        num_weak = len(self.base.view_specs)
        output = self.base(batch._replace(views=batch.views[:num_weak]))
        strong = [self.base.query(view, batch) for view in batch.views[num_weak:]]
        terms, metrics = zip(
            *(self._compare(strong, comparison) for comparison in output.comparisons), strict=True
        )
        name = "strong_contrast" if self.options.target == "one-hot" else "divergence"
        added = {name: self.options.beta / len(terms) * sum_of(terms)}
        means = {key: torch.stack([each[key] for each in metrics]).mean() for key in metrics[0]}
        losses = {**output.losses, **added}
        return output._replace(losses=losses, metrics={**output.metrics, **means})

    def _compare(
        self, strong: list[Tensor], comparison: Comparison
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """L_D over one bank, and its metrics."""
        options, (queries, bank, positive, candidates) = self.options, comparison
        predicted = streams(strong, bank, options.temperature, candidates)
        num_pairs, metrics = len(predicted), {}
        if options.target == "one-hot":
            assert positive is not None
            loss = contrast(predicted, bank, positive)
        else:
            if options.target == "key":
                assert positive is not None
                queries = [bank[positive]]
            targets = [
                query.at(options.target_temperature, bank, candidates)
                if isinstance(query, Stream)
                else streams([query.detach()], bank, options.target_temperature, candidates)[0]
                for query in queries
            ]
            loss, entropy, kl = divergence(targets, predicted)
            num_pairs *= len(targets)
            metrics = {"target_entropy": entropy, "kl": kl}
        return loss / (num_pairs if options.reduce == "mean" else 1), metrics

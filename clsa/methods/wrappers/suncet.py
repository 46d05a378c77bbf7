"""SuNCEt (Assran et al. 2020) around any method: a few labels pull each class together."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clsa.learning.bank import own_rows
from clsa.learning.pair_losses import suncet
from clsa.loading.few_labels import Stratified
from clsa.loading.order import Companions
from clsa.methods.method import Batch, Comparison, Embed, Extent, Method, Output
from clsa.methods.wrappers.wrapper import Wrapper
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.system.errors import ClsaError


class SuNCEt(Wrapper):
    """A method on the unlabelled batch, and SuNCEt's loss on labelled pictures appended to it.

    L = L_base + weight L_sun. Each step shows `classes` classes with `per_class` labelled pictures
    each (`Stratified`), in `views` weak views of the base, or in one if the base has only one. With
    two views, a class with a single picture has the picture's other view as its positive. The
    labelled rows go through the network separately (own batch statistics), after those of the
    base. The labelled rows of all processes are compared: all processes show the same classes.
    After `epochs` epochs the base continues alone.

    With `Stronger` the labelled rows take part in its divergence: as queries and, by their other
    view, as rows of the bank. With methods of one view or without positives they do not.

    Deviation from SuNCEt's code: its unlabelled loss holds the gathered views constant; here the
    base is the same as without labels.
    """

    over: Bool[Tensor, ""]

    def __init__(self, base: Method, options: RunOptions, extent: Extent):
        super().__init__(base, options, extent)
        self.options, self.count = options.suncet, options.batch_size // dist.world_size()
        self.register_buffer("over", torch.tensor(False))
        self.sampler = Stratified(
            _known(extent), self.options.classes, self.options.per_class, options.seed
        )
        names = [spec.name for spec in base.view_specs]
        weak = [i for i, name in enumerate(names) if name.startswith(("key", "weak"))]
        self.places = weak[: self.options.views]
        if len(self.places) < 2 and self.options.per_class < 2:
            why = "with one view, a positive must be another picture of the same class"
            raise ClsaError("suncet.per_class 1", why, "set it to 2")
        least = 2 * max(dist.world_size(), options.model.norm_groups)
        if self.sampler.count < least:
            why = f"batch norm needs {least} labelled pictures a step, not {self.sampler.count}"
            raise ClsaError("suncet", why, "raise suncet.classes or suncet.per_class")
        self.joins = options.stronger and len(self.places) > 1 and base.has_positives

    def before_epoch(self, epoch: int, embed: Embed) -> dict[str, float]:
        """As the base; after `epochs` epochs the labels are no longer used."""
        self.over.fill_(self.options.epochs is not None and epoch >= self.options.epochs)
        return self.base.before_epoch(epoch, embed)

    def refreshes(self, epoch: int) -> bool:
        """As the base, and at the epoch from which labelled pictures are left out."""
        return epoch == self.options.epochs or self.base.refreshes(epoch)

    def companions(self) -> Companions | None:
        """The labelled pictures, for the first `epochs` epochs."""
        return None if self.over else self.sampler

    def forward(self, batch: Batch) -> Output:
        """Both terms; the base sees its own rows only."""
        output = self.base(batch.part(0, self.count))
        if len(batch.index) == self.count:
            return output
        labelled = batch.part(self.count)
        views = [self.base.query(labelled.views[i], labelled) for i in self.places]
        classes = labelled.labels.repeat(len(views))
        loss = self.options.weight * suncet(torch.cat(views), classes, self.options.temperature)
        comparisons = output.comparisons
        if self.joins:
            rows = [(views[c % 2], views[(c + 1) % 2]) for c in range(len(comparisons))]
            comparisons = [_joined(c, *r) for c, r in zip(comparisons, rows, strict=True)]
        return output._replace(losses={**output.losses, "suncet": loss}, comparisons=comparisons)

    def query(self, images: Float[Tensor, "b 3 S S"], batch: Batch) -> Float[Tensor, "rows D"]:
        """As the base; labelled rows go separately, and only if they join the divergence."""
        rows = [self.base.query(images[: self.count], batch.part(0, self.count))]
        if self.joins and len(images) > self.count:
            rows.append(self.base.query(images[self.count :], batch.part(self.count)))
        return torch.cat(rows)


def _known(extent: Extent) -> Int64[np.ndarray, " n"]:
    labels = extent.labels
    if labels is None or len(set(labels[labels >= 0].tolist())) < 2:
        raise ClsaError("--labels", "fewer than two classes have a label", "give more labels")
    return labels


def _joined(
    comparison: Comparison, queries: Float[Tensor, "l D"], others: Float[Tensor, "l D"]
) -> Comparison:
    """Add labelled queries, and to the bank the other view of all ranks' labelled rows."""
    _, bank, positive, candidates = comparison
    assert positive is not None
    rows = [torch.cat([each, queries]) for each in comparison.rows()]
    positive = torch.cat([positive, len(bank) + own_rows(len(others), others.device)])
    if candidates is not None:
        all_seen = candidates.new_ones(len(queries), candidates.shape[1])
        candidates = torch.cat([candidates, all_seen])
    return Comparison(rows, torch.cat([bank, dist.all_gather(others)]), positive, candidates)

"""Cross-entropy with labels: the supervised reference in every table."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clsa.learning.models import Network, feature_dim, mlp
from clsa.methods.method import Batch, Comparison, Extent, Landmarks, Method, Output
from clsa.options.methods import SupervisedOptions
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.system.errors import ClsaError
from clsa.views.specs import weak_specs


class Supervised(Method):
    """One linear layer on the features: L = mean over labelled rows of -log softmax(W f + b)_y.

    Rows without a label do not count; pictures that the evaluation holds out have no label here
    (`evaluate.features.split`). With `stronger`, the normalised rows of W are the bank that
    features are compared with, like the prototypes in SwAV; in that divergence rows without a
    label count too.
    """

    has_positives = False

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, SupervisedOptions)
        if extent.num_classes < 2:
            why = "it learns from labels, and the pictures have fewer than two classes"
            hint = "use class folders or a labelled set, or choose another recipe"
            raise ClsaError("method supervised", why, hint)
        self.options = options.method
        self.view_specs = weak_specs(options.views)
        sizes = [spec.size for spec in self.view_specs]
        headless = options.model.model_copy(update={"projector_layers": 0})
        self.network = Network(headless, options.seed, sizes)
        width = feature_dim(self.network.encoder)
        self.classifier: nn.Sequential = mlp((width, extent.num_classes), seed=options.seed + 2)
        self.landmarks = Landmarks("cross_entropy", math.log(extent.num_classes), 0.0)

    def forward(self, batch: Batch) -> Output:
        """Cross-entropy of every view, averaged over views and the labelled rows of all ranks."""
        features = [self.network.project(view) for view in batch.views]
        known = (batch.labels >= 0).sum()
        share = dist.world_size() / dist.all_sum(known.float()).clamp(min=1)
        losses = [
            F.cross_entropy(
                self.classifier(rows).float(), batch.labels, ignore_index=-1, reduction="sum",
                label_smoothing=self.options.label_smoothing,
            )
            for rows in features
        ]  # fmt: skip
        loss = share * torch.stack(losses).mean()
        classes = F.normalize(self.classifier[0].get_parameter("weight").detach().float(), dim=1)
        comparisons = [Comparison([F.normalize(rows, dim=1)], classes) for rows in features]
        return Output({"cross_entropy": loss}, None, comparisons, {})

    def after_step(self, state: None, step: int) -> None:
        """Do nothing: there is no bank and no key network."""

    def query(self, images: Float[Tensor, "b 3 S S"], batch: Batch) -> Float[Tensor, "b F"]:
        """Features of unit length."""
        return self.network(images)

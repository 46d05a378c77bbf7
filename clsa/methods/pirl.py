"""PIRL (Misra and van der Maaten 2020): a picture and its shuffled patches share a memory row."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clsa.learning.bank import Memory
from clsa.learning.losses import contrast, lowest_info_nce, streams
from clsa.learning.models import Network, feature_dim, mlp
from clsa.methods.method import Batch, Comparison, Extent, Landmarks, Method, Output
from clsa.options.methods import PIRLOptions
from clsa.options.run import RunOptions
from clsa.system.errors import ClsaError
from clsa.views import rng
from clsa.views.geometry import jigsaw
from clsa.views.specs import weak_specs


class PIRL(Method):
    """L = (1 - w) info_nce(f, [v_i; V']) + w info_nce(g, [v_i; V']), w = `jigsaw_weight` (Eq. 5).

    f is the picture's projection, v_i its memory row, V' are m rows drawn for this step. g comes
    from the patches of another crop (`geometry.jigsaw`): each patch goes through the same encoder
    and a linear layer to D, then all of them, concatenated, through another linear layer to D, at
    unit length. After the step v_i <- norm(r v_i + (1 - r) f_i): patches never move the memory.
    With several weak views the first term is averaged, and the row moves to the mean of their
    projections; the paper has one view.

    Deviations: a softmax over the own and the drawn rows replaces the paper's estimate (Eq. 4); the
    drawn rows are shared by the batch; colours are drawn once for the crop, not for each patch.
    """

    holds_pictures = True

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, PIRLOptions)
        self.options, self.seed = options.method, options.seed
        side, cell = self.options.patch_size, self.options.jigsaw_size // self.options.grid
        if side > cell:
            why = f"larger than a cell: {cell} pixels, method.jigsaw_size / method.grid"
            raise ClsaError(f"method.patch_size {side}", why, "choose a smaller patch_size")
        weak = weak_specs(options.views)
        cut = weak[0]._replace(
            name="jigsaw", view=len(weak),
            size=self.options.jigsaw_size, scale=self.options.jigsaw_scale,
        )  # fmt: skip
        self.view_specs = [*weak, cut]
        sizes = [spec.size for spec in weak] + [side]
        self.network = Network(options.model, options.seed, sizes)
        width, dim = feature_dim(self.network.encoder), self.network.dim
        self.num_patches = self.options.grid**2
        self.patch_head: nn.Sequential = mlp((width, dim), seed=options.seed + 2)
        self.jigsaw_head: nn.Sequential = mlp((self.num_patches * dim, dim), seed=options.seed + 3)
        self.memory = Memory(extent.num_pictures, dim, options.seed)
        count, share = 1 + self.options.num_negatives, 1 - self.options.jigsaw_weight
        floor = lowest_info_nce(count, dim, self.options.temperature)
        self.landmarks = Landmarks("contrast", share * math.log(count), share * floor)

    def forward(self, batch: Batch) -> Output:
        """Both terms, compared with the same rows."""
        *views, crop = batch.views
        queries = [self.network(view) for view in views]
        bank, own, candidates = self.memory.compare(
            batch.index, self.options.num_negatives, self.seed, batch.step
        )
        patches = self._project_patches(crop, batch)
        every = [*queries, patches]
        *compared, shuffled = streams(every, bank, self.options.temperature, candidates)
        weight = self.options.jigsaw_weight
        losses = {
            "contrast": (1 - weight) / len(queries) * contrast(compared, bank, own),
            "jigsaw": weight * contrast([shuffled], bank, own),
        }
        state = batch.index, torch.stack(queries).detach().mean(0)
        comparisons = [Comparison([each], bank, own, candidates) for each in compared]
        return Output(losses, state, comparisons, {})

    def _project_patches(
        self, crop: Float[Tensor, "b 3 S S"], batch: Batch
    ) -> Float[Tensor, "b D"]:
        slots = torch.arange(3 * self.num_patches, device=crop.device)
        u = rng.uniforms(self.seed, batch.step, batch.index, rng.JIGSAW, slots)
        u = u.unflatten(1, (self.num_patches, 3))
        patches = jigsaw(crop, u, self.options.grid, self.options.patch_size)
        rows = self.patch_head(self.network.encoder(patches))
        return F.normalize(self.jigsaw_head(rows.view(len(crop), -1)).float(), dim=1)

    def after_step(self, state: tuple[Int[Tensor, " b"], Float[Tensor, "b D"]], step: int) -> None:
        """Move the rows of the pictures just seen."""
        index, features = state
        self.memory.update(index, features, self.options.row_momentum)

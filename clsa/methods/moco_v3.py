"""MoCo v3 (Chen, Xie, He 2021): contrast with momentum keys of the other view, without a queue."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clsa.learning.bank import KeyQueue, own_rows
from clsa.learning.losses import info_nce, lowest_info_nce
from clsa.learning.models import Network, build_predictor, momentum_copy, move_towards
from clsa.learning.optim import momentum_at
from clsa.methods.method import Batch, Extent, Landmarks, Method, Output, crossed, sum_of
from clsa.options.methods import MoCoV3Options
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.views.specs import weak_specs


class MoCoV3(Method):
    """Symmetric contrast in a large batch: L = 2T [info_nce(q_a, K_b) + info_nce(q_b, K_a)].

    q = norm(h(g(f(view)))) with the predictor h; K are the keys norm(g_xi(f_xi(view))) of the
    global batch, so the other pictures of the batch are the negatives. The factor 2T comes from
    the official code. With `freeze_patches`, the patch embedding of a ViT keeps its random initial
    weights. With `stronger`, the bank is these keys and a short queue of past keys. Deviations: the
    momentum copy moves after the step; the position embeddings of a ViT are learned (timm), not
    fixed sines; with a ResNet, the last layer of the predictor has a bias.
    """

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, MoCoV3Options)
        self.options, self.num_steps = options.method, extent.num_steps
        self.view_specs = weak_specs(options.views, least=2, most=2)
        self.network = Network(options.model, options.seed, [spec.size for spec in self.view_specs])
        patches = getattr(self.network.encoder, "patch_embed", None)
        if self.options.freeze_patches and isinstance(patches, nn.Module):
            patches.requires_grad_(False)
        hidden, norm = self.options.predictor_hidden, self.options.predictor_norm
        self.predictor = build_predictor(
            options.model, self.network.dim, hidden, norm, options.seed + 2
        )
        self.key_network = momentum_copy(self.network)
        self.queue = KeyQueue(self.options.queue_size, self.network.dim, options.seed)
        count, temperature = options.batch_size, self.options.temperature
        floor = lowest_info_nce(count, self.network.dim, temperature)
        chance = math.log(count)
        self.landmarks = Landmarks("contrast", 4 * temperature * chance, 4 * temperature * floor)

    def forward(self, batch: Batch) -> Output:
        """The contrastive loss of each view's predictions with the other view's keys."""
        first, second = batch.views
        queries = [self.query(view, batch) for view in (first, second)]
        with torch.no_grad():
            keys = [dist.all_gather(self.key_network(view)) for view in (second, first)]
        own, pairs = own_rows(len(first), first.device), list(zip(queries, keys, strict=True))
        temperature = self.options.temperature
        loss = sum_of(info_nce(query, others, own, temperature) for query, others in pairs)
        return Output(
            {"contrast": 2 * temperature * loss}, keys, crossed(queries, keys, self.queue), {}
        )

    def after_step(self, state: list[Float[Tensor, "B D"]], step: int) -> None:
        """Move the key network towards the network, then enqueue both views' keys."""
        momentum = momentum_at(self.options, step, self.num_steps)
        move_towards(self.key_network, self.network, momentum)
        for keys in state:
            self.queue.enqueue(keys)

    def query(self, images: Float[Tensor, "b 3 S S"], batch: Batch) -> Float[Tensor, "b D"]:
        """Predictions of unit length."""
        return F.normalize(self.predictor(self.network.project(images)).float(), dim=1)

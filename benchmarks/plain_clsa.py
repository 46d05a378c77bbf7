"""CLSA written plainly: the paper's algorithm as its official code computes it, not optimised.

A DataLoader makes views picture by picture with Pillow; all is float32 in the default memory
format. Each pair has its softmax tensor, each term its copy of the queue, and the key network moves
parameter by parameter. Backbone, projector, batch, queue and views are those of our recipe.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks import plain_views
from clsa.learning.models import build_encoder, feature_dim, mlp
from clsa.options.methods import MoCoOptions
from clsa.options.run import RunOptions
from clsa.views.specs import strong_specs, weak_specs
from tests.support.reference import written_out


class PlainCLSA(nn.Module):
    """Encoder, projector, their momentum copies and the queue, with a step of SGD.

    Args:
        options: options of our recipe, with one weak and one strong query.
        folder: folder with the pictures as files.
        workers: number of loader workers.
    """

    queue: Tensor

    def __init__(self, options: RunOptions, folder: Path, workers: int):
        super().__init__()
        assert isinstance(options.method, MoCoOptions)
        self.method, model = options.method, options.model
        encoder = build_encoder(model, 0).to(memory_format=torch.contiguous_format)
        width, dim = feature_dim(encoder), model.projector_dim
        hidden = [model.projector_hidden] * (model.projector_layers - 1)
        self.network = nn.Sequential(encoder, mlp([width, *hidden, dim]))
        self.key_network = copy.deepcopy(self.network).requires_grad_(False)
        rows = torch.randn(self.method.queue_size, dim)
        self.register_buffer("queue", F.normalize(rows, dim=1))
        self.pointer = 0
        optim = options.optim
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), optim.lr, optim.momentum, weight_decay=optim.weight_decay
        )
        specs = weak_specs(options.views, keyed=True)
        specs += strong_specs(options.views, options.strong, len(specs))
        views = plain_views.Views(specs)
        data = ImageFolder(str(folder), views, loader=plain_views.load)
        self.batches = endless(
            DataLoader(data, options.batch_size, True, num_workers=workers, drop_last=True)
        )

    def step(self) -> None:
        """One whole step, with the wait for its data."""
        (key_view, weak_view, strong_view), _ = next(self.batches)
        momentum = self.method.key_momentum
        with torch.no_grad():
            pairs = zip(self.key_network.parameters(), self.network.parameters(), strict=True)
            for key_weight, weight in pairs:
                key_weight.mul_(momentum).add_(weight, alpha=1 - momentum)
        loss, keys = self.loss(key_view, weak_view, strong_view)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        places = (self.pointer + torch.arange(len(keys))) % len(self.queue)
        self.queue[places] = keys
        self.pointer = (self.pointer + len(keys)) % len(self.queue)

    def loss(
        self, key_view: Tensor, weak_view: Tensor, strong_view: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of both terms of the loss of a batch, and its keys."""
        weak = F.normalize(self.network(weak_view), dim=1)
        strong = F.normalize(self.network(strong_view), dim=1)
        with torch.no_grad():
            order = torch.randperm(len(key_view))
            shuffled = F.normalize(self.key_network(key_view[order]), dim=1)
            keys = shuffled[torch.argsort(order)]
        bank, temperature = torch.cat([keys, self.queue]), self.method.temperature
        return written_out([weak], [strong], bank, torch.arange(len(keys)), temperature), keys


def endless(loader: DataLoader) -> Iterator:
    """The batches of endless epochs."""
    while True:
        yield from loader

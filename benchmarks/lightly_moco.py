"""MoCo v2 built from lightly's data set, transform, head, loss and momentum update.

They are combined as in lightly's documentation, in plain PyTorch. Backbone, batch, queue and the
numbers of the recipe are ours; there is no blur at 32 pixels, as in our recipe.
"""

import copy
from pathlib import Path

import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import (
    batch_shuffle,
    batch_unshuffle,
    deactivate_requires_grad,
    update_momentum,
)
from lightly.transforms import MoCoV2Transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.plain_clsa import endless
from clsa.learning.models import build_encoder, feature_dim
from clsa.options.methods import MoCoOptions
from clsa.options.run import RunOptions


class LightlyMoCo:
    """The networks, their momentum copies, loss and loader, with a step of SGD.

    Args:
        options: options of our recipe.
        folder: folder with the pictures as files.
        workers: number of loader workers.
        fast: bf16 autocast and channels_last, which lightly's example does not use.
    """

    def __init__(self, options: RunOptions, folder: Path, workers: int, fast: bool):
        self.fast, model = fast, options.model
        layout = torch.channels_last if fast else torch.contiguous_format
        self.backbone = build_encoder(model, 0).to(memory_format=layout)
        width = feature_dim(self.backbone)
        self.head = MoCoProjectionHead(width, model.projector_hidden, model.projector_dim)
        self.key_backbone, self.key_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        deactivate_requires_grad(self.key_backbone)
        deactivate_requires_grad(self.key_head)
        assert isinstance(options.method, MoCoOptions)
        self.key_momentum = options.method.key_momentum
        bank = (options.method.queue_size, model.projector_dim)
        self.criterion = NTXentLoss(options.method.temperature, memory_bank_size=bank)
        optim, both = options.optim, nn.ModuleList([self.backbone, self.head])
        self.optimizer = torch.optim.SGD(
            both.parameters(), optim.lr, optim.momentum, weight_decay=optim.weight_decay
        )
        weak = options.views.weak
        transform = MoCoV2Transform(
            input_size=options.views.size,
            cj_prob=weak.jitter_probability,
            min_scale=options.views.scale[0],
            random_gray_scale=weak.grayscale,
            gaussian_blur=weak.blur[0],
            hf_prob=weak.flip,
        )
        data = LightlyDataset(str(folder), transform=transform)
        loader = DataLoader(data, options.batch_size, True, num_workers=workers, drop_last=True)
        self.batches = endless(loader)

    def step(self) -> None:
        """One whole step, with the wait for its data."""
        (query_view, key_view), _, _ = next(self.batches)
        update_momentum(self.backbone, self.key_backbone, self.key_momentum)
        update_momentum(self.head, self.key_head, self.key_momentum)
        self.loss(query_view, key_view).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, query_view: Tensor, key_view: Tensor) -> Tensor:
        """Loss of a batch; its keys go into the memory bank."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.fast):
            query = self.head(self.backbone(self._laid_out(query_view)))
            key = self._key(key_view)
            return self.criterion(query.float(), key.float())

    @torch.no_grad()
    def _key(self, view: Tensor) -> Tensor:
        shuffled, order = batch_shuffle(view)
        keys = self.key_head(self.key_backbone(self._laid_out(shuffled)))
        return batch_unshuffle(keys, order).detach()

    def _laid_out(self, view: Tensor) -> Tensor:
        return view.contiguous(memory_format=torch.channels_last) if self.fast else view

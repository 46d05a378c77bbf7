"""A copy of the running statistics of batch norm, to undo what a bad step did to them."""

import torch
from torch import nn


class Statistics:
    """A copy of batch norm's running statistics, which `forward` moves.

    Args:
        module: holds the batch norms, also those of a key network.
    """

    def __init__(self, module: nn.Module):
        self.now = [
            buffer
            for child in module.modules()
            if isinstance(child, nn.modules.batchnorm._BatchNorm)
            for buffer in child.buffers(recurse=False)
        ]
        self.kept = [torch.empty_like(buffer) for buffer in self.now]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the current statistics."""
        if self.now:
            torch._foreach_copy_(self.kept, self.now)  # pyright: ignore

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the copied statistics."""
        if self.now:
            torch._foreach_copy_(self.now, self.kept)  # pyright: ignore

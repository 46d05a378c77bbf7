"""What queries are compared with: the queue of past keys, joined to the keys of the batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clsa import dist


class KeyQueue(nn.Module):
    """First-in first-out queue of keys (MoCo, He et al. 2020), the same on every rank.

    Starts as random unit rows. Enqueuing wraps around at any batch size, also one larger than the
    queue. Rows and pointer are buffers, so they are part of a checkpoint.

    Args:
        length: number of rows K.
        dim: projection dim D.
        seed: of the first rows.
    """

    rows: Float[Tensor, "K D"]
    pointer: Int[Tensor, ""]

    def __init__(self, length: int, dim: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rows", F.normalize(torch.randn(length, dim, generator=generator)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Float[Tensor, "B D"]) -> None:
        """Overwrite the oldest rows by `keys`, the first key oldest."""
        length = len(self.rows)
        skipped = max(0, len(keys) - length)
        places = torch.arange(skipped, len(keys), device=keys.device)
        self.rows.index_copy_(0, (self.pointer + places) % length, keys[skipped:].to(self.rows))
        self.pointer.add_(len(keys)).remainder_(length)


def own_rows(count: int, device: torch.device) -> Int[Tensor, " b"]:
    """Rows of the global batch, ranks in order, that are this rank's `count`."""
    return dist.rank() * count + torch.arange(count, device=device)


def keys_with_queue(
    keys: Float[Tensor, "B D"], queue: KeyQueue, batch_negatives: bool
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " b"], Bool[Tensor, "b B"] | None]:
    """The bank [keys of the global batch; queue], and what this rank's queries may see of it.

    Args:
        keys: detached keys of the global batch, ranks in order, as `dist.all_gather` gives them.
        queue: past keys; this batch's are not in it yet.
        batch_negatives: True: every key of the batch is a candidate (the official code). False:
            the own key only, so that the bank is one positive and the queue (the papers).

    Returns:
        bank; row of each local query's own key (global rank, not local); candidates (None: all).
    """
    own = own_rows(len(keys) // dist.world_size(), keys.device)
    candidates = None
    if not batch_negatives:
        candidates = own[:, None] == torch.arange(len(keys), device=keys.device)
    return torch.cat([keys, queue.rows]), own, candidates

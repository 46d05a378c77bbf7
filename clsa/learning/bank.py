"""Banks that queries are compared with: keys, learned negatives, prototypes, a memory."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clsa.system import dist
from clsa.views import rng


class KeyQueue(nn.Module):
    """First-in first-out queue of keys (MoCo, He et al. 2020), the same on every rank.

    It starts as random unit rows. Enqueuing wraps around at any batch size, even one larger than
    the queue. Rows and pointer are buffers, so they are part of a checkpoint.

    Args:
        length: number of rows K.
        dim: projection dim D.
        seed: seed of the first rows.
    """

    rows: Float[Tensor, "K D"]
    pointer: Int[Tensor, ""]

    def __init__(self, length: int, dim: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rows", F.normalize(torch.randn(length, dim, generator=generator)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def start(self, keys: Float[Tensor, "n D"]) -> None:
        """Fill the rows with the first of `keys`, repeated if there are too few."""
        self.rows.copy_(keys[torch.arange(len(self.rows), device=keys.device) % len(keys)])

    @torch.no_grad()
    def enqueue_chosen(self, keys: Float[Tensor, "B D"], chosen: Bool[Tensor, " B"]) -> None:
        """`enqueue` the chosen keys only, without the host reading how many there are."""
        length, total = len(self.rows), chosen.sum()
        number = chosen.cumsum(0) - 1
        kept = chosen & (number >= total - length)
        places = torch.where(kept, (self.pointer + number) % length, length)
        room = torch.cat([self.rows, self.rows[:1]])  # a spare row takes keys not kept
        self.rows.copy_(room.index_copy_(0, places, keys.to(room))[:length])
        self.pointer.add_(total).remainder_(length)

    @torch.no_grad()
    def enqueue(self, keys: Float[Tensor, "B D"]) -> None:
        """Overwrite the oldest rows with `keys`; the first key counts as the oldest."""
        length = len(self.rows)
        skipped = max(0, len(keys) - length)
        places = torch.arange(skipped, len(keys), device=keys.device)
        self.rows.index_copy_(0, (self.pointer + places) % length, keys[skipped:].to(self.rows))
        self.pointer.add_(len(keys)).remainder_(length)


def own_rows(count: int, device: torch.device) -> Int[Tensor, " b"]:
    """Row numbers of this rank's `count` rows in the global batch, ranks in order."""
    return dist.rank() * count + torch.arange(count, device=device)


def keys_with_queue(
    keys: Float[Tensor, "B D"], queue: KeyQueue, batch_negatives: bool
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " b"], Bool[Tensor, "b B"] | None]:
    """The bank [keys of the global batch; queue], and what this rank's queries may see of it.

    Args:
        keys: detached keys of the global batch, ranks in order, as `dist.all_gather` gives them.
        queue: past keys; the keys of this batch are not in it yet.
        batch_negatives: True: every key of the batch is a candidate (the official code). False:
            only the query's own key, so that a query sees one positive and the queue (the papers).

    Returns:
        bank; row of each local query's own key (global rank, not local); candidates (None: all).
    """
    own = own_rows(len(keys) // dist.world_size(), keys.device)
    candidates = None
    if not batch_negatives:
        candidates = own[:, None] == torch.arange(len(keys), device=keys.device)
    return torch.cat([keys, queue.rows]), own, candidates


NEGATIVES_CHUNK = 4096  # learned negatives per tile of their gradient


class LearnedNegatives(nn.Module):
    """Negatives that are trained against the network (AdCo, Hu et al. 2021), equal on every rank.

    Rows have any length, but queries are compared with their unit vectors. Rows and velocity are
    buffers: gradient ascent moves them, not the optimiser.

    Args:
        length: number of rows K.
        dim: projection dim D.
        seed: seed of the first rows, which are random unit rows.
    """

    rows: Float[Tensor, "K D"]
    velocity: Float[Tensor, "K D"]

    def __init__(self, length: int, dim: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rows", F.normalize(torch.randn(length, dim, generator=generator)))
        self.register_buffer("velocity", torch.zeros(length, dim))

    def unit(self) -> Float[Tensor, "K D"]:
        """The rows at unit length."""
        return F.normalize(self.rows)

    @torch.no_grad()
    def gradient(
        self, query: Float[Tensor, "b D"], lse: Float[Tensor, "b"], temperature: float
    ) -> Float[Tensor, "K D"]:
        """Gradient of `losses.info_nce`, averaged over the ranks, with respect to the raw rows.

        G_k = (I - u_k u_k^T) (1/B) sum_i p_ik q_i / (T |w_k|), u_k = w_k / |w_k| and
        p_ik = exp(q_i . u_k / T - lse_i): tangent to the sphere, since length does not matter.
        No matrix of queries x negatives is larger than one chunk.

        Args:
            query: queries of this rank.
            lse: log-sum-exp of each query over the whole bank, positives included, at this T.
            temperature: T > 0.
        """
        parts = []
        with torch.autocast(query.device.type, enabled=False):
            for rows in self.rows.split(NEGATIVES_CHUNK):
                length = rows.norm(dim=1, keepdim=True).clamp(min=1e-12)  # as F.normalize
                unit = rows / length
                shares = torch.exp(query @ unit.T / temperature - lse[:, None])
                pull = shares.T @ query / (len(query) * dist.world_size())
                radial = (pull * unit).sum(1, keepdim=True) * unit
                parts.append((pull - radial) / (temperature * length))
        return dist.all_sum(torch.cat(parts))

    @torch.no_grad()
    def fill(self, keys: Float[Tensor, "B D"], first: int) -> None:
        """Replace the rows from `first` on by `keys`, as many as there is room for."""
        self.rows[first : first + len(keys)] = keys[: len(self.rows) - first].to(self.rows)

    @torch.no_grad()
    def ascend(
        self, gradient: Float[Tensor, "K D"], lr: float, momentum: float, decay: float
    ) -> None:
        """One step up the loss: v <- momentum v - G + decay w; w <- w - lr v."""
        self.velocity.mul_(momentum).sub_(gradient).add_(self.rows, alpha=decay)
        self.rows.sub_(self.velocity, alpha=lr)


class Prototypes(nn.Module):
    """Rows that pictures are assigned to (SwAV, DINO); the optimiser trains them with the network.

    Args:
        length: number of rows K.
        dim: projection dim D.
        seed: seed of the first rows, which are random unit rows.
    """

    rows: nn.Parameter

    def __init__(self, length: int, dim: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = nn.Parameter(F.normalize(torch.randn(length, dim, generator=generator)))

    def forward(self, frozen: bool = False) -> Float[Tensor, "K D"]:
        """The rows; with `frozen` their gradient is zero.

        Zero rather than none: DistributedDataParallel waits for a gradient of every parameter.
        """
        return self.rows.detach() + 0.0 * self.rows if frozen else self.rows

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale every row to unit length."""
        self.rows.copy_(F.normalize(self.rows))


class Memory(nn.Module):
    """One row per picture: its projections of past epochs (Wu et al. 2018), equal on every rank.

    Rows start as uniform numbers in +-sqrt(3 / D), with a length of about 1, and have unit length
    after their first update. A picture that replaces an unreadable one updates the row of the
    unreadable one. Rows are a buffer, so they are part of a checkpoint: 4 n D bytes, 656 MB for
    ImageNet at D = 128.

    Args:
        num_pictures: number of rows n.
        dim: projection dim D.
        seed: seed of the first rows.
    """

    rows: Float[Tensor, "n D"]

    def __init__(self, num_pictures: int, dim: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(num_pictures, dim, generator=generator)
        self.register_buffer("rows", (2 * drawn - 1) * math.sqrt(3 / dim))

    def compare(
        self, index: Int[Tensor, " b"], num_negatives: int, seed: int, step: int
    ) -> tuple[Float[Tensor, "N D"], Int[Tensor, " b"], Bool[Tensor, "b b"] | None]:
        """The bank [own rows; rows drawn for this step], and what each query may see of it.

        The rows are drawn from all n with replacement by the counter, the same for all queries and
        on every rank; a query's own row may be among them. Deviation: the official code draws
        other rows for each query, and so gathers b x m x D numbers.

        Args:
            index: this rank's pictures, by their places in the data set.
            num_negatives: rows m to draw; 0: the bank is the whole memory.
            seed, step: decide the draw.

        Returns:
            bank (a copy, unless it is the whole memory); bank row of each query's own picture;
            candidates: of the own rows each query sees only its own (None: it sees all).
        """
        if num_negatives == 0:
            return self.rows, index, None
        slots = torch.arange(num_negatives, device=index.device)
        bits = rng.hash_bits(seed, step, torch.zeros_like(slots[0]), rng.NEGATIVES, slots)
        own = torch.arange(len(index), device=index.device)
        bank = torch.cat([self.rows[index], self.rows[bits % len(self.rows)]])
        return bank, own, own[:, None] == own

    @torch.no_grad()
    def update(
        self, index: Int[Tensor, " b"], features: Float[Tensor, "b D"], momentum: float
    ) -> None:
        """v_i <- norm(r v_i + (1 - r) f_i) for the pictures of all ranks, each at most once.

        Args:
            index: this rank's pictures.
            features: features of these pictures.
            momentum: r, the share of the old row that stays, in [0, 1].
        """
        index, features = dist.all_gather(index), dist.all_gather(features)
        moved = torch.lerp(features.to(self.rows), self.rows[index], momentum)
        self.rows.index_copy_(0, index, F.normalize(moved, dim=1))

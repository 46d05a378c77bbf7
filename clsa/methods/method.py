"""What a learning method is: `forward` computes and changes nothing, `after_step` changes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from clsa.learning.bank import KeyQueue, keys_with_queue
from clsa.learning.losses import Stream
from clsa.learning.models import Network
from clsa.loading.order import Companions
from clsa.options.run import RunOptions
from clsa.views.specs import ViewSpec

Embed = Callable[[Network], Float[Tensor, "n D"]]
"""Unit projections of the centre crops of the whole set by a network, in the set's order."""


class Extent(NamedTuple):
    """How much there is to learn from."""

    num_pictures: int
    num_classes: int
    """0 without labels."""
    steps_per_epoch: int
    num_steps: int
    """Of the whole schedule."""
    labels: Int64[np.ndarray, " n"] | None = None
    """Classes of the pictures, -1 unknown, where a method may learn from them."""
    num_exemplars: int = 0
    """How many pictures, the last of the set, are kept from earlier stages."""


class Landmarks(NamedTuple):
    """What a method's main loss says to whoever watches a run."""

    name: str
    """Of the loss, a key of `Output.losses`."""
    chance: float
    """Of a network that knows nothing."""
    floor: float
    """Of one that knows all it can."""

    def scaled(self, by: float) -> "Landmarks":
        """The same for so many times the loss."""
        return self._replace(chance=by * self.chance, floor=by * self.floor)


class Batch(NamedTuple):
    """What a method sees of this rank's rows: pixels on the device, normalised."""

    views: list[Float[Tensor, "b 3 S S"]]
    """One per entry of `Method.view_specs`, in that order."""
    index: Int[Tensor, " b"]
    """Places in the data set, on the device."""
    labels: Int[Tensor, " b"]
    """Class numbers on the device, -1 unknown."""
    step: int
    """Optimiser step, for schedules and draws from the counter."""

    def part(self, start: int, end: int | None = None) -> "Batch":
        """The rows from `start` to before `end`."""
        views = [view[start:end] for view in self.views]
        return Batch(views, self.index[start:end], self.labels[start:end], self.step)


class Comparison(NamedTuple):
    """Weak queries and the bank that they are compared with: what `Stronger` learns from."""

    queries: list[Float[Tensor, "b D"]] | list[Stream]
    """Unit rows; as streams where the method has them over this very bank and these candidates."""
    bank: Float[Tensor, "N D"]
    """Unit rows, detached."""
    positive: Int[Tensor, " b"] | None = None
    """Bank row of each query's positive; None where there is none (prototypes)."""
    candidates: Bool[Tensor, "b M"] | None = None
    """See `losses.bank_statistics`."""

    def with_bank(self, bank: Float[Tensor, "N D"]) -> "Comparison":
        """The queries beside a bank that begins with the same rows; all see the rows added."""
        return Comparison(self.rows(), bank, self.positive, self.candidates)

    def rows(self) -> list[Float[Tensor, "b D"]]:
        """The queries without their statistics."""
        return [each.query if isinstance(each, Stream) else each for each in self.queries]


class Output(NamedTuple):
    """What `forward` returns: no dataclass, since DistributedDataParallel sees only pytrees."""

    losses: dict[str, Float[Tensor, ""]]
    """Terms whose sum is minimised, local means."""
    state: Any
    """Detached tensors that `after_step` moves into the banks."""
    comparisons: list[Comparison]
    """One for each bank that weak queries were, or could be, compared with."""
    metrics: dict[str, Float[Tensor, ""]]
    """Detached, only logged."""


class Method(nn.Module, ABC):
    """Abstract learning method. Concrete methods are final.

    Attributes:
        network: the encoder with its projector, which is trained and kept.
        view_specs: the views that a batch must hold.
        landmarks: of the loss that tells how far a run is.
        fixed_rate: modules whose learning rate stays at its peak.
        has_positives: whether its comparisons name the bank row of each query's positive.
        holds_pictures: whether its state has a row for each picture of one set.
        has_keys: whether it compares streams with [the batch's keys; other rows], the keys being
            those of `key_network`; `CLIM` needs that.
        weight: of each query's term in the loss of the landmarks.
        first_queued: step from which on its queues move.
    """

    network: Network
    view_specs: list[ViewSpec]
    landmarks: Landmarks
    fixed_rate: tuple[nn.Module, ...] = ()
    has_positives, has_keys, holds_pictures = True, False, False
    weight: float = 1.0
    first_queued: int = 0

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__()

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """Losses of a batch; moves no key weight and no bank."""

    @abstractmethod
    def after_step(self, state: Any, step: int) -> None:
        """Move key weights and banks; called once after each optimiser step, on every rank."""

    def query(self, images: Float[Tensor, "b 3 S S"], batch: Batch) -> Float[Tensor, "b D"]:
        """Unit rows by which a view of `batch` is compared with the bank; with gradient."""
        return self.network(images)

    def before_epoch(self, epoch: int, embed: Embed) -> dict[str, float]:
        """Prepare what stays the same over an epoch, on every rank; nothing by default.

        Returns:
            What to log of it; nothing where there was nothing to do.
        """
        return {}

    def refreshes(self, epoch: int) -> bool:
        """Whether `before_epoch` changes `companions`, so that loading begins anew there."""
        return False

    def companions(self) -> Companions | None:
        """Pictures that stand in each batch after those of the order; none by default."""
        return None


def crossed(
    queries: list[Float[Tensor, "b D"]], keys: list[Float[Tensor, "B D"]], queue: KeyQueue
) -> list[Comparison]:
    """Each view's queries with the keys of the other view of the global batch and a queue."""
    return [
        Comparison([query], *keys_with_queue(others, queue, batch_negatives=True))
        for query, others in zip(queries, keys, strict=True)
    ]


def sum_of(terms: Iterable[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Sum of scalar losses."""
    return torch.stack(list(terms)).sum()

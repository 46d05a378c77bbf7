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
"""A network's unit projections of the centre crops of the whole set, in the set's order."""


class Extent(NamedTuple):
    """How much there is to learn from."""

    num_pictures: int
    num_classes: int
    """0 without labels."""
    steps_per_epoch: int
    num_steps: int
    """In the whole schedule."""
    labels: Int64[np.ndarray, " n"] | None = None
    """Class of each picture, -1 unknown; None if the method may not learn from labels."""
    num_exemplars: int = 0
    """How many pictures were kept from earlier stages; they come last in the set."""


class Landmarks(NamedTuple):
    """Reference values of a method's main loss, to judge how far a run has come."""

    name: str
    """Name of the loss, a key of `Output.losses`."""
    chance: float
    """Loss of a network that knows nothing."""
    floor: float
    """Lowest loss that a network can reach, approximately."""

    def scaled(self, by: float) -> "Landmarks":
        """The same values for the loss multiplied by `by`."""
        return self._replace(chance=by * self.chance, floor=by * self.floor)


class Batch(NamedTuple):
    """This rank's rows of a batch: normalised pixels, on the device."""

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
    """Weak queries and the bank they are compared with; the target of `Stronger`."""

    queries: list[Float[Tensor, "b D"]] | list[Stream]
    """Unit rows; streams if the method already has them over this bank and these candidates."""
    bank: Float[Tensor, "N D"]
    """Unit rows, detached."""
    positive: Int[Tensor, " b"] | None = None
    """Bank row of each query's positive; None if there is none (prototypes)."""
    candidates: Bool[Tensor, "b M"] | None = None
    """See `losses.bank_statistics`."""

    def with_bank(self, bank: Float[Tensor, "N D"]) -> "Comparison":
        """The same queries with a bank that adds rows at its end; every query sees those."""
        return Comparison(self.rows(), bank, self.positive, self.candidates)

    def rows(self) -> list[Float[Tensor, "b D"]]:
        """The queries without their statistics."""
        return [each.query if isinstance(each, Stream) else each for each in self.queries]


class Output(NamedTuple):
    """What `forward` returns. Not a dataclass: DistributedDataParallel sees only pytrees."""

    losses: dict[str, Float[Tensor, ""]]
    """Terms whose sum is minimised, local means."""
    state: Any
    """Detached tensors that `after_step` moves into the banks."""
    comparisons: list[Comparison]
    """One for each bank that weak queries are, or could be, compared with."""
    metrics: dict[str, Float[Tensor, ""]]
    """Detached, only logged."""


class Method(nn.Module, ABC):
    """Abstract learning method. Concrete methods are final.

    Attributes:
        network: the encoder with its projector, which is trained and kept.
        view_specs: the views that a batch must hold.
        landmarks: reference values of the main loss.
        fixed_rate: modules whose learning rate stays at its peak.
        has_positives: whether its comparisons name the bank row of each query's positive.
        holds_pictures: whether its state has a row for each picture of one set.
        has_keys: whether its comparisons hold streams over the bank [the batch's keys; other
            rows], with keys from `key_network`; `CLIM` needs this.
        weight: factor of each query's term in the main loss.
        first_queued: first step at which its queues move.
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
        """Losses of a batch; changes no key weight and no bank."""

    @abstractmethod
    def after_step(self, state: Any, step: int) -> None:
        """Move key weights and banks; called once after each optimiser step, on every rank."""

    def query(self, images: Float[Tensor, "b 3 S S"], batch: Batch) -> Float[Tensor, "b D"]:
        """Unit rows of a view of `batch`, to be compared with the bank; with gradient."""
        return self.network(images)

    def before_epoch(self, epoch: int, embed: Embed) -> dict[str, float]:
        """Prepare what stays the same over an epoch, on every rank; by default, do nothing.

        Returns:
            Numbers to log; empty if there was nothing to do.
        """
        return {}

    def refreshes(self, epoch: int) -> bool:
        """Whether `before_epoch` changes `companions` at this epoch, so loading must restart."""
        return False

    def companions(self) -> Companions | None:
        """Extra pictures at the end of each batch, after those of the order; none by default."""
        return None


def crossed(
    queries: list[Float[Tensor, "b D"]], keys: list[Float[Tensor, "B D"]], queue: KeyQueue
) -> list[Comparison]:
    """Pair each view's queries with [the other view's keys of the global batch; queue]."""
    return [
        Comparison([query], *keys_with_queue(others, queue, batch_negatives=True))
        for query, others in zip(queries, keys, strict=True)
    ]


def sum_of(terms: Iterable[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Sum of scalar losses."""
    return torch.stack(list(terms)).sum()

"""What a learning method is: `forward` computes and changes nothing, `after_step` changes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clsa.models import Network
from clsa.options import RunOptions
from clsa.views import ViewSpec


class Batch(NamedTuple):
    """What a method sees of this rank's rows: pixels on the device, normalised."""

    views: list[Float[Tensor, "b 3 S S"]]
    """One per entry of `Method.view_specs`, in that order."""
    index: Int[Tensor, " b"]
    """Places in the data set."""
    labels: Int[Tensor, " b"]
    """Class numbers, -1 unknown; no method of this file's age uses them."""
    step: int
    """Optimiser step, for draws from the counter."""


class Output(NamedTuple):
    """What `forward` returns: no dataclass, since DistributedDataParallel sees only pytrees."""

    losses: dict[str, Float[Tensor, ""]]
    """Terms whose sum is minimised, local means."""
    state: Any
    """Detached tensors that `after_step` moves into the banks."""
    metrics: dict[str, Float[Tensor, ""]]
    """Detached, only logged."""


class Method(nn.Module, ABC):
    """Abstract learning method. Concrete methods are final.

    Attributes:
        network: the encoder with its projector, which is trained and kept.
        view_specs: the views that a batch must hold.
        chance, floor: the "contrast" loss of a network that knows nothing and of one that knows
            all it can, in nats: landmarks for whoever watches a run.
    """

    network: Network
    view_specs: list[ViewSpec]
    chance: float
    floor: float

    def __init__(self, options: RunOptions):
        super().__init__()
        self.options = options.method
        self.seed = options.seed

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """Losses of a batch; moves no key weight and no bank."""

    @abstractmethod
    def after_step(self, state: Any, step: int) -> None:
        """Move key weights and banks; called once after each optimiser step, on every rank."""


def sum_of(terms: Iterable[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Sum of scalar losses."""
    return torch.stack(list(terms)).sum()

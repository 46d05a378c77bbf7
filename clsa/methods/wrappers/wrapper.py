"""The class of wrappers, which are methods around another method, and how to look inside them."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from clsa.learning.models import Network
from clsa.loading.order import Companions
from clsa.methods.method import Batch, Embed, Extent, Method
from clsa.options.run import RunOptions


class Wrapper(Method):
    """A method around another one; whatever it does not define is done by the inner method.

    Attributes:
        base: the inner method.
    """

    def __init__(self, base: Method, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        self.base, self.view_specs = base, base.view_specs
        self.landmarks, self.fixed_rate = base.landmarks, base.fixed_rate
        self.has_positives, self.has_keys = base.has_positives, base.has_keys
        self.first_queued = base.first_queued

    @property
    def network(self) -> Network:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner method's network: all queries share it."""
        return self.base.network

    def after_step(self, state: Any, step: int) -> None:
        """As the inner method."""
        self.base.after_step(state, step)

    def query(self, images: Float[Tensor, "b 3 S S"], batch: Batch) -> Float[Tensor, "rows D"]:
        """As the inner method."""
        return self.base.query(images, batch)

    def before_epoch(self, epoch: int, embed: Embed) -> dict[str, float]:
        """As the inner method."""
        return self.base.before_epoch(epoch, embed)

    def refreshes(self, epoch: int) -> bool:
        """As the inner method."""
        return self.base.refreshes(epoch)

    def companions(self) -> Companions | None:
        """As the inner method."""
        return self.base.companions()


def innermost(method: Method) -> Method:
    """The learning method inside all its wrappers."""
    while isinstance(method, Wrapper):
        method = method.base
    return method


def key_network_of(method: Method) -> Network | None:
    """The momentum copy of a method's network, or None if it has none."""
    inner = innermost(method)
    found = getattr(inner, "key_network", getattr(inner, "teacher", None))
    return found if isinstance(found, Network) else None

"""Two pictures mixed into one, and a loss that knows both (CLIM): drawn first, then applied."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from clsa.options.wrappers import MixtureOptions
from clsa.views import rng

GRID = 1 << 14  # points of the table that inverts the distribution of shares


class Mixture(NamedTuple):
    """How each picture of a batch is mixed with its partner."""

    share: Float[Tensor, " b"]
    """lambda: what is left of the picture itself, in [0, 1]."""
    box: Float[Tensor, "b 4"] | None
    """CutMix: top, left, bottom and right edge of the partner's part, as shares of the side; None:
    every pixel is averaged."""

    def part(self, start: int, end: int) -> "Mixture":
        """That of these pictures."""
        box = None if self.box is None else self.box[start:end]
        return Mixture(self.share[start:end], box)


@functools.lru_cache(maxsize=8)
def _lower_half(alpha: float) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Distribution function of Beta(alpha, alpha), and where in [0, 1/2] it has these values.

    With x = s^(1/a) and a = min(alpha, 1) the integrand s^(alpha/a - 1) (1 - x)^(alpha - 1) is
    bounded for every alpha.
    """
    power = 1 / min(alpha, 1.0)
    s = np.linspace(0, 0.5 ** (1 / power), GRID)
    with np.errstate(divide="ignore"):
        rising = 0.0 if alpha <= 1 else (alpha - 1) * np.log(s)
    logs = rising + (alpha - 1) * np.log1p(-(s**power))
    density = np.exp(logs - logs.max())
    total = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return 0.5 * total / total[-1], s


def beta_quantile(uniforms: Float64[Tensor, " b"], alpha: float) -> Float64[Tensor, " b"]:
    """Where Beta(alpha, alpha) has these values of its distribution function, to about 1e-4.

    Its variance is 1 / (4 (2 alpha + 1)); alpha = 1 is the identity.

    Args:
        uniforms: in [0, 1].
        alpha: above 0.
    """
    table, places = (torch.from_numpy(each).to(uniforms.device) for each in _lower_half(alpha))
    lower = torch.minimum(uniforms, 1 - uniforms)
    above = torch.searchsorted(table, lower, right=True).clamp(1, GRID - 1)
    low, high = table[above - 1], table[above]
    part = ((lower - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    x = torch.lerp(places[above - 1], places[above], part) ** (1 / min(alpha, 1.0))
    return torch.where(uniforms <= 0.5, x, 1 - x)


def boxed(
    share: Float64[Tensor, " b"], centre: Float64[Tensor, "b 2"], size: int
) -> tuple[Float64[Tensor, " b"], Float64[Tensor, "b 4"]]:
    """CutMix's boxes (Yun et al. 2019), and the shares that they leave.

    Sides are size sqrt(1 - lambda), edges are clipped to the picture and rounded to its pixels,
    then lambda <- 1 - area of the box.

    Args:
        share: lambda before.
        centre: of the boxes, in [0, 1].
        size: side in pixels of the largest view; smaller ones take the same box.
    """
    half = ((1 - share).clamp(min=0).sqrt() / 2)[:, None]
    edges = torch.cat([centre - half, centre + half], 1).clamp(0, 1)
    edges = (edges * size).round() / size
    sides = edges[:, 2:] - edges[:, :2]
    return 1 - sides[:, 0] * sides[:, 1], edges


def draw(
    options: MixtureOptions, size: int, seed: int, step: int, index: Int[Tensor, " b"]
) -> Mixture:
    """The mixture of each picture of a step, from (seed, step, index): lambda ~ Beta(alpha, alpha).

    Where nothing is mixed lambda is 1/2: both keys count the same.

    Args:
        options: how pictures are mixed, and alpha.
        size: of the largest view, in pixels.
        index: places in the data set.
    """
    slots = torch.arange(3, device=index.device)
    uniforms = rng.uniforms(seed, step, index, rng.MIXTURE, slots)
    if options.mixing == "none":
        return Mixture(torch.full_like(uniforms[:, 0], 0.5).float(), None)
    share = beta_quantile(uniforms[:, 0], options.alpha)
    if options.mixing == "mixup":
        return Mixture(share.float(), None)
    share, box = boxed(share, uniforms[:, 1:], size)
    return Mixture(share.float(), box.float())


def mix(
    images: Float[Tensor, "b 3 S S"], partners: Float[Tensor, "b 3 S S"], mixture: Mixture
) -> Float[Tensor, "b 3 S S"]:
    """M x + (1 - M) x~ with the mask M of all outside the box, else lambda x + (1 - lambda) x~."""
    if mixture.box is None:
        return torch.lerp(partners, images, mixture.share[:, None, None, None])
    size = images.shape[-1]
    edges = (mixture.box * size).round()[:, :, None]
    places = torch.arange(size, device=images.device)
    top, left, bottom, right = edges.unbind(1)
    inside_rows = (places >= top) & (places < bottom)
    inside_columns = (places >= left) & (places < right)
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return torch.where(inside, partners, images)

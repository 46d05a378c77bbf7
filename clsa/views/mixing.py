"""Mixes two pictures into one (CLIM): `draw` decides how, from a counter, and `mix` does it."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from clsa.options.wrappers import MixtureOptions
from clsa.views import rng

GRID = 1 << 14  # points in the table that inverts the distribution of shares


class Mixture(NamedTuple):
    """How each picture of a batch is mixed with its partner."""

    share: Float[Tensor, " b"]
    """lambda, in [0, 1]: how much of the picture itself is left."""
    box: Float[Tensor, "b 4"] | None
    """CutMix: top, left, bottom and right edge of the partner's part, as shares of the side. None:
    every pixel is averaged."""

    def part(self, start: int, end: int) -> "Mixture":
        """The same for the pictures from `start` to `end` only."""
        box = None if self.box is None else self.box[start:end]
        return Mixture(self.share[start:end], box)


@functools.lru_cache(maxsize=8)
def _lower_half(alpha: float) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Table of the distribution function of Beta(alpha, alpha) on [0, 1/2]: values, then points s.

    A point s stands for x = s^(1/a) with a = min(alpha, 1), because the integrand
    s^(alpha/a - 1) (1 - x)^(alpha - 1) is then bounded for every alpha.
    """
    power = 1 / min(alpha, 1.0)
    s = np.linspace(0, 0.5 ** (1 / power), GRID)
    with np.errstate(divide="ignore"):
        rising = 0.0 if alpha <= 1 else (alpha - 1) * np.log(s)
    logs = rising + (alpha - 1) * np.log1p(-(s**power))
    density = np.exp(logs - logs.max())
    total = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return 0.5 * total / total[-1], s


def beta_quantile(uniforms: Float[Tensor, " b"], alpha: float) -> Float64[Tensor, " b"]:
    """Quantiles of Beta(alpha, alpha): its inverse distribution function, to about 1e-4.

    The variance of Beta(alpha, alpha) is 1 / (4 (2 alpha + 1)); alpha = 1 is the identity.

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
    share: Float64[Tensor, " b"], centre: Float[Tensor, "b 2"], size: int
) -> tuple[Float64[Tensor, " b"], Float64[Tensor, "b 4"]]:
    """The boxes of CutMix (Yun et al. 2019), and the share of the picture that each box leaves.

    The sides of a box are size sqrt(1 - lambda). Its edges are clipped to the picture and rounded
    to its pixels, then lambda <- 1 - area of the box.

    Args:
        share: lambda as drawn.
        centre: centres of the boxes (row, column), in [0, 1].
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

    If pictures are not mixed, lambda is 1/2: both keys count the same.

    Args:
        options: how pictures are mixed, and alpha.
        size: side of the largest view in pixels.
        index: places of the pictures in the data set.
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
    """Mix x with its partner x~: M x + (1 - M) x~ with a box, else lambda x + (1 - lambda) x~.

    The mask M is 1 outside the box and 0 inside.
    """
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

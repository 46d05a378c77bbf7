"""Changes pixel values: jitter, grayscale and blur of weak views, pixel operations of strong views.

Weak operations take floats in [0, 1] and equal torchvision's. Strong operations take uint8 and
reproduce Pillow's integer arithmetic. NumPy arrays on the CPU say which rows an operation changes,
so the host never has to wait for the device.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from clsa.system.machine import upload

BLUR_TAPS = 13
"""2 ceil(3 sigma) + 1 at the largest sigma, 2 pixels."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def _select(images: Tensor, apply: Bool[np.ndarray, "B"]) -> tuple[Tensor, Tensor]:
    rows = upload([np.flatnonzero(apply)], images.device)[0]
    return rows, images.index_select(0, rows)


def _gray(images: Float32[Tensor, "B 3 S S"]) -> Float32[Tensor, "B 1 S S"]:
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _shift_hue(
    images: Float32[Tensor, "B 3 S S"], turns: Float32[Tensor, "B"]
) -> Float32[Tensor, "B 3 S S"]:
    """Turn the hue h: each channel becomes v - c clamp(2 - 6 d, 0, 1).

    v is the largest channel and c the range of the channels. d is the distance, on a circle of
    length 1, from h to the hue opposite the channel (cyan 3/6, magenta 5/6, yellow 7/6).
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    from_green, from_blue = (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    hue = torch.where(value == green, from_green, from_blue)
    hue = torch.where(value == red, green - blue, hue)
    hue = hue.div_(chroma.clamp(min=1e-12)).div_(6).add_(turns[:, None, None])
    opposite = (3 + 2 * torch.arange(3, device=images.device)[:, None, None]) / 6
    distance = hue[:, None] - opposite
    distance = distance.sub_(distance.round()).abs_()
    weight = distance.mul_(-6).add_(2).clamp_(0, 1)
    return value[:, None] - weight.mul_(chroma[:, None])


def jitter(
    images: Float32[Tensor, "B 3 S S"],
    factors: Float[np.ndarray, "B 4"],
    order: Int64[np.ndarray, "B 4"],
    apply: Bool[np.ndarray, "B"],
    fused: bool = False,
) -> Float32[Tensor, "B 3 S S"]:
    """Colour jitter, each row in its own order.

    Brightness, contrast and saturation are one blend, f x + s gray + m mean(gray), with (s, m) =
    (0, 0), (0, 1 - f), (1 - f, 0), clamped to [0, 1]; hue turns the colour circle.

    Args:
        images: in [0, 1].
        factors: brightness, contrast, saturation (1: unchanged), then turns of hue (0: unchanged).
        order: which of the four operations comes first, second, third, fourth.
        apply: rows to change.
        fused: compute both the blend and the hue for every row and keep the one that is due, in
            kernels that torch.compile fuses. This needs far fewer passes over the memory of a GPU,
            but wastes time on a CPU.
    """
    if not apply.any():
        return images
    drawn = np.take_along_axis(factors, order, 1)
    is_hue = apply[:, None] & (order == HUE)
    keep = np.where(apply[:, None] & (order != HUE), drawn, 1)
    to_gray, to_mean = (1 - keep) * (order == SATURATION), (1 - keep) * (order == CONTRAST)
    weights = np.stack([keep, to_gray, to_mean]).transpose(2, 0, 1).astype(np.float32)
    weights = upload([weights], images.device)[0][..., None, None, None]
    if fused:
        turns = np.stack([is_hue, drawn * is_hue]).transpose(2, 0, 1).astype(np.float32)
        return _compiled_jitter()(images, weights, upload([turns], images.device)[0])
    hue_rows = upload([np.flatnonzero(step) for step in is_hue.T], images.device)
    turns = [drawn[step, k].astype(np.float32) for k, step in enumerate(is_hue.T)]
    turns = upload(turns, images.device)
    for (f, s, m), rows, turn in zip(weights, hue_rows, turns, strict=True):
        gray = _gray(images)
        mean = gray.mean((1, 2, 3), keepdim=True)
        images = (images * f).add_(gray.mul_(s).add_(mean * m)).clamp_(0, 1)
        images.index_copy_(0, rows, _shift_hue(images.index_select(0, rows), turn))
    return images


def _dense_jitter(
    images: Float32[Tensor, "B 3 S S"],
    weights: Float32[Tensor, "4 3 B 1 1 1"],
    turns: Float32[Tensor, "4 2 B"],
) -> Float32[Tensor, "B 3 S S"]:
    """`jitter` without gather and scatter; `turns`: per step, whether and how far hue is turned."""
    for (f, s, m), (is_hue, turn) in zip(weights, turns, strict=True):
        gray = _gray(images)
        mean = gray.mean((1, 2, 3), keepdim=True)
        blended = (images * f + (gray * s + mean * m)).clamp(0, 1)
        turned = _shift_hue(images, turn)
        images = torch.where(is_hue[:, None, None, None] > 0, turned, blended)
    return images


@functools.cache
def _compiled_jitter() -> Callable[..., Tensor]:
    return torch.compile(_dense_jitter, dynamic=False)


def grayscale(
    images: Float32[Tensor, "B 3 S S"], apply: Bool[np.ndarray, "B"]
) -> Float32[Tensor, "B 3 S S"]:
    """Take the colour off the rows of `apply`: 0.2989 R + 0.587 G + 0.114 B in every channel."""
    if not apply.any():
        return images
    rows, chosen = _select(images, apply)
    return images.index_copy(0, rows, _gray(chosen).expand_as(chosen))


def blur(
    images: Float32[Tensor, "B 3 S S"],
    sigma: Float[np.ndarray, "B"],
    apply: Bool[np.ndarray, "B"],
) -> Float32[Tensor, "B 3 S S"]:
    """Gaussian blur of the rows of `apply`: G X G^T, 13 taps, borders reflected.

    Computed by matrix products on a GPU, by convolutions elsewhere.

    Args:
        images: at least 7 pixels wide.
        sigma: standard deviation in pixels, at most 2 (the kernel reaches 6 pixels, 3 sigma).
        apply: rows to change.
    """
    if not apply.any():
        return images
    rows, chosen = _select(images, apply)
    reach = np.arange(BLUR_TAPS) - BLUR_TAPS // 2
    taps = np.exp(-0.5 * (reach / sigma[apply, None]) ** 2)
    taps = (taps / taps.sum(1, keepdims=True)).astype(np.float32)
    # On a CPU, at 224 pixels, convolutions take a fifth of the time of products. Products suit a
    # GPU: kornia publishes 17 ms per batch of 256 on an H200 for its grouped convolutions.
    blurred = _blur_by_products if images.is_cuda else _blur_by_convolutions
    return images.index_copy(0, rows, blurred(chosen, taps))


def _blur_by_products(
    images: Float32[Tensor, "B 3 S S"], taps: Float32[np.ndarray, "B taps"]
) -> Float32[Tensor, "B 3 S S"]:
    size = images.shape[-1]
    weights = upload([taps], images.device)[0]
    kernel = (weights @ _spread(size, images.device)).view(-1, 1, size, size)
    return kernel @ images @ kernel.transpose(2, 3)


@functools.cache
def _spread(size: int, device: torch.device) -> Float32[Tensor, "taps pixels"]:
    """For each tap, a size x size matrix of 0 and 1: the pixel it reads, with reflected borders."""
    half = BLUR_TAPS // 2
    reached = np.abs(np.arange(size) + np.arange(-half, half + 1)[:, None])
    reached = size - 1 - np.abs(size - 1 - reached)
    spread = (reached[..., None] == np.arange(size)).astype(np.float32)
    return upload([spread], device)[0].view(BLUR_TAPS, -1)


def _blur_by_convolutions(
    images: Float32[Tensor, "B 3 S S"], taps: Float32[np.ndarray, "B taps"]
) -> Float32[Tensor, "B 3 S S"]:
    padded = functional.pad(images, (BLUR_TAPS // 2,) * 4, mode="reflect")
    kernel = upload([taps.repeat(3, axis=0)], images.device)[0][:, None, None]
    one_each = padded.reshape(1, -1, *padded.shape[2:])  # each picture has its kernel
    across = functional.conv2d(one_each, kernel, groups=len(kernel))
    return functional.conv2d(across, kernel.mT, groups=len(kernel)).view_as(images)


def solarize_half(
    images: Float32[Tensor, "B 3 S S"], apply: Bool[np.ndarray, "B"]
) -> Float32[Tensor, "B 3 S S"]:
    """Invert pixels of 0.5 or more, in [0, 1], in the rows of `apply` (BYOL's second view)."""
    if not apply.any():
        return images
    rows, chosen = _select(images, apply)
    return images.index_copy(0, rows, torch.where(chosen < 0.5, chosen, 1 - chosen))


def normalize(
    images: Float32[Tensor, "B 3 S S"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float32[Tensor, "B 3 S S"]:
    """(x - mean) / std for each channel of images in [0, 1]."""
    numbers = np.array([mean, std], dtype=np.float32)
    shift, scale = upload([numbers], images.device)[0][..., None, None]
    return (images - shift).div_(scale)


def auto_contrast(images: UInt8[Tensor, "B 3 S S"]) -> UInt8[Tensor, "B 3 S S"]:
    """Stretch each channel from its own range to 0..255 (Pillow's ImageOps.autocontrast)."""
    low = images.amin((2, 3), keepdim=True).double()
    high = images.amax((2, 3), keepdim=True).double()
    scale = low.new_full((), 255.0) / (high - low).clamp(min=1)  # a float / x rounds 1 / x first
    stretched = (images * scale).add_(-low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def equalize(images: UInt8[Tensor, "B 3 S S"]) -> UInt8[Tensor, "B 3 S S"]:
    """Flatten the histogram of each channel (Pillow's ImageOps.equalize)."""
    flat = images.flatten(2)
    index = flat.long()
    counts = index.new_zeros(*index.shape[:2], 256, dtype=torch.int32)
    counts.scatter_add_(2, index, counts.new_ones(1).expand_as(index))
    of_brightest = (flat == flat.amax(2, keepdim=True)).sum(2, keepdim=True)
    step = (flat.shape[2] - of_brightest) // 255
    below = counts.cumsum(2) - counts
    table = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.to(torch.uint8).gather(2, index).view_as(images)


def invert(images: UInt8[Tensor, "B 3 S S"]) -> UInt8[Tensor, "B 3 S S"]:
    """The negative image."""
    return 255 - images


def solarize(
    images: UInt8[Tensor, "B 3 S S"], threshold: Float[Tensor, "B"]
) -> UInt8[Tensor, "B 3 S S"]:
    """Invert pixels at or above the threshold, 0 to 256 (256: none)."""
    return torch.where(images < threshold[:, None, None, None], images, 255 - images)


def solarize_add(images: UInt8[Tensor, "B 3 S S"]) -> UInt8[Tensor, "B 3 S S"]:
    """Add 110 to pixels below 128 (RandAugment's SolarizeAdd at full strength)."""
    return torch.where(images < 128, images + 110, images)


def posterize(
    images: UInt8[Tensor, "B 3 S S"], bits: Float[Tensor, "B"]
) -> UInt8[Tensor, "B 3 S S"]:
    """Keep the upper `bits` (1 to 8) of each pixel."""
    mask = 256 - torch.exp2(8 - bits)
    return images & mask.to(torch.uint8)[:, None, None, None]


def _luma(images: Float32[Tensor, "B 3 S S"]) -> Float32[Tensor, "B 1 S S"]:
    """Pillow's (19595 R + 38470 G + 7471 B + 2^15) >> 16; every term is below 2^24, so exact."""
    red, green, blue = images.split(1, dim=1)
    total = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768)
    return total.mul_(2.0**-16).floor_()


def _blend(
    degenerate: Float32[Tensor, "B #C #S #S"],
    images: Float32[Tensor, "B 3 S S"],
    factor: Float[Tensor, "B"],
) -> UInt8[Tensor, "B 3 S S"]:
    """Pillow's Image.blend for factors of 0 or more: in float32, clipped, then truncated."""
    mixed = (images - degenerate).mul_(factor.float()[:, None, None, None]).add_(degenerate)
    return mixed.clamp_(0, 255).to(torch.uint8)


def contrast(
    images: UInt8[Tensor, "B 3 S S"], factor: Float[Tensor, "B"]
) -> UInt8[Tensor, "B 3 S S"]:
    """Blend with the rounded mean gray (0: gray, 1: unchanged; Pillow's Contrast)."""
    pixels = images.float()
    mean = _luma(pixels).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend((mean + 0.5).floor().float(), pixels, factor)


def saturate(
    images: UInt8[Tensor, "B 3 S S"], factor: Float[Tensor, "B"]
) -> UInt8[Tensor, "B 3 S S"]:
    """Blend with the gray image (0: gray, 1: unchanged; Pillow's Color)."""
    pixels = images.float()
    return _blend(_luma(pixels), pixels, factor)


def brightness(
    images: UInt8[Tensor, "B 3 S S"], factor: Float[Tensor, "B"]
) -> UInt8[Tensor, "B 3 S S"]:
    """Blend with black (0: black, 1: unchanged; Pillow's Brightness)."""
    return (images * factor.float()[:, None, None, None]).clamp_(0, 255).to(torch.uint8)


def sharpness(
    images: UInt8[Tensor, "B 3 S S"], factor: Float[Tensor, "B"]
) -> UInt8[Tensor, "B 3 S S"]:
    """Blend with Pillow's SMOOTH, (3x3 sum + 4 centre) / 13 rounded; the border is unchanged."""
    pixels = images.float()
    rows = (pixels[:, :, :-2] + pixels[:, :, 1:-1]).add_(pixels[:, :, 2:])
    total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1].mul_(4).add_(total).div_(13).add_(0.5).floor_()
    return _blend(smooth, pixels, factor)

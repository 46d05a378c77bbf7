"""The strong operations by Pillow, one picture at a time, and how closely ours match them."""

import functools
import io
import tarfile
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from clsa.system.files import ASSETS
from clsa.views import transform

CLIPART = ASSETS / "clipart.tar"
LOOK_UPS = ("AutoContrast", "Equalize", "Invert", "Solarize", "SolarizeAdd", "Posterize")


def operate(image: Image.Image, op: str, amount: float) -> Image.Image:
    """What the official code does for one drawn operation."""
    shift = {
        "ShearX": (1, amount, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, amount, 1, 0),
        "TranslateX": (1, 0, amount, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, amount),
    }
    if op in shift:
        return image.transform(image.size, Image.Transform.AFFINE, shift[op])
    plain = {
        "Identity": lambda: image,
        "Rotate": lambda: image.rotate(amount),
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Solarize": lambda: ImageOps.solarize(image, int(amount)),
        "SolarizeAdd": lambda: image.point(
            [min(v + 110, 255) if v < 128 else v for v in range(256)] * 3
        ),
        "Posterize": lambda: ImageOps.posterize(image, int(amount)),
    }
    if op in plain:
        return plain[op]()
    return getattr(ImageEnhance, op)(image).enhance(amount)


def to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def clipart(count: int) -> list[Image.Image]:
    """Labelled pictures of the embedded set, spread over its classes."""
    with tarfile.open(CLIPART) as archive:
        members = [m for m in archive.getmembers() if m.name.startswith("train/") and m.isfile()]
        chosen = members[:: len(members) // count][:count]
        data = [archive.extractfile(member) for member in chosen]
        return [Image.open(io.BytesIO(f.read())).convert("RGB") for f in data if f]


@functools.cache
def pictures(size: int, count: int = 60) -> Tensor:
    """uint8 (count + 4, 3, size, size): clip art, noise, a gradient, few grays and one colour."""
    real = [to_tensor(image.resize((size, size))) for image in clipart(count)]
    noise = np.random.default_rng(0).integers(0, 256, (3, size, size))
    ramp = np.linspace(20, 200, size)[None, None] + np.array([0, 20, 40])[:, None, None]
    gradient = np.broadcast_to(ramp, (3, size, size))
    made = [noise, gradient, noise // 128 * 90 + 7, np.full((3, size, size), 77)]
    return torch.stack([*real, *(torch.from_numpy(image.astype(np.uint8)) for image in made)])


def one_round(op: str, pool: str, magnitude: np.ndarray, sign: np.ndarray) -> transform.Params:
    """Parameters that apply `op` once to every row, and nothing else."""
    count = len(magnitude)
    off, on = np.zeros(count, bool), np.ones((count, 1), bool)
    return transform.Params(
        jitter=off, factors=np.ones((count, 4)), order=np.tile(np.arange(4), (count, 1)),
        gray=off, blur=off, sigma=np.ones(count), solarize=off,
        ops=np.full((count, 1), transform.POOLS[pool].index(op)), applied=on,
        magnitude=magnitude[:, None], sign=sign[:, None],
    )  # fmt: skip


class Parity(NamedTuple):
    """Shares of pixels, over the draws of one operation."""

    mean_close: float
    """Within 1/255, mean over draws."""
    min_close: float
    """Within 1/255, worst draw."""
    equal: float
    """Exactly equal, mean over draws."""


def parity(op: str, pool: str, num_draws: int, size: int) -> Parity:
    """Our operation against Pillow's on `num_draws` pictures with random magnitudes and signs."""
    draw = np.random.default_rng([size, *op.encode()])
    source = pictures(size)
    images = source[draw.integers(0, len(source), num_draws)]
    magnitude = draw.integers(0, 1 << 24, num_draws) * 2.0**-24
    sign = draw.choice([-1.0, 1.0], num_draws)
    ours = transform.apply_ops(images, one_round(op, pool, magnitude, sign), pool)
    amounts = transform.amount(op, pool, magnitude, sign, size)
    theirs = torch.stack(
        [
            to_tensor(operate(to_pillow(image), op, float(amount)))
            for image, amount in zip(images, amounts, strict=True)
        ]
    )
    difference = (ours.int() - theirs.int()).abs().flatten(1)
    close = (difference <= 1).double().mean(1)
    equal = (difference == 0).double().mean(1)
    return Parity(float(close.mean()), float(close.min()), float(equal.mean()))

"""Views as the official CLSA code and lightly make them: with Pillow and torchvision, one by one.

The benchmark of the input path and the plain CLSA step use them. Python's `random` draws.
"""

import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from clsa.views.specs import ViewSpec
from clsa.views.transform import MAX_SIGMA, MEAN, MIN_SIGMA, STD
from tests.support.reference_pillow import operate

View = Callable[[Image.Image], Tensor]

# From one of nine levels and the picture's side to the amount that `operate` takes.
AMOUNTS: dict[str, Callable[[int, int], float]] = {
    "ShearX": lambda v, _: _either(3 * v / 100),
    "ShearY": lambda v, _: _either(3 * v / 100),
    "TranslateX": lambda v, size: _either(3 * v * size // 100),
    "TranslateY": lambda v, size: _either(3 * v * size // 100),
    "Rotate": lambda v, _: _either(3 * v),
    "AutoContrast": lambda *_: 0,
    "Equalize": lambda *_: 0,
    "Solarize": lambda v, _: 256 - 256 * v // 10,
    "Posterize": lambda v, _: 4 + 4 * v // 10,
    "Contrast": lambda v, _: 0.05 + 9 * v / 100,
    "Color": lambda v, _: 0.05 + 9 * v / 100,
    "Brightness": lambda v, _: 0.05 + 9 * v / 100,
    "Sharpness": lambda v, _: 0.05 + 9 * v / 100,
    "Identity": lambda *_: 0,
}


def _either(value: float) -> float:
    return random.choice((-value, value))


class Blur:
    """Gaussian blur of a random sigma, 0.1 to 2 pixels."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(MIN_SIGMA, MAX_SIGMA)))


class Rounds:
    """The strong rounds: each applies one of 14 operations with the given probability."""

    def __init__(self, rounds: int, probability: float):
        self.rounds, self.probability, self.names = rounds, probability, list(AMOUNTS)

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(self.rounds):
            if random.random() < self.probability:
                op = random.choice(self.names)
                image = operate(image, op, AMOUNTS[op](random.randint(1, 9), image.width))
        return image


def view(spec: ViewSpec) -> View:
    """The recipe of one view as transforms of a Pillow picture (the official pool)."""
    weak, ops = spec.weak, spec.ops
    steps = [
        transforms.RandomResizedCrop(spec.size, scale=spec.scale),
        transforms.RandomApply([transforms.ColorJitter(*weak.jitter)], p=weak.jitter_probability),
        transforms.RandomGrayscale(weak.grayscale),
        *([transforms.RandomApply([Blur()], p=spec.blur)] if spec.blur else []),
        transforms.RandomHorizontalFlip(weak.flip),
        *([Rounds(ops.rounds, ops.probability)] if ops.rounds else []),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return transforms.Compose(steps)


def load(path: Path | str) -> Image.Image:
    """A picture as torchvision's folder loader opens it."""
    with open(path, "rb") as file, Image.open(file) as image:
        return image.convert("RGB")


class Views:
    """All views of one picture, as a transform for a data set."""

    def __init__(self, specs: list[ViewSpec]):
        self.views = [view(spec) for spec in specs]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [made(image) for made in self.views]

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as torchvision

from clsa.views import color
from tests.support.reference_pillow import LOOK_UPS, operate, parity, pictures, to_pillow, to_tensor

JITTER = (
    torchvision.adjust_brightness,
    torchvision.adjust_contrast,
    torchvision.adjust_saturation,
    torchvision.adjust_hue,
)
ENHANCE = {
    "Contrast": color.contrast,
    "Color": color.saturate,
    "Brightness": color.brightness,
    "Sharpness": color.sharpness,
}


def floats(size: int = 32) -> Tensor:
    return pictures(size).float() / 255


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_jitter_equals_torchvision_in_each_rows_own_order() -> None:
    images, draw = floats(), np.random.default_rng(0)
    count = len(images)
    factors = draw.uniform([0, 0, 0, -0.5], [2, 2, 2, 0.5], (count, 4))
    order = draw.permuted(np.tile(np.arange(4), (count, 1)), axis=1)
    apply = np.arange(count) % 5 != 0
    before = images.clone()
    jittered = color.jitter(images, factors, order, apply)
    assert torch.equal(images, before)
    for i, expected in enumerate(images):
        if not apply[i]:
            assert torch.equal(jittered[i], expected)
            continue
        for op in order[i]:
            expected = JITTER[op](expected, float(factors[i, op]))
        close(jittered[i], expected)


@pytest.mark.parametrize("op", range(4))
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_each_part_of_jitter_equals_torchvision(op: int, share: float) -> None:
    factor = share - 0.5 if op == color.HUE else 2 * share
    images = floats()[20:]  # the made-up pictures too: gray, black and white, one colour
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (len(images), 1))
    factors[:, op] = factor
    order = np.tile(np.arange(4), (len(images), 1))
    jittered = color.jitter(images, factors, order, np.ones(len(images), bool))
    close(jittered, JITTER[op](images, factor))


@pytest.mark.parametrize("count", [0, 1])
def test_jitter_of_few_rows(count: int) -> None:
    images = floats()[:count]
    order = np.tile(np.arange(4), (count, 1))
    unchanged = np.tile([1.0, 1.0, 1.0, 0.0], (count, 1))
    close(color.jitter(images, unchanged, order, np.ones(count, bool)), images)


def test_grayscale_equals_torchvision() -> None:
    images = floats()
    apply = np.arange(len(images)) % 2 == 0
    gray = color.grayscale(images, apply)
    close(gray[::2], torchvision.rgb_to_grayscale(images, 3)[::2])
    assert torch.equal(gray[1::2], images[1::2])


@pytest.mark.parametrize("size", [8, 33])
def test_blur_equals_torchvision(size: int) -> None:
    images = floats(size)
    sigma = np.linspace(0.1, 2, len(images))
    apply = np.arange(len(images)) % 3 != 1
    blurred = color.blur(images, sigma, apply)
    for i, image in enumerate(images):
        expected = torchvision.gaussian_blur(image, [13, 13], [float(sigma[i])] * 2)
        close(blurred[i], expected if apply[i] else image)


def test_fused_jitter_equals_the_plain_one_to_the_bit() -> None:
    images = torch.rand(40, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    factors = rng.uniform([0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1], (40, 4))
    order = np.stack([rng.permutation(4) for _ in range(40)])
    drawn = (images, factors, order, rng.random(40) < 0.8)
    with torch.compiler.set_stance("force_eager"):  # the function to compile, uncompiled
        assert torch.equal(color.jitter(*drawn, fused=True), color.jitter(*drawn))


@pytest.mark.parametrize("size", [7, 32, 61])
def test_both_ways_to_blur_agree(size: int) -> None:
    images = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    taps = np.random.default_rng(0).dirichlet(np.ones(color.BLUR_TAPS), 5).astype(np.float32)
    products = color._blur_by_products(images, taps)
    torch.testing.assert_close(color._blur_by_convolutions(images, taps), products)


def test_solarize_half_equals_torchvision() -> None:
    images = floats()
    images[0] = torch.linspace(0, 1, images[0].numel()).view_as(images[0])
    images[2, 0] = 0.5  # on the border: inverted to itself
    apply = np.arange(len(images)) % 2 == 0
    before = images.clone()
    solarized = color.solarize_half(images, apply)
    assert torch.equal(images, before)
    assert torch.equal(solarized[::2], torchvision.solarize(images, 0.5)[::2])
    assert torch.equal(solarized[1::2], images[1::2])
    assert solarized[0].max() <= 0.5 and not torch.equal(solarized[0], images[0])


def test_solarize_add_by_hand() -> None:
    """RandAugment adds 110 below 128 (Cubuk et al. 2020); nothing overflows."""
    values = torch.tensor([0, 1, 17, 127, 128, 200, 255], dtype=torch.uint8)
    images = values.repeat(1, 3, 7, 1)
    wanted = torch.tensor([110, 111, 127, 237, 128, 200, 255], dtype=torch.uint8)
    assert torch.equal(color.solarize_add(images), wanted.repeat(1, 3, 7, 1))


def test_weak_operations_without_rows_change_nothing() -> None:
    images = floats()
    count = len(images)
    none, ones = np.zeros(count, bool), np.ones(count)
    order = np.tile(np.arange(4), (count, 1))
    assert torch.equal(color.jitter(images, np.full((count, 4), 0.5), order, none), images)
    assert torch.equal(color.grayscale(images, none), images)
    assert torch.equal(color.blur(images, ones, none), images)
    assert torch.equal(color.solarize_half(images, none), images)


def test_normalize_equals_torchvision() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = floats()
    expected = torchvision.normalize(images, list(mean), list(std))
    close(color.normalize(images, mean, std), expected)


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("op", LOOK_UPS)
def test_look_up_operations_equal_pillow_exactly(op: str, size: int) -> None:
    images = pictures(size)
    for amount in {"Solarize": (0, 1, 26, 128, 255, 256), "Posterize": range(1, 9)}.get(op, (0,)):
        amounts = torch.full((len(images),), float(amount), dtype=torch.float64)
        ours = {
            "AutoContrast": lambda: color.auto_contrast(images),
            "Equalize": lambda: color.equalize(images),
            "Invert": lambda: color.invert(images),
            "Solarize": lambda values=amounts: color.solarize(images, values),
            "SolarizeAdd": lambda: color.solarize_add(images),
            "Posterize": lambda values=amounts: color.posterize(images, values),
        }[op]()
        theirs = [to_tensor(operate(to_pillow(image), op, amount)) for image in images]
        assert torch.equal(ours, torch.stack(theirs))


@pytest.mark.parametrize("pool", ["paper", "randaugment"])
@pytest.mark.parametrize("op", ENHANCE)
def test_enhance_operations_equal_pillow(op: str, pool: str) -> None:
    within, worst, equal = parity(op, pool, 1_000, 32)
    assert within >= 0.999 and worst >= 0.99
    assert equal == 1


@pytest.mark.parametrize("op", ENHANCE)
def test_enhance_operations_equal_pillow_at_the_ends(op: str) -> None:
    images = pictures(48)
    for factor in (0.0, 0.05, 0.5, 0.95, 1.0, 1.001, 1.5, 1.9, 3.0):
        ours = ENHANCE[op](images, torch.full((len(images),), factor, dtype=torch.float64))
        theirs = [to_tensor(operate(to_pillow(image), op, factor)) for image in images]
        assert torch.equal(ours, torch.stack(theirs))


def test_identities() -> None:
    images = pictures(32)
    ones = torch.ones(len(images), dtype=torch.float64)
    for enhance in ENHANCE.values():
        assert torch.equal(enhance(images, ones), images)
    assert torch.equal(color.solarize(images, 256 * ones), images)
    assert torch.equal(color.posterize(images, 8 * ones), images)

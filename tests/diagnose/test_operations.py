"""Strong operations: what each does to pictures, and how an encoder reacts to it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clsa.diagnose import operations
from clsa.diagnose.operations import (
    FALLING,
    LEVELS,
    OPERATIONS,
    SWITCHES,
    amount_of,
    clean_crops,
    distort,
    levels_of,
    measure,
)
from clsa.evaluate.features.extract import centre_views, frozen
from clsa.options.run import DataOptions, ViewOptions
from clsa.pictures.opening import open_source
from clsa.views import color, transform
from tests.support.pictures import clipart_folder, photograph

CPU = torch.device("cpu")
INDEX = np.arange(6)


@pytest.fixture(scope="module")
def images() -> Tensor:
    shots = np.stack([photograph(seed, 16, 16) for seed in range(6)])
    return torch.from_numpy(shots).permute(0, 3, 1, 2).contiguous()


class Pixels(nn.Module):
    """An encoder that keeps every pixel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Mean(nn.Module):
    """An encoder that keeps only the mean of each colour, and so sees no shape."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_the_papers_fourteen() -> None:
    assert len(OPERATIONS) == 14 and set(SWITCHES) | set(FALLING) < set(OPERATIONS)
    assert all(levels_of(name) == (0,) for name in SWITCHES)
    assert levels_of("Rotate") == LEVELS and levels_of("Color") == LEVELS[::-1]


@pytest.mark.parametrize(
    ("operation", "level", "expected"),
    [
        ("ShearX", 9, 0.27), ("TranslateY", 9, 8), ("TranslateX", 1, 0), ("Rotate", 5, 15),
        ("Solarize", 1, 231), ("Solarize", 9, 26), ("Posterize", 1, 4), ("Posterize", 9, 7),
        ("Contrast", 9, 0.86), ("Brightness", 1, 0.14),
    ],
)  # fmt: skip
def test_levels_are_the_official_codes(operation: str, level: int, expected: float) -> None:
    assert amount_of(operation, level, 32) == pytest.approx(expected)


def test_one_operation_is_applied_to_every_picture(images: Tensor) -> None:
    n = len(images)
    assert torch.equal(distort(images, "Invert", 0, INDEX, 0), 255 - images)
    assert torch.equal(distort(images, "Equalize", 0, INDEX, 0), color.equalize(images))
    solarized = color.solarize(images, torch.full((n,), 128.0, dtype=torch.float64))
    assert torch.equal(distort(images, "Solarize", 5, INDEX, 0), solarized)
    dark = color.brightness(images, torch.full((n,), 0.14, dtype=torch.float64))
    assert torch.equal(distort(images, "Brightness", 1, INDEX, 0), dark)
    assert torch.equal(distort(images, "TranslateX", 1, INDEX, 0), images)  # 0 pixels of 16


def test_sides_are_drawn_by_picture_and_seed(images: Tensor) -> None:
    same = images[:1].repeat(6, 1, 1, 1)
    shifted = distort(same, "TranslateX", 9, INDEX, 0)
    left, right = same[0].roll(-4, 2), same[0].roll(4, 2)
    left[:, :, -4:], right[:, :, :4] = 0, 0
    sides = [torch.equal(each, left) for each in shifted]
    assert all(torch.equal(each, left) or torch.equal(each, right) for each in shifted)
    assert 0 < sum(sides) < 6
    few = distort(same[:2], "TranslateX", 9, INDEX[3:5], 0)
    assert torch.equal(few, shifted[3:5])  # it does not depend on the rest of the batch
    others = [distort(same, "TranslateX", 9, INDEX, seed) for seed in range(1, 5)]
    assert any(not torch.equal(shifted, other) for other in others)


def test_unknown_operations_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="operation Blur"):
        distort(images, "Blur", 1, INDEX, 0)


def test_what_changes_nothing_costs_nothing(images: Tensor) -> None:
    found = measure(Pixels(), images, INDEX, 0.2, 0)
    still = [each for each in found if each.operation == "TranslateX" and each.level == 1]
    assert [(each.retrieved, each.divergence) for each in still] == [(100, 0)]
    assert still[0].cosine == pytest.approx(1, rel=1e-12)
    assert [each.operation for each in found if each.strength == 0] == list(OPERATIONS)
    assert len(found) == 3 + 11 * len(LEVELS)
    assert all(0 <= each.retrieved <= 100 and each.divergence >= 0 for each in found)


def test_what_an_encoder_does_not_see_does_not_disturb_it(images: Tensor) -> None:
    """Means of colours survive a smoothing, not an inversion."""
    found = {
        (each.operation, each.strength): each for each in measure(Mean(), images, INDEX, 0.2, 0)
    }
    assert found["Sharpness", 4].retrieved == 100 and found["Sharpness", 4].cosine > 0.999
    assert found["Invert", 0].retrieved < 100 and found["Invert", 0].cosine < 0.5
    assert found["Invert", 0].divergence > 100 * found["Sharpness", 4].divergence


def test_stronger_levels_change_pixels_more(images: Tensor) -> None:
    found = measure(Pixels(), images, INDEX, 0.2, 0)
    for name in ("Posterize", "Contrast", "Color", "Sharpness", "Brightness", "Rotate"):
        cosines = [each.cosine for each in found if each.operation == name]
        assert cosines[0] == max(cosines) and cosines[-1] == min(cosines), name


def test_magnitudes_are_written_with_their_units(images: Tensor) -> None:
    texts = {each.operation: each.text() for each in measure(Mean(), images, INDEX, 0.2, 0)}
    assert texts["Rotate"] == "±27°" and texts["Invert"] == "" and texts["Posterize"] == "4 bits"
    assert texts["Color"] == "0.14" and texts["Solarize"] == "≥26" and texts["ShearX"] == "±0.27"


def test_measuring_repeats_and_moves_nothing(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    with frozen(network):
        first = measure(network, images, INDEX, 0.2, 0)
        assert measure(network, images, INDEX, 0.2, 0, batch_size=6) == first
    assert network.training


def test_crops_are_those_of_evaluation(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clipart_folder(tmp_path, classes=1, each=4)
    (folder / next(folder.iterdir()).name / "0-broken.jpg").write_bytes(b"nothing")
    source = open_source(str(folder), "train", DataOptions(data=str(folder)))
    options = ViewOptions(size=16)
    kept, crops = clean_crops(source, np.arange(5), options, CPU)
    assert kept.tolist() == [1, 2, 3, 4] and crops.shape == (4, 3, 16, 16)
    assert crops.dtype == torch.uint8
    shown = color.normalize(crops / 255, transform.MEAN, transform.STD)
    ((_, exact),) = centre_views(source, np.arange(5), options, CPU)
    assert (shown - exact).abs().max() <= 0.51 / 255 / min(transform.STD)
    assert operations.clean_crops(source, np.array([0]), options, CPU)[1].shape == (0, 3, 16, 16)

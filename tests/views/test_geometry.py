import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from clsa.views import geometry, rng
from tests.support.reference_pillow import parity, pictures, to_pillow, to_tensor

RATIO = (3 / 4, 4 / 3)


def one_box(u: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> list[int]:
    """RandomResizedCrop.get_params for one picture, with given uniforms."""
    for area, ratio in zip(u[:10], u[10:20], strict=True):
        target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        aspect = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(w / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(h * RATIO[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


def random_boxes(count: int, height: int, width: int, scale: tuple[float, float]) -> np.ndarray:
    slots = np.arange(geometry.NUM_CROP_SLOTS)
    u = rng.uniforms(0, 0, np.arange(count), 0, slots)
    return geometry.crop_boxes(u, np.full(count, height), np.full(count, width), scale)


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.086, 0.429), (0.9, 1.0)])
def test_boxes_follow_the_rule_of_random_resized_crop(scale: tuple[float, float]) -> None:
    draw = np.random.default_rng(0)
    heights, widths = draw.integers(1, 500, (2, 400))
    heights[:50] //= 20  # very wide pictures: often no try fits
    heights = np.maximum(heights, 1)
    u = rng.uniforms(3, 1, np.arange(400), 2, np.arange(geometry.NUM_CROP_SLOTS))
    boxes = geometry.crop_boxes(u, heights, widths, scale)
    expected = [one_box(u[i], int(heights[i]), int(widths[i]), scale) for i in range(len(heights))]
    assert boxes.dtype == np.int64
    assert boxes.tolist() == expected
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= heights).all()
    assert (boxes[:, 1] + boxes[:, 3] <= widths).all()


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(100, 1000, [0, 433, 100, 133]), (1000, 100, [433, 0, 133, 100]), (1, 1, [0, 0, 1, 1])],
)
def test_where_no_try_fits_the_centre_is_taken(height: int, width: int, box: list[int]) -> None:
    assert random_boxes(20, height, width, (0.95, 1.0)).tolist() == [box] * 20


def test_crop_areas_have_the_requested_mean() -> None:
    areas = random_boxes(10_000, 300, 300, (0.1, 0.5))[:, 2:].prod(1) / 300**2
    assert abs(areas.mean() - 0.3) < 4 * 0.4 / math.sqrt(12 * 10_000)
    assert areas.min() < 0.11 and areas.max() > 0.49


def test_centre_boxes() -> None:
    boxes = geometry.centre_boxes(np.array([256, 100, 3, 1]), np.array([256, 300, 4, 9]), 0.875)
    assert boxes.tolist() == [[16, 16, 224, 224], [6, 106, 88, 88], [0, 0, 3, 3], [0, 4, 1, 1]]
    assert geometry.centre_boxes(np.array([5]), np.array([5]), 0.01).tolist() == [[2, 2, 1, 1]]


@pytest.mark.parametrize("size", [16, 32, 75])
def test_crop_equals_antialiased_interpolation(size: int) -> None:
    images = pictures(64)[:, :, :50]
    boxes = random_boxes(len(images), 50, 64, (0.05, 1.0))
    boxes[:3] = [[0, 0, 50, 64], [49, 63, 1, 1], [10, 0, size % 50, size % 64]]
    flip = np.arange(len(images)) % 3 == 1
    cut = geometry.crop(images, boxes, size, flip)
    assert cut.shape == (len(images), 3, size, size) and cut.dtype == torch.float32
    for image, box, mirrored, ours in zip(images, boxes, flip, cut, strict=True):
        top, left, height, width = box
        part = image[None, :, top : top + height, left : left + width].float()
        kind = {"mode": "bilinear", "antialias": True, "align_corners": False}
        expected = functional.interpolate(part, (size, size), **kind)[0]
        expected = expected.flip(2) if mirrored else expected
        torch.testing.assert_close(ours / 255, expected / 255, rtol=0, atol=1e-5)
    torch.testing.assert_close(geometry.crop(images.float(), boxes, size, flip), cut)


@pytest.mark.parametrize("size", [20, 96])
def test_workers_cut_the_same_crops_as_the_device(size: int) -> None:
    images = pictures(80)
    boxes = random_boxes(len(images), 80, 80, (0.2, 1.0))
    boxes[0] = [0, 0, 80, 80]
    flip = np.arange(len(images)) % 2 == 0
    cut = geometry.crop(images, boxes, size, flip)
    for image, box, mirrored, expected in zip(images, boxes, flip, cut, strict=True):
        array = image.permute(1, 2, 0).contiguous().numpy()
        array.flags.writeable = False
        one = geometry.crop_one(array, box, size, bool(mirrored), (80, 80))
        assert one.dtype == torch.uint8 and one.permute(1, 2, 0).is_contiguous()
        assert (one.float() - expected).abs().max() <= 1 + 1e-3  # rounding of float32


def test_a_crop_keeps_twice_the_pixels_of_its_view() -> None:
    box = np.array([3, 5, 800, 640])
    for size, expected in ((32, 8), (40, 8), (41, 4), (80, 4), (81, 2), (160, 2), (161, 1)):
        assert geometry.reduction_for([box], [size]) == expected
    assert geometry.reduction_for([box, np.array([0, 0, 70, 900])], [32, 32]) == 1


def test_boxes_are_mapped_to_the_pixels_of_a_smaller_picture() -> None:
    image = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    for box, rows, columns in (
        ([0, 0, 24, 40], (0, 12), (0, 10)),
        ([2, 4, 4, 8], (1, 3), (1, 3)),
        ([23, 39, 1, 1], (11, 12), (9, 10)),
        ([11, 17, 1, 1], (6, 7), (4, 5)),
    ):
        small = geometry.crop_one(image, np.array(box), 8, False, (24, 40))
        part = np.ascontiguousarray(image[slice(*rows), slice(*columns)])
        whole = np.array([0, 0, *part.shape[:2]])
        assert torch.equal(small, geometry.crop_one(part, whole, 8, False, part.shape[:2])), box


@pytest.mark.parametrize("pool", ["paper", "official", "randaugment"])
@pytest.mark.parametrize("op", geometry.AFFINE_OPS)
def test_affine_operations_equal_pillow(op: str, pool: str) -> None:
    close, worst, equal = parity(op, pool, 1_000, 32)
    assert close >= 0.999 and worst >= 0.99
    assert equal == 1


def test_rotations_by_any_angle_equal_pillow() -> None:
    images = pictures(45)
    angles = np.random.default_rng(0).uniform(-180, 180, len(images))
    coefficients = torch.from_numpy(geometry.affine_coefficients("Rotate", angles, 45))
    turned = geometry.affine_nearest(images, coefficients)
    for image, angle, ours in zip(images, angles, turned, strict=True):
        assert torch.equal(ours, to_tensor(to_pillow(image).rotate(float(angle))))


@pytest.mark.parametrize("op", geometry.AFFINE_OPS)
def test_a_magnitude_of_zero_is_the_identity(op: str) -> None:
    images = pictures(32)
    coefficients = geometry.affine_coefficients(op, np.zeros(len(images)), 32)
    assert torch.equal(geometry.affine_nearest(images, torch.from_numpy(coefficients)), images)


def test_outside_is_black() -> None:
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    coefficients = torch.from_numpy(geometry.affine_coefficients("TranslateX", np.array([3.0]), 8))
    moved = geometry.affine_nearest(white, coefficients)
    assert (moved[..., :5] == 255).all() and (moved[..., 5:] == 0).all()

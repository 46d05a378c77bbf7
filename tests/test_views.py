from typing import Literal

import numpy as np
import pytest
import torch
from reference_pillow import LOOK_UPS, operate, parity, pictures, to_pillow, to_tensor
from torch import Tensor
from torchvision.transforms import functional as torchvision

from clsa import geometry, views
from clsa.options import MethodOptions, StrongViews, ViewOptions, WeakViews

Pool = Literal["paper", "official"]
NUM_VIEWS = 10_000


def strong_options(pool: Pool = "official", size: int = 32, rounds: int = 5) -> ViewOptions:
    strong = StrongViews(sizes=(size,), pool=pool, rounds=rounds)
    return ViewOptions(size=size, weak=WeakViews(sizes=(size,)), strong=strong)


def strong_params(pool: Pool, count: int, rounds: int = 5) -> views.Params:
    options = strong_options(pool, rounds=rounds)
    spec = views.view_specs(options, MethodOptions())[-1]
    return views.sample(options, spec, seed=1, epoch=2, index=np.arange(count))


def test_specs_of_the_official_multi_recipe() -> None:
    sizes = (224, 192, 160, 128, 96)
    options = ViewOptions(weak=WeakViews(sizes=sizes), strong=StrongViews(sizes=sizes))
    specs = views.view_specs(options, MethodOptions())
    assert [spec.name for spec in specs] == [
        "key", *(f"weak{i}" for i in range(5)), *(f"strong{i}" for i in range(5)),
    ]  # fmt: skip
    assert [spec.size for spec in specs] == [224, *sizes, *sizes]
    assert [spec.view for spec in specs] == list(range(11))
    assert [spec.strong for spec in specs] == [False] * 6 + [True] * 5
    official = [(0.2, 1), (0.172, 0.86), (0.143, 0.715), (0.114, 0.571), (0.086, 0.429)]
    for spec, scale in zip(specs[1:], official * 2, strict=True):
        assert spec.scale == pytest.approx(scale, abs=4e-3)  # theirs is rounded
    assert specs[0].scale == (0.2, 1)


def test_scales_stay_within_the_picture_and_strong_queries_and_keys() -> None:
    options = ViewOptions(size=96, weak=WeakViews(sizes=(128,)), strong=StrongViews(sizes=()))
    method = MethodOptions(name="moco", strong_query=True, strong_key=True)
    key, query = views.view_specs(options, method)
    assert query.scale == pytest.approx((0.2 * 128 / 96, 1)) and key.strong and query.strong


@pytest.mark.parametrize("pool", ["paper", "official"])
def test_pools_hold_fourteen_operations(pool: Pool) -> None:
    assert len(set(views.POOLS[pool])) == len(views.POOLS[pool]) == 14
    assert ("Invert" in views.POOLS[pool]) == (pool == "paper")
    assert ("Identity" in views.POOLS[pool]) == (pool == "official")


def test_official_magnitudes_take_the_nine_levels() -> None:
    magnitude = (np.arange(9000) + 0.5) / 9000
    tenths = [round(0.1 * v, 1) for v in range(1, 10)]
    factors = [0.14, 0.23, 0.32, 0.41, 0.5, 0.59, 0.68, 0.77, 0.86]
    expected = {
        "ShearX": [0.3 * t for t in tenths],
        "ShearY": [0.3 * t for t in tenths],
        "TranslateX": [int(0.03 * v * 96) for v in range(1, 10)],
        "TranslateY": [int(0.03 * v * 96) for v in range(1, 10)],
        "Rotate": [3, 6, 9, 12, 15, 18, 21, 24, 27],
        "Solarize": [231, 205, 180, 154, 128, 103, 77, 52, 26],
        "Posterize": [4, 4, 5, 5, 6, 6, 6, 7, 7],
        **{op: factors for op in ("Contrast", "Color", "Brightness", "Sharpness")},
    }
    for op, levels in expected.items():
        for sign in (1.0, -1.0):
            signs = np.full_like(magnitude, sign)
            amounts = views.amount(op, "official", magnitude, signs, 96)
            signed = sign if op in geometry.AFFINE_OPS else 1
            each = np.repeat(np.array(levels) * signed, 1000)  # every level equally often
            np.testing.assert_allclose(amounts, each, rtol=1e-12)


def test_paper_magnitudes_cover_the_ranges_of_table_1() -> None:
    magnitude = np.arange(1 << 16) / (1 << 16)
    ranges = {
        "ShearX": (0, 0.3), "TranslateY": (0, 28), "Rotate": (0, 30), "Solarize": (1, 256),
        "Posterize": (4, 8), "Contrast": (0.05, 0.95), "Sharpness": (0.05, 0.95),
    }  # fmt: skip
    for op, (low, high) in ranges.items():
        amounts = views.amount(op, "paper", magnitude, np.ones_like(magnitude), 96)
        assert (amounts.min(), amounts.max()) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize("pool", ["paper", "official"])
def test_how_often_operations_are_applied(pool: Pool) -> None:
    params = strong_params(pool, NUM_VIEWS)
    none, error = (~params.applied).all(1).mean(), np.sqrt(1 / 32 * 31 / 32 / NUM_VIEWS)
    assert abs(none - 1 / 32) < 3 * error
    assert abs(params.applied.sum(1).mean() - 2.5) < 3 * np.sqrt(5 / 4 / NUM_VIEWS)
    counts = np.bincount(params.ops.ravel(), minlength=14)
    mean = 5 * NUM_VIEWS / 14
    assert ((counts - mean) ** 2 / mean).sum() < 13 + 4 * np.sqrt(2 * 13)
    assert abs(params.sign.mean()) < 3 / np.sqrt(5 * NUM_VIEWS)
    if pool == "official":
        identity = params.ops == views.POOLS[pool].index("Identity")
        unchanged, expected = (~params.applied | identity).all(1).mean(), (15 / 28) ** 5
        assert expected == pytest.approx(0.0441, abs=5e-5)
        assert abs(unchanged - expected) < 3 * np.sqrt(expected * (1 - expected) / NUM_VIEWS)


def test_the_weak_recipe_is_drawn_as_moco_v2_draws_it() -> None:
    options = ViewOptions()
    spec = views.view_specs(options, MethodOptions())[0]
    params = views.sample(options, spec, 0, 0, np.arange(NUM_VIEWS))
    for drawn, share in [(params.jitter, 0.8), (params.gray, 0.2), (params.blur, 0.5)]:
        assert abs(drawn.mean() - share) < 3 * np.sqrt(share * (1 - share) / NUM_VIEWS)
    low, high = np.array([0.6, 0.6, 0.6, -0.1]), np.array([1.4, 1.4, 1.4, 0.1])
    np.testing.assert_allclose(params.factors.min(0), low, atol=1e-3)
    np.testing.assert_allclose(params.factors.max(0), high, atol=1e-3)
    assert params.sigma.min() == pytest.approx(0.1, abs=1e-3)
    assert params.sigma.max() == pytest.approx(2, abs=1e-3)
    orders, counts = np.unique(params.order, axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > NUM_VIEWS / 24 * 0.8
    assert params.ops.shape == (NUM_VIEWS, 0)


def test_draws_are_independent_of_one_another() -> None:
    params = strong_params("official", NUM_VIEWS)
    columns = [params.jitter, params.gray, params.blur, params.sigma, *params.factors.T]
    columns += [*params.ops.T, *params.applied.T, *params.magnitude.T, *params.sign.T]
    correlation = np.corrcoef(np.array(columns, dtype=np.float64)) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / np.sqrt(NUM_VIEWS)


def test_draws_do_not_depend_on_the_batch() -> None:
    options, index = strong_options(), np.array([5, 900, 3, 12])
    sizes = np.array([64, 100, 50, 70])
    for spec in views.view_specs(options, MethodOptions()):
        together = views.sample(options, spec, 3, 4, index)
        boxes, flips = views.crop_params(spec, 3, 4, index, sizes, sizes + 9, 0.5)
        for i in range(4):
            one = slice(i, i + 1)
            alone = views.sample(options, spec, 3, 4, index[one])
            for a, b in zip(alone, together, strict=True):
                assert np.array_equal(a[0], b[i])
            box, flip = views.crop_params(spec, 3, 4, index[one], sizes[one], sizes[one] + 9, 0.5)
            assert np.array_equal(box[0], boxes[i]) and flip[0] == flips[i]


def test_views_of_one_picture_are_drawn_apart() -> None:
    index, sizes = np.arange(2000), np.full(2000, 300)
    drawn = [
        views.crop_params(spec, 0, 0, index, sizes, sizes, 0.5)
        for spec in views.view_specs(strong_options(), MethodOptions())
    ]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        tops = np.corrcoef(drawn[a][0][:, 0], drawn[b][0][:, 0])[0, 1]
        flips = np.corrcoef(drawn[a][1], drawn[b][1])[0, 1]
        assert abs(tops) < 4 / np.sqrt(2000) and abs(flips) < 4 / np.sqrt(2000)
    assert abs(drawn[0][1].mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)


def strong_reference(image: Tensor, params: views.Params, row: int, pool: Pool) -> Tensor:
    picture = to_pillow(image)
    for k in np.flatnonzero(params.applied[row]):
        op = views.POOLS[pool][params.ops[row, k]]
        one = params.magnitude[row, k : k + 1], params.sign[row, k : k + 1]
        picture = operate(picture, op, float(views.amount(op, pool, *one, image.shape[-1])[0]))
    return to_tensor(picture)


@pytest.mark.parametrize("pool", ["paper", "official"])
def test_rounds_equal_pillows_operations_one_after_another(pool: Pool) -> None:
    images = pictures(32)
    before, params = images.clone(), strong_params(pool, len(images), rounds=7)
    strong = views.apply_strong(images, params, pool)
    assert torch.equal(images, before)
    for i, image in enumerate(images):
        assert torch.equal(strong[i], strong_reference(image, params, i, pool))


@pytest.mark.parametrize("op", LOOK_UPS)
def test_look_ups_with_drawn_magnitudes_equal_pillow(op: str) -> None:
    for pool in ("paper", "official"):
        if op in views.POOLS[pool]:
            assert parity(op, pool, 1_000, 32).equal == 1


def weak_reference(crop: Tensor, params: views.Params, row: int) -> Tensor:
    """The weak recipe of one crop in [0, 1], by torchvision."""
    jitter = (
        torchvision.adjust_brightness, torchvision.adjust_contrast,
        torchvision.adjust_saturation, torchvision.adjust_hue,
    )  # fmt: skip
    for op in params.order[row] if params.jitter[row] else ():
        crop = jitter[op](crop, float(params.factors[row, op]))
    if params.gray[row]:
        crop = torchvision.rgb_to_grayscale(crop, 3)
    if params.blur[row]:
        crop = torchvision.gaussian_blur(crop, [13, 13], [float(params.sigma[row])] * 2)
    return crop


@pytest.mark.parametrize("as_float", [True, False])
def test_weak_views_equal_torchvision(as_float: bool) -> None:
    crops, options = pictures(40), ViewOptions()
    spec = views.view_specs(options, MethodOptions())[1]
    params = views.sample(options, spec, 0, 0, np.arange(len(crops)))
    ours = views.pixels(crops.float() if as_float else crops, params, options, spec)
    for i, crop in enumerate(crops):
        expected = weak_reference(crop.float() / 255, params, i)
        expected = torchvision.normalize(expected, list(views.MEAN), list(views.STD))
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=1e-5 / min(views.STD))


def test_a_whole_weak_view_equals_torchvision_from_the_picture() -> None:
    images, options = pictures(64), strong_options()
    spec, index = views.view_specs(options, MethodOptions())[1], np.arange(len(images))
    sizes = np.full(len(images), 64)
    boxes, flip = views.crop_params(spec, 0, 0, index, sizes, sizes, 0.5)
    params = views.sample(options, spec, 0, 0, index)
    ours = views.pixels(geometry.crop(images, boxes, 32, flip), params, options, spec)
    for i, image in enumerate(images.float() / 255):
        top, left, height, width = boxes[i].tolist()
        expected = torchvision.resized_crop(image, top, left, height, width, [32, 32])
        expected = weak_reference(expected.clamp(0, 1), params, i)
        expected = torchvision.hflip(expected) if flip[i] else expected
        expected = torchvision.normalize(expected, list(views.MEAN), list(views.STD))
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=2e-5 / min(views.STD))


def test_strong_views_are_weak_views_rounded_and_operated_on() -> None:
    crops, options = pictures(32), strong_options()
    spec = views.view_specs(options, MethodOptions())[-1]
    params = views.sample(options, spec, 0, 0, np.arange(len(crops)))
    unit = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    weak = views.pixels(crops, params, options, spec._replace(strong=False), **unit)
    strong = views.pixels(crops, params, options, spec, **unit)
    for i, crop in enumerate(weak):
        rounded = (crop * 255).round().to(torch.uint8)
        expected = strong_reference(rounded, params, i, "official")
        assert torch.equal((strong[i] * 255).round().to(torch.uint8), expected)


def test_the_strong_view_of_evaluation_is_the_same_for_all_recipes() -> None:
    recipes = [
        ViewOptions(size=32, scale=(0.3, 1)),
        ViewOptions(
            size=32,
            scale=(0.3, 1),
            weak=WeakViews(sizes=(32, 24), jitter_probability=0, grayscale=1, blur=1),
            strong=StrongViews(sizes=(16,), pool="paper", rounds=2, probability=1),
        ),
    ]
    index, drawn = np.arange(500), []
    for options in recipes:
        spec, fixed = views.strong_eval_spec(options), views.strong_eval_options(options)
        assert spec.size == 32 and spec.scale == (0.3, 1) and fixed.strong.pool == "official"
        drawn.append(views.sample(fixed, spec, 0, 0, index))
    for a, b in zip(*drawn, strict=True):
        assert np.array_equal(a, b)
    assert not drawn[0].blur.any() and drawn[0].ops.shape == (500, 5)
    assert 0.7 < drawn[0].jitter.mean() < 0.9 and 0.4 < drawn[0].applied.mean() < 0.6


def test_contact_sheet_shows_originals_and_normalised_views() -> None:
    original = pictures(20)[0]
    shift, scale = (torch.tensor(c)[:, None, None] for c in (views.MEAN, views.STD))
    row = [original, (original / 255 - shift) / scale]
    sheet = views.contact_sheet([row, row], ["picture", "weak0"], side=20)
    assert sheet.size == (2 * 24 + 4, 2 * 24 + 16)
    shown = to_tensor(sheet)
    for top in (16, 40):
        for left in (4, 28):
            assert torch.equal(shown[:, top : top + 20, left : left + 20], original)

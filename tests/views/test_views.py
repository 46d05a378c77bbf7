from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as torchvision

from clsa.options.run import LocalViews, Operations, StrongOptions, ViewOptions, WeakViews
from clsa.system.errors import Exit
from clsa.views import geometry, transform
from clsa.views.contact_sheet import contact_sheet
from clsa.views.specs import STRONG_EVAL_VIEW, ViewSpec, strong_eval_spec, strong_specs, weak_specs
from tests.support.reference_pillow import LOOK_UPS, operate, parity, pictures, to_pillow, to_tensor
from tests.support.refusals import refusal

Pool = Literal["paper", "official", "randaugment"]
NUM_VIEWS = 10_000
UNIT: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def clsa_specs(
    pool: Pool = "official", size: int = 32, rounds: int = 5, **weak: Any
) -> list[ViewSpec]:
    """Specs of a key, a weak query and a strong query."""
    options = ViewOptions(size=size, weak=WeakViews(sizes=(size,), **weak))
    strong = StrongOptions(sizes=(size,), pool=pool, rounds=rounds)
    return weak_specs(options, keyed=True) + strong_specs(options, strong, 2)


def strong_params(pool: Pool, count: int, rounds: int = 5) -> transform.Params:
    spec = clsa_specs(pool, rounds=rounds)[-1]
    return transform.sample(spec, seed=1, epoch=2, index=np.arange(count))


def test_specs_of_the_official_multi_recipe() -> None:
    sizes = (224, 192, 160, 128, 96)
    options, strong = ViewOptions(weak=WeakViews(sizes=sizes)), StrongOptions(sizes=sizes)
    specs = weak_specs(options, keyed=True) + strong_specs(options, strong, 6)
    assert [spec.name for spec in specs] == [
        "key", *(f"weak{i}" for i in range(5)), *(f"strong{i}" for i in range(5)),
    ]  # fmt: skip
    assert [spec.size for spec in specs] == [224, *sizes, *sizes]
    assert [spec.view for spec in specs] == list(range(11))
    assert [spec.ops.rounds for spec in specs] == [0] * 6 + [5] * 5
    assert all(spec.ops == strong for spec in specs[6:])
    assert {(spec.blur, spec.solarize) for spec in specs} == {(0.5, 0.0)}
    official = [(0.2, 1), (0.172, 0.86), (0.143, 0.715), (0.114, 0.571), (0.086, 0.429)]
    for spec, scale in zip(specs[1:], official * 2, strict=True):
        assert spec.scale == pytest.approx(scale, abs=4e-3)  # the official code rounds
    assert specs[0].scale == (0.2, 1)


def test_scales_stay_within_the_picture() -> None:
    key, query = weak_specs(ViewOptions(size=96, weak=WeakViews(sizes=(128,))), keyed=True)
    assert key.scale == (0.2, 1) and query.scale == pytest.approx((0.2 * 128 / 96, 1))


def test_local_views_follow_the_weak_ones_with_a_scale_of_their_own() -> None:
    local = LocalViews(sizes=(96, 64), scale=(0.05, 0.14))
    options = ViewOptions(weak=WeakViews(sizes=(224,), blur=(1.0, 0.1, 0.5)), local=local)
    specs = weak_specs(options)
    assert [spec.name for spec in specs] == ["weak0", "weak1", "local0", "local1"]
    assert [spec.size for spec in specs] == [224, 224, 96, 64]
    assert [spec.scale for spec in specs] == [(0.2, 1.0)] * 2 + [(0.05, 0.14)] * 2
    assert [spec.view for spec in specs] == [0, 1, 2, 3]
    assert [spec.blur for spec in specs] == [1.0, 0.1, 0.5, 0.5]
    names = [spec.name for spec in weak_specs(options, keyed=True)]
    assert names == ["key", "weak0", "local0", "local1"]
    index, sides = np.arange(2000), np.full(2000, 400)
    for spec in specs[2:]:
        areas = transform.crop_params(spec, 0, 0, index, sides, sides)[0][:, 2:].prod(1) / 400**2
        assert areas.min() > 0.049 and areas.max() < 0.141
        assert abs(areas.mean() - 0.095) < 4 * 0.09 / np.sqrt(12 * 2000)


def test_one_view_alone_has_no_other_weak_ones() -> None:
    (spec,) = weak_specs(ViewOptions(weak=WeakViews(sizes=())))
    assert (spec.name, spec.size, spec.view, spec.scale) == ("weak0", 224, 0, (0.2, 1.0))


@pytest.mark.parametrize(
    ("sizes", "local", "least", "most", "taken"),
    [
        (0, 0, 1, 1, True), (1, 0, 1, 1, False), (0, 1, 1, 1, False),
        (1, 0, 2, 2, True), (0, 0, 2, 2, False), (2, 0, 2, 2, False), (1, 1, 2, 2, False),
        (1, 4, 2, None, True), (4, 0, 2, None, True), (0, 4, 2, None, False),
    ],
)  # fmt: skip
def test_methods_say_how_many_views_they_take(
    sizes: int, local: int, least: int, most: int | None, taken: bool
) -> None:
    """Local views do not make up for missing large ones, but count towards the maximum."""
    weak, small = WeakViews(sizes=(32,) * sizes), LocalViews(sizes=(16,) * local)
    options = ViewOptions(size=32, weak=weak, local=small)
    if taken:
        assert len(weak_specs(options, least=least, most=most)) == 1 + sizes + local
        return
    text, code = refusal(lambda: weak_specs(options, least=least, most=most))
    wanted = f"takes {least}" if most else f"takes at least {least}"
    assert code == Exit.USAGE and text.startswith("views.weak.sizes - ") and wanted in text
    assert f"there are {1 + sizes} (views.size is one) and {local} local ones" in text


@pytest.mark.parametrize(
    ("given", "blurs"),
    [(0.3, [0.3] * 4), (1, [1.0] * 4), ((1.0, 0.1), [1.0, 0.1, 0.1, 0.1]), ([0.0], [0.0] * 4)],
)
def test_blur_and_solarize_are_per_view_and_later_views_take_the_last_number(
    given: Any, blurs: list[float]
) -> None:
    weak = WeakViews(sizes=(224, 192), blur=given, solarize=given)
    options = ViewOptions(weak=weak)
    specs = weak_specs(options) + strong_specs(options, StrongOptions(), 3)
    assert [spec.blur for spec in specs] == [spec.solarize for spec in specs] == blurs


def test_byols_two_views_are_blurred_and_solarized_as_often_as_they_say() -> None:
    options = ViewOptions(weak=WeakViews(blur=(1.0, 0.1), solarize=(0.0, 0.2)))
    for spec, blur, solarize in zip(weak_specs(options), (1, 0.1), (0, 0.2), strict=True):
        params = transform.sample(spec, 0, 0, np.arange(NUM_VIEWS))
        for drawn, share in ((params.blur, blur), (params.solarize, solarize)):
            assert abs(drawn.mean() - share) <= 3 * np.sqrt(share * (1 - share) / NUM_VIEWS)
    both = np.corrcoef(params.blur, params.solarize)[0, 1]  # of the second view
    assert abs(both) < 4 / np.sqrt(NUM_VIEWS)


def test_solarizing_and_more_rounds_leave_every_other_draw_as_it_was() -> None:
    plain = clsa_specs(rounds=3)[-1]
    more = clsa_specs(rounds=20, solarize=1.0)[-1]
    few, many = (transform.sample(spec, 0, 0, np.arange(200)) for spec in (plain, more))
    assert many.solarize.all() and not few.solarize.any() and many.ops.shape == (200, 20)
    for name, a, b in zip(few._fields, few, many, strict=True):
        same = a if a.ndim == 1 or a.shape[1] == 4 else b[:, :3]
        assert name == "solarize" or np.array_equal(a, b if same is a else same), name


@pytest.mark.parametrize(
    ("pool", "count", "own"),
    [
        ("paper", 14, {"Invert"}),
        ("official", 14, {"Identity"}),
        ("randaugment", 15, {"Invert", "SolarizeAdd"}),
    ],
)
def test_pools_hold_their_operations(pool: Pool, count: int, own: set[str]) -> None:
    assert len(set(transform.POOLS[pool])) == len(transform.POOLS[pool]) == count
    assert set(transform.POOLS[pool]) & {"Invert", "Identity", "SolarizeAdd"} == own


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
            amounts = transform.amount(op, "official", magnitude, signs, 96)
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
        amounts = transform.amount(op, "paper", magnitude, np.ones_like(magnitude), 96)
        assert (amounts.min(), amounts.max()) == pytest.approx((low, high), abs=1e-3)


def test_randaugment_takes_every_operation_at_full_strength() -> None:
    """RandAugment at magnitude 10 of 10 (Cubuk et al. 2020), like timm's `rand-m10` for InfoMin."""
    magnitude, sign = np.array([0.0, 0.3, 0.999]), np.array([1.0, -1.0, -1.0])
    signed = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 43, "TranslateY": 43, "Rotate": 30}
    plain = {"Solarize": 256, "Posterize": 4, "Contrast": 1.9, "Color": 1.9, "Brightness": 1.9,
             "Sharpness": 1.9}  # fmt: skip
    without = set(transform.POOLS["randaugment"]) - set(signed) - set(plain)
    assert without == {"AutoContrast", "Equalize", "Invert", "SolarizeAdd"}
    for op in transform.POOLS["randaugment"]:
        amounts = transform.amount(op, "randaugment", magnitude, sign, 96)
        wanted = signed[op] * sign if op in signed else np.full(3, plain.get(op, 0))
        np.testing.assert_allclose(amounts, wanted, rtol=1e-12)


@pytest.mark.parametrize("pool", ["paper", "official", "randaugment"])
def test_how_often_operations_are_applied(pool: Pool) -> None:
    params = strong_params(pool, NUM_VIEWS)
    none, error = (~params.applied).all(1).mean(), np.sqrt(1 / 32 * 31 / 32 / NUM_VIEWS)
    assert abs(none - 1 / 32) < 3 * error
    assert abs(params.applied.sum(1).mean() - 2.5) < 3 * np.sqrt(5 / 4 / NUM_VIEWS)
    kinds = len(transform.POOLS[pool])
    counts = np.bincount(params.ops.ravel(), minlength=kinds)
    mean = 5 * NUM_VIEWS / kinds
    assert len(counts) == kinds
    assert ((counts - mean) ** 2 / mean).sum() < kinds - 1 + 4 * np.sqrt(2 * (kinds - 1))
    assert abs(params.sign.mean()) < 3 / np.sqrt(5 * NUM_VIEWS)
    if pool == "official":
        identity = params.ops == transform.POOLS[pool].index("Identity")
        unchanged, expected = (~params.applied | identity).all(1).mean(), (15 / 28) ** 5
        assert expected == pytest.approx(0.0441, abs=5e-5)
        assert abs(unchanged - expected) < 3 * np.sqrt(expected * (1 - expected) / NUM_VIEWS)


def test_the_weak_recipe_is_drawn_as_moco_v2_draws_it() -> None:
    params = transform.sample(weak_specs(ViewOptions())[0], 0, 0, np.arange(NUM_VIEWS))
    for drawn, share in [(params.jitter, 0.8), (params.gray, 0.2), (params.blur, 0.5)]:
        assert abs(drawn.mean() - share) < 3 * np.sqrt(share * (1 - share) / NUM_VIEWS)
    low, high = np.array([0.6, 0.6, 0.6, -0.1]), np.array([1.4, 1.4, 1.4, 0.1])
    np.testing.assert_allclose(params.factors.min(0), low, atol=1e-3)
    np.testing.assert_allclose(params.factors.max(0), high, atol=1e-3)
    assert params.sigma.min() == pytest.approx(0.1, abs=1e-3)
    assert params.sigma.max() == pytest.approx(2, abs=1e-3)
    orders, counts = np.unique(params.order, axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > NUM_VIEWS / 24 * 0.8
    assert params.ops.shape == (NUM_VIEWS, 0) and not params.solarize.any()


def test_draws_are_independent_of_one_another() -> None:
    params = strong_params("official", NUM_VIEWS)
    columns = [params.jitter, params.gray, params.blur, params.sigma, *params.factors.T]
    columns += [*params.ops.T, *params.applied.T, *params.magnitude.T, *params.sign.T]
    correlation = np.corrcoef(np.array(columns, dtype=np.float64)) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / np.sqrt(NUM_VIEWS)


def test_draws_do_not_depend_on_the_batch() -> None:
    index, sizes = np.array([5, 900, 3, 12]), np.array([64, 100, 50, 70])
    for spec in clsa_specs(solarize=0.5):
        together = transform.sample(spec, 3, 4, index)
        boxes, flips = transform.crop_params(spec, 3, 4, index, sizes, sizes + 9)
        for i in range(4):
            one = slice(i, i + 1)
            alone = transform.sample(spec, 3, 4, index[one])
            for a, b in zip(alone, together, strict=True):
                assert np.array_equal(a[0], b[i])
            box, flip = transform.crop_params(spec, 3, 4, index[one], sizes[one], sizes[one] + 9)
            assert np.array_equal(box[0], boxes[i]) and flip[0] == flips[i]


def test_views_of_one_picture_are_drawn_apart() -> None:
    index, sizes = np.arange(2000), np.full(2000, 300)
    drawn = [transform.crop_params(spec, 0, 0, index, sizes, sizes) for spec in clsa_specs()]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        tops = np.corrcoef(drawn[a][0][:, 0], drawn[b][0][:, 0])[0, 1]
        flips = np.corrcoef(drawn[a][1], drawn[b][1])[0, 1]
        assert abs(tops) < 4 / np.sqrt(2000) and abs(flips) < 4 / np.sqrt(2000)
    for share in (0.0, 0.5, 1.0):
        spec = clsa_specs(flip=share)[0]
        flips = transform.crop_params(spec, 0, 0, index, sizes, sizes)[1]
        assert abs(flips.mean() - share) <= 4 * np.sqrt(share * (1 - share) / 2000)


def strong_reference(image: Tensor, params: transform.Params, row: int, pool: Pool) -> Tensor:
    picture = to_pillow(image)
    for k in np.flatnonzero(params.applied[row]):
        op = transform.POOLS[pool][params.ops[row, k]]
        one = params.magnitude[row, k : k + 1], params.sign[row, k : k + 1]
        picture = operate(picture, op, float(transform.amount(op, pool, *one, image.shape[-1])[0]))
    return to_tensor(picture)


@pytest.mark.parametrize("pool", ["paper", "official", "randaugment"])
def test_rounds_equal_pillows_operations_one_after_another(pool: Pool) -> None:
    images = pictures(32)
    before, params = images.clone(), strong_params(pool, len(images), rounds=7)
    strong = transform.apply_ops(images, params, pool)
    assert torch.equal(images, before)
    for i, image in enumerate(images):
        assert torch.equal(strong[i], strong_reference(image, params, i, pool))


@pytest.mark.parametrize("op", LOOK_UPS)
def test_look_ups_with_drawn_magnitudes_equal_pillow(op: str) -> None:
    for pool in transform.POOLS:
        if op in transform.POOLS[pool]:
            assert parity(op, pool, 1_000, 32).equal == 1


def weak_reference(crop: Tensor, params: transform.Params, row: int) -> Tensor:
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
    if params.solarize[row]:
        crop = torchvision.solarize(crop, 0.5)
    return crop


@pytest.mark.parametrize("as_float", [True, False])
def test_weak_views_equal_torchvision(as_float: bool) -> None:
    crops, spec = pictures(40), weak_specs(ViewOptions())[1]
    params = transform.sample(spec, 0, 0, np.arange(len(crops)))
    ours = transform.pixels(crops.float() if as_float else crops, params, spec)
    for i, crop in enumerate(crops):
        expected = weak_reference(crop.float() / 255, params, i)
        expected = torchvision.normalize(expected, list(transform.MEAN), list(transform.STD))
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=1e-5 / min(transform.STD))


def test_solarized_views_equal_torchvision_except_where_rounding_meets_the_half() -> None:
    crops = pictures(40)
    spec = weak_specs(ViewOptions(weak=WeakViews(solarize=(0.0, 0.7))))[1]
    params = transform.sample(spec, 0, 0, np.arange(len(crops)))
    assert 0 < params.solarize.sum() < len(crops)
    ours, close = transform.pixels(crops, params, spec, **UNIT), []
    for i, crop in enumerate(crops):
        expected = weak_reference(crop.float() / 255, params, i)
        close.append(((ours[i] - expected).abs() < 1e-5).double().mean())
    assert torch.stack(close).mean() > 0.9999 and min(close) > 0.995


def test_a_whole_weak_view_equals_torchvision_from_the_picture() -> None:
    images, spec = pictures(64), clsa_specs()[1]
    index, sizes = np.arange(len(images)), np.full(len(images), 64)
    boxes, flip = transform.crop_params(spec, 0, 0, index, sizes, sizes)
    params = transform.sample(spec, 0, 0, index)
    ours = transform.pixels(geometry.crop(images, boxes, 32, flip), params, spec)
    for i, image in enumerate(images.float() / 255):
        top, left, height, width = boxes[i].tolist()
        expected = torchvision.resized_crop(image, top, left, height, width, [32, 32])
        expected = weak_reference(expected.clamp(0, 1), params, i)
        expected = torchvision.hflip(expected) if flip[i] else expected
        expected = torchvision.normalize(expected, list(transform.MEAN), list(transform.STD))
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=2e-5 / min(transform.STD))


def test_strong_views_are_weak_views_rounded_and_operated_on() -> None:
    check_operated(clsa_specs()[-1], "official")


def test_infomins_weak_views_are_weak_views_with_two_rounds_of_operations() -> None:
    """InfoMin's recipe (Tian et al. 2020) applies both; strong views have their own operations."""
    ops = Operations(pool="randaugment", rounds=2, probability=1.0)
    options = ViewOptions(size=32, weak=WeakViews(sizes=(32,), ops=ops))
    strong = strong_specs(options, StrongOptions(sizes=(32,)), 2)
    for spec in weak_specs(options):
        assert spec.ops == ops
        check_operated(spec, "randaugment")
    assert transform.sample(spec, 0, 0, np.arange(50)).applied.all()
    assert (strong[0].ops.pool, strong[0].ops.rounds) == ("official", 5)


def check_operated(spec: ViewSpec, pool: Pool) -> None:
    """The view equals Pillow's operations on the weak view, rounded to uint8."""
    crops = pictures(32)
    params = transform.sample(spec, 0, 0, np.arange(len(crops)))
    weak = transform.pixels(crops, params, spec._replace(ops=Operations(rounds=0)), **UNIT)
    operated = (transform.pixels(crops, params, spec, **UNIT) * 255).round().to(torch.uint8)
    rounded = (weak * 255).round().to(torch.uint8)
    for i, crop in enumerate(rounded):
        assert torch.equal(operated[i], strong_reference(crop, params, i, pool))
    changed = (operated != rounded).flatten(1).any(1)
    assert changed.double().mean() > 0.7


def test_the_strong_view_of_evaluation_is_the_same_for_all_recipes() -> None:
    recipes = [
        ViewOptions(size=32, scale=(0.3, 1)),
        ViewOptions(
            size=32,
            scale=(0.08, 0.9),
            weak=WeakViews(
                sizes=(32, 24), jitter_probability=0, grayscale=1, blur=(1,), solarize=(1,), flip=1,
                ops=Operations(pool="randaugment", rounds=2, probability=1),
            ),
            local=LocalViews(sizes=(16,)),
        ),
    ]  # fmt: skip
    index, sides, drawn = np.arange(500), np.full(500, 60), []
    for options in recipes:
        spec = strong_eval_spec(options)
        assert (spec.size, spec.scale, spec.view) == (32, (0.2, 1), STRONG_EVAL_VIEW)
        assert spec.ops == Operations(pool="official", rounds=5, probability=0.5)
        params = transform.sample(spec, 0, 0, index)
        drawn.append([*transform.crop_params(spec, 0, 0, index, sides, sides), *params])
    for a, b in zip(*drawn, strict=True):
        assert np.array_equal(a, b)
    assert not (params.blur | params.solarize).any() and params.ops.shape == (500, 5)
    assert 0.7 < params.jitter.mean() < 0.9 and 0.4 < params.applied.mean() < 0.6


def test_contact_sheet_shows_originals_and_normalised_views() -> None:
    original = pictures(20)[0]
    shift, scale = (torch.tensor(c)[:, None, None] for c in (transform.MEAN, transform.STD))
    row = [original, (original / 255 - shift) / scale]
    sheet = contact_sheet([row, row], ["picture", "weak0"], side=20)
    assert sheet.size == (2 * 24 + 4, 2 * 24 + 16)
    shown = to_tensor(sheet)
    for top in (16, 40):
        for left in (4, 28):
            assert torch.equal(shown[:, top : top + 20, left : left + 20], original)

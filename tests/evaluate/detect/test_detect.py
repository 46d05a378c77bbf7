"""Training and judging detectors: order, mirroring, rates, determinism, processes, odd inputs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clsa.evaluate.detect.box_ap import Detections, coco_ap, pack_mask, packed, voc_ap
from clsa.evaluate.detect.detect import (
    Drawn,
    ahead,
    detect,
    drawn,
    find,
    fit,
    lr_at,
    sampling,
    shown,
)
from clsa.evaluate.detect.detector import build_detector
from clsa.evaluate.detect.scenes import scenes
from clsa.evaluate.evaluate import evaluate
from clsa.learning.models import autocast, build_encoder
from clsa.options.commands import EvaluateOptions, ScenesOptions
from clsa.options.detection_cards import DETECT_CARDS, DetectCard
from clsa.options.run import DataOptions, ModelOptions, ViewOptions
from clsa.pictures.annotations import Annotated, Thing, read_coco
from clsa.runs import digests, saved_encoder
from clsa.system.errors import ClsaError, Exit
from tests.support import detecting
from tests.support.detecting import uneven_rows

pixels = pytest.importorskip("pycocotools.mask")
CPU = torch.device("cpu")
TINY = {
    "model": "fpn", "masks": True, "measure": "coco", "short_sides": (64, 80), "test_side": 80,
    "max_side": 128, "batch": 4, "iters": 3, "drops": (2,), "warmup": 2, "precise_bn": 2,
    "width": 16, "hidden": 32, "mask_convs": 1, "anchors": (16, 24, 32), "rpn_batch": 16,
    "roi_batch": 16, "train_proposals": (60, 24), "test_proposals": (30, 10),
    "score_threshold": 0.0, "max_detections": 5,
}  # fmt: skip


def settings(**changes: object) -> DetectCard:
    return DetectCard.parse({**TINY, **changes}, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "s"
    scenes(ScenesOptions(out=out, train=9, test=5, size=64, classes=3))
    return out


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Annotated, Annotated]:
    return read_coco(folder, "train"), read_coco(folder, "val")


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return build_encoder(ModelOptions(encoder="resnet10-w32"), 0)


def test_rate_warms_up_and_drops_as_detectron2s() -> None:
    chosen = settings(lr=0.02, warmup=100, iters=24_000, drops=(18_000, 22_000))
    rates = [lr_at(step, chosen) for step in (0, 50, 100, 17_999, 18_000, 22_000)]
    expected = [2e-5, 0.02 * (0.001 + 0.999 / 2), 0.02, 0.02, 0.002, 0.0002]
    assert rates == pytest.approx(expected)
    assert lr_at(0, settings(warmup=0, lr=0.5)) == 0.5


def test_every_picture_is_drawn_once_an_epoch_with_every_side() -> None:
    chosen = settings(batch=4, short_sides=(64, 80, 96))
    steps = [drawn([3, 5, 8, 9, 11, 12], chosen, 7, step) for step in range(60)]
    flat = [each for batch in steps for each in batch]
    for epoch in range(40):
        assert sorted(each.row for each in flat[6 * epoch : 6 * epoch + 6]) == [3, 5, 8, 9, 11, 12]
    assert {each.side for each in flat} == {64, 80, 96}
    assert 0.35 < np.mean([each.flip for each in flat]) < 0.65
    assert steps[11] == drawn([3, 5, 8, 9, 11, 12], chosen, 7, 11)
    assert steps[11] != drawn([3, 5, 8, 9, 11, 12], chosen, 8, 11)


def test_mirrored_boxes_stay_around_their_mirrored_masks(
    pair: tuple[Annotated, Annotated],
) -> None:
    train, _ = pair
    for row, flip in ((0, False), (0, True), (1, True)):
        picture = shown(train, Drawn(row, flip, 64), masks=True)
        plain = train.source.read(row)
        image = (picture.image * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(image, plain[:, ::-1] if flip else plain)
        for box, mask in zip(picture.target["boxes"], picture.target["masks"], strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert box.tolist() == [float(edge) for edge in edges]
    labels = shown(train, Drawn(0, False, 64), False).target["labels"]
    assert labels.tolist() == [thing.label + 1 for thing in train.things[0]]


def test_crowds_are_not_learned_from(pair: tuple[Annotated, Annotated]) -> None:
    train, _ = pair
    crowd = Thing((0, 0, 5, 5), 0, crowd=True)
    changed = train._replace(things=[[crowd, Thing((1, 2, 9, 9), 2)], *train.things[1:]])
    picture = shown(changed, Drawn(0, True, 64), masks=True)
    assert picture.target["boxes"].tolist() == [[55, 2, 63, 9]]  # 64 wide
    assert picture.target["masks"][0, 2:9, 55:63].all() and picture.target["masks"].sum() == 56
    empty = train._replace(things=[[crowd]] * len(train.things))
    with pytest.raises(ClsaError, match="none shows an object") as error:
        detect(build_encoder(ModelOptions(encoder="resnet10-w32"), 0), empty, empty,
               settings(), 0, CPU)  # fmt: skip
    assert error.value.code == Exit.BAD_DATA


def test_the_truth_itself_scores_a_hundred(pair: tuple[Annotated, Annotated]) -> None:
    _, test = pair
    found = [
        Detections(
            np.array([thing.box for thing in things], float).reshape(-1, 4),
            np.ones(len(things)),
            np.array([thing.label for thing in things], int),
            [pack_mask(pixels.decode(packed(thing, (64, 64))).astype(bool)) for thing in things],
        )
        for things in test.things
    ]
    sizes = [(64, 64)] * len(found)
    values = coco_ap(found, test.things, 3, sizes, masks=True)
    assert values["AP"] == pytest.approx(100) and values["mask-AP"] == pytest.approx(100)
    assert voc_ap(found, test.things, 3)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("model", ["fpn", "c4"])
def test_same_seed_same_numbers_and_a_frozen_encoder_stays(
    pair: tuple[Annotated, Annotated], encoder: nn.Module, model: str
) -> None:
    anchors = (16, 24, 32) if model == "fpn" else (16, 32)
    chosen = settings(model=model, freeze=True, anchors=anchors)
    before = digests.digest(encoder.state_dict())
    one, same = (detect(encoder, *pair, chosen, 3, CPU) for _ in range(2))
    names = {"AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"}
    assert set(one) == names | {f"mask-{name}" for name in names}
    assert np.array_equal(list(one.values()), list(same.values()), equal_nan=True)
    assert digests.digest(encoder.state_dict()) == before
    weights = []
    for seed in (3, 3, 4):
        detector = build_detector(encoder, 3, chosen, seed)
        held = {
            k: v.clone() for k, v in detector.backbone.get_submodule("trunk").state_dict().items()
        }
        fit(detector, pair[0], chosen, seed, CPU)
        after = detector.backbone.get_submodule("trunk").state_dict()
        assert digests.digest(held) == digests.digest(after)
        weights.append(digests.digest(detector.state_dict()))
    assert weights[0] == weights[1] != weights[2]


def test_boxes_come_back_in_pixels_of_the_picture(
    pair: tuple[Annotated, Annotated], encoder: nn.Module
) -> None:
    """For any side that the detector sees, and without rounding to bfloat16."""
    _, test = pair
    detector = build_detector(encoder, 3, settings(test_side=160, max_side=320), 0)
    found, sizes = find(detector, test, settings(), CPU)
    assert sizes == [(64, 64)] * 5
    boxes = np.concatenate([each.boxes for each in found])
    assert len(boxes) and boxes.min() >= 0 and boxes.max() <= 64
    assert found[0].masks is not None and found[0].masks[0]["size"] == [64, 64]
    assert {int(label) for each in found for label in each.labels} <= {0, 1, 2}
    with torch.no_grad(), autocast(CPU, "auto"):
        image = torch.from_numpy(test.source.read(2)).permute(2, 0, 1).float() / 255
        alone = detector([image])[0]
    assert np.allclose(alone["boxes"].numpy(), found[2].boxes)
    assert not np.allclose(boxes * 4, np.rint(boxes * 4))  # not rounded to bfloat16


def test_precise_statistics_are_the_mean_of_the_batches(
    pair: tuple[Annotated, Annotated], encoder: nn.Module
) -> None:
    """With one batch they are that batch's statistics; the tiny rate changes no weight."""
    chosen = settings(model="c4", masks=False, anchors=(16, 32), iters=1, warmup=0, lr=1e-12,
                      precise_bn=1)  # fmt: skip
    detector = build_detector(encoder, 3, chosen, 0)
    seen = []
    norm = detector.roi_heads.box_head.norm
    hook = norm.register_forward_hook(lambda _, given, __: seen.append(given[0].detach().float()))
    fit(detector, pair[0], chosen, 0, CPU)
    hook.remove()
    assert len(seen) == 2 and norm.momentum == pytest.approx(0.1)
    assert torch.allclose(norm.running_mean, seen[1].mean((0, 2, 3)), atol=1e-3)
    assert torch.allclose(norm.running_var, seen[1].var((0, 2, 3)), rtol=1e-2, atol=1e-4)


def test_voc_measures(pair: tuple[Annotated, Annotated], encoder: nn.Module) -> None:
    chosen = settings(model="c4", masks=False, measure="voc", anchors=(16, 32), precise_bn=0)
    values = detect(encoder, *pair, chosen, 0, CPU)
    names = {"AP50", "AP75", "AP"}
    assert set(values) == names | {f"{name}-11pt" for name in names}
    assert all(0 <= value <= 100 for value in values.values())


def test_sampling_leaves_the_global_generator_as_it_was() -> None:
    state = torch.random.get_rng_state()
    drawn_twice = []
    for _ in range(2):
        with sampling(1, 2, CPU):
            drawn_twice.append(torch.randperm(50).tolist())
    with sampling(1, 3, CPU):
        assert torch.randperm(50).tolist() != drawn_twice[0]
    assert drawn_twice[0] == drawn_twice[1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_reading_ahead_keeps_the_order_and_brings_errors() -> None:
    assert list(ahead(range(7), lambda n: n * n)) == [n * n for n in range(7)]
    assert list(ahead(range(0), lambda n: n)) == []
    with pytest.raises(ZeroDivisionError):
        list(ahead(range(3), lambda n: 1 // n))


def test_unusable_classes_losses_and_pictures_are_refused(
    pair: tuple[Annotated, Annotated], encoder: nn.Module, tmp_path: Path
) -> None:
    train, test = pair
    with pytest.raises(ClsaError, match="different classes"):
        detect(encoder, train, test._replace(classes=["a"]), settings(), 0, CPU)
    with pytest.raises(ClsaError, match="not finite at step 1") as error:
        fit(
            build_detector(nan_of(encoder), 3, settings(masks=False), 0), train,
            settings(masks=False), 0, CPU,
        )  # fmt: skip
    assert error.value.code == Exit.UNHEALTHY
    scenes(ScenesOptions(out=tmp_path / "s", train=2, test=1, size=64, classes=3))
    broken = read_coco(tmp_path / "s", "train")
    (tmp_path / "s" / broken.source.ids[0]).write_bytes(b"no picture")
    with pytest.raises(ClsaError, match=r"000001.jpg - not-an-image") as error:
        shown(broken, Drawn(0, False, 64), False)
    assert error.value.code == Exit.BAD_DATA


def nan_of(encoder: nn.Module) -> nn.Module:
    other = build_encoder(ModelOptions(encoder="resnet10-w32"), 0)
    other.conv1.weight.data.fill_(float("nan"))
    return other


def test_two_processes_agree_and_each_looks_at_its_share(folder: Path, tmp_path: Path) -> None:
    """Weights agree to the bit, pictures stay in order, and batch norm is as on one process."""
    script = Path(detecting.__file__)
    chosen = json.dumps({**TINY, "precise_bn": 1})
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(script), str(folder), str(tmp_path), chosen),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (json.loads((tmp_path / f"rank{rank}-of-2.json").read_text()) for rank in range(2))
    norms = [one.pop("norm"), other.pop("norm")]
    plain, rows = nn.BatchNorm2d(4), uneven_rows().requires_grad_(True)
    out = plain(rows)
    out.pow(3).sum().backward()
    assert plain.running_mean is not None and plain.running_var is not None
    expected = [plain.running_mean.tolist(), plain.running_var.tolist()]
    for name, whole in (("out", out), ("grad", rows.grad)):
        joined = torch.tensor([row for norm in norms for row in norm[name]])
        assert whole is not None and torch.allclose(joined, whole, atol=1e-5), name
    for norm in norms:
        assert torch.allclose(torch.tensor(norm["statistics"]), torch.tensor(expected), atol=1e-6)
    assert one == other and len(one["boxes"]) == 5 and len(one["masks"][0]) == len(one["boxes"][0])
    assert one["gathered"] == [{"rank": 0, "x": 0.1}] + [{"rank": 1, "x": 0.1}] * 2


def test_evaluate_judges_detectors_and_keeps_the_encoder(folder: Path, tmp_path: Path) -> None:
    facts = saved_encoder.EncoderFacts(
        model=ModelOptions(encoder="resnet10-w32"), views=ViewOptions(size=32),
        data=DataOptions(data="clipart"), recipe="clsa", seed=7, step=1, data_digest="",
    )  # fmt: skip
    saved = build_encoder(facts.model, 3)
    saved_encoder.save_encoder(tmp_path / "encoder.safetensors", saved, facts)
    card = DETECT_CARDS["detect-scenes-fpn"].settings()
    changes = [f"{name}={json.dumps(value)}" for name, value in TINY.items() if card[name] != value]
    records = evaluate(
        EvaluateOptions(
            run=tmp_path, data=DataOptions(data=str(folder)), protocol=("detect-scenes-fpn",),
            change=tuple(changes), device="cpu",
        )
    )  # fmt: skip
    assert {"AP", "AP50", "AP75", "mask-AP"} <= {record.metric for record in records}
    assert {(r.split, r.n, r.chosen, r.leaked) for r in records} == {("val", 5, "last", 0)}
    assert all(r.encoder_digest == r.encoder_digest_after for r in records)
    assert {r.encoder for r in records} == {"random", "trained"}


def test_batch_norm_is_not_decayed(
    pair: tuple[Annotated, Annotated], encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """detectron2's WEIGHT_DECAY_NORM is 0."""
    made: list[torch.optim.SGD] = []
    real = torch.optim.SGD.__init__

    def watched(self: torch.optim.SGD, *args: object, **values: object) -> None:
        made.append(self)
        real(self, *args, **values)  # pyright: ignore

    monkeypatch.setattr(torch.optim.SGD, "__init__", watched)
    chosen = settings(iters=1, drops=(), precise_bn=0)
    detector = build_detector(encoder, 3, chosen, 0)
    fit(detector, pair[0], chosen, 0, CPU)
    rest, norms = made[0].param_groups
    assert (rest["weight_decay"], norms["weight_decay"]) == (1e-4, 0.0)
    wanted = {
        id(param)
        for module in detector.modules()
        if isinstance(module, nn.BatchNorm2d)
        for param in module.parameters()
        if param.requires_grad
    }
    assert wanted == {id(param) for param in norms["params"]} and wanted
    assert not any(param.ndim == 1 and id(param) in wanted for param in rest["params"])

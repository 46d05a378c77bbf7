"""Detectors around the encoders: shapes, strides, sharing, freezing, gradients, refusals."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from clsa.evaluate.detect.detect import read_boxes
from clsa.evaluate.detect.detector import LastStage, SharedMaps, build_detector, strides_of
from clsa.learning.models import SharedBatchNorm2d, build_encoder
from clsa.options.detection_cards import DETECT_CARDS, DetectCard
from clsa.options.run import DataOptions, ModelOptions
from clsa.runs import digests
from clsa.system.errors import ClsaError

SMALL = build_encoder(ModelOptions(encoder="resnet10-w32"), 0)
TINY = {
    "short_sides": (64,), "test_side": 64, "max_side": 128, "rpn_batch": 16, "roi_batch": 16,
    "train_proposals": (60, 24), "test_proposals": (30, 10), "hidden": 32, "width": 16,
    "mask_convs": 1, "measure": "coco", "score_threshold": 0.0, "max_detections": 5,
}  # fmt: skip


def settings(**changes: object) -> DetectCard:
    return DetectCard.parse({**TINY, **changes}, "test")


def pictures(masks: bool, side: int = 64) -> tuple[list[torch.Tensor], list[dict]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, side, side, generator=generator) for _ in range(2)]
    boxes = torch.tensor([[4.0, 4, 40, 40], [20, 10, 60, 50]])
    mask = torch.zeros(2, side, side, dtype=torch.uint8)
    for each, (x1, y1, x2, y2) in zip(mask, boxes.int().tolist(), strict=True):
        each[y1:y2, x1:x2] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])} | ({"masks": mask} if masks else {})
    return images, [target, dict(target)]


def loss_of(detector: GeneralizedRCNN, masks: bool) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = detector(*pictures(masks))
    assert ("loss_mask" in losses) == masks and len(losses) == 4 + masks
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("masks", [False, True])
def test_resnet50_c4_learns_in_every_layer(masks: bool) -> None:
    encoder = build_encoder(ModelOptions(encoder="resnet50"), 0)
    detector = build_detector(encoder, 3, settings(masks=masks, anchors=(16, 32)), 0).train()
    assert strides_of(encoder) == [4, 8, 16, 32]
    before = [param.detach().clone() for param in detector.parameters()]
    optimizer = torch.optim.SGD(detector.parameters(), 0.01)
    loss_of(detector, masks).backward()
    for name, param in detector.named_parameters():
        assert param.grad is not None and param.grad.abs().sum() > 0, name
    optimizer.step()
    moved = zip(before, detector.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in moved)
    detector.eval()
    with torch.no_grad():
        found = detector(pictures(masks)[0])
    assert len(found) == 2 and found[0]["boxes"].shape[1] == 4
    assert not masks or found[0]["masks"].shape[1:] == (1, 64, 64)
    head = detector.roi_heads.box_head
    assert isinstance(head, LastStage) and head.norm.num_features == 2048
    assert head.maps(torch.zeros(1, 1024, 14, 14)).shape == (1, 2048, 7, 7)


@pytest.mark.parametrize("model", ["c4", "fpn"])
@pytest.mark.parametrize("masks", [False, True])
def test_small_encoders_and_frozen_ones(model: str, masks: bool) -> None:
    anchors = (16, 32) if model == "c4" else (16, 24, 32)
    chosen = settings(model=model, masks=masks, freeze=True, anchors=anchors)
    detector = build_detector(SMALL, 3, chosen, 0).train()
    assert strides_of(SMALL) == [1, 2, 4, 8]
    trained = [param for param in detector.parameters() if param.requires_grad]
    assert not any(param.requires_grad for param in held(detector).parameters())
    before = digests.digest(held(detector).state_dict())
    optimizer = torch.optim.SGD(trained, 0.01, weight_decay=0.1)
    loss_of(detector, masks).backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in trained)
    optimizer.step()
    assert digests.digest(held(detector).state_dict()) == before
    theirs = SMALL.state_dict()
    for name, tensor in held(detector).state_dict().items():
        assert any(torch.equal(tensor, other) for other in theirs.values()), name
    assert not any(module.training for part in held(detector) for module in part.modules())


def held(detector: GeneralizedRCNN) -> nn.ModuleList:
    """The encoder's own layers: the trunk, and stage 4 if it is part of the heads."""
    trunk = detector.backbone.get_submodule("trunk")
    head = detector.roi_heads.box_head
    return nn.ModuleList([trunk, head.stage] if isinstance(head, LastStage) else [trunk])


def test_every_batch_norm_is_shared_between_processes() -> None:
    chosen = settings(model="fpn", masks=True, anchors=(16, 24, 32))
    detector = build_detector(SMALL, 3, chosen, 0)
    norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(type(norm) is SharedBatchNorm2d for norm in norms)
    names = [name for name, m in detector.named_modules() if isinstance(m, SharedBatchNorm2d)]
    assert any("pyramid" in name for name in names) and any("mask_head" in name for name in names)


def test_the_mask_head_of_c4_sees_the_maps_of_the_box_head() -> None:
    detector = build_detector(SMALL, 3, settings(masks=True, anchors=(16, 32)), 0).train()
    heads = detector.roi_heads
    pool, head, shared = heads.box_roi_pool, heads.box_head, heads.mask_roi_pool
    assert isinstance(shared, SharedMaps) and isinstance(head, LastStage)
    generator = torch.Generator().manual_seed(1)
    maps = {"0": torch.rand(2, 128, 16, 16, generator=generator)}
    corners = torch.rand(2, 5, 2, generator=generator) * 30
    boxes = list(torch.cat([corners, corners + 20], 2))
    features = head(pool(maps, boxes, [(64, 64)] * 2))
    chosen = shared(maps, [boxes[0][[1, 3]], boxes[1][[4]]], [(64, 64)] * 2)
    assert head.kept is not None and torch.equal(chosen, head.kept[[1, 3, 9]])
    assert torch.equal(chosen.mean((2, 3)), features[[1, 3, 9]])
    detector.eval()
    alone = shared(maps, [boxes[0][[1]], boxes[1][[4]]], [(64, 64)] * 2)
    assert torch.allclose(alone.mean((2, 3)), head(pool(maps, boxes, []))[[1, 9]], atol=1e-5)
    own = sum(param.numel() for param in detector.parameters())
    assert own == sum(param.numel() for param in copy.deepcopy(detector).parameters())


def test_new_layers_come_from_the_seed_and_the_encoder_is_left_alone() -> None:
    before = digests.digest(SMALL.state_dict())
    chosen = settings(model="fpn", anchors=(16, 24, 32))
    one, same, other = (
        digests.digest(build_detector(SMALL, 3, chosen, seed).state_dict()) for seed in (1, 1, 2)
    )
    assert one == same != other and digests.digest(SMALL.state_dict()) == before


def test_encoders_and_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ClsaError, match="only ResNets"):
        build_detector(timm.create_model("vit_tiny_patch16_224"), 3, settings(), 0)
    with pytest.raises(ClsaError, match="the pyramid has 3 levels"):
        build_detector(SMALL, 3, settings(model="fpn", anchors=(16, 32)), 0)
    with pytest.raises(ClsaError, match="judged by coco only"):
        settings(masks=True, measure="voc")


def test_named_protocols_are_the_papers() -> None:
    voc, coco, pyramid, lvis = (
        DETECT_CARDS[f"detect-{name}"] for name in ("voc-c4", "coco-c4", "coco-fpn", "lvis-fpn")
    )
    assert isinstance(voc, DetectCard) and isinstance(coco, DetectCard)
    assert isinstance(pyramid, DetectCard) and isinstance(lvis, DetectCard)
    assert (voc.iters, voc.drops, voc.warmup, voc.lr) == (24_000, (18_000, 22_000), 100, 0.02)
    assert voc.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (coco.iters, coco.drops, coco.masks) == (180_000, (120_000, 160_000), True)
    assert (pyramid.iters, pyramid.drops, pyramid.model) == (90_000, (60_000, 80_000), "fpn")
    assert not any(each.freeze for each in (voc, coco, pyramid)) and voc.measure == "voc"
    assert (coco.warmup, pyramid.warmup, coco.batch, coco.weight_decay) == (1_000, 1_000, 16, 1e-4)
    assert (voc.headline, coco.headline) == ("AP50", "AP") and not voc.frozen
    with pytest.raises(ClsaError, match="is trained and judged by detectron2"):
        read_boxes(DataOptions(data="anything"), lvis)
    with pytest.raises(ClsaError, match="give VOCdevkit"):
        read_boxes(DataOptions(data="clipart"), voc)

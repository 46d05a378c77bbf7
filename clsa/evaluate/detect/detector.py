"""torchvision's Faster R-CNN and Mask R-CNN around an encoder of this package (a ResNet of timm).

Pictures are RGB in [0, 1] and are normalised by `clsa.views.transform.MEAN` and `STD`. Batch norm
takes its statistics over all processes. The models follow detectron2's C4 and FPN, but differ in
these points: pictures are resized by plain bilinear interpolation without smoothing, and their
sides are rounded down; regions of the pyramid are pooled at 2 x 2 points per cell, without the
half-pixel shift; the box losses are torchvision's smooth L1 (beta 1/9) instead of L1; new layers
get torchvision's initial weights; computation is in bfloat16 if the hardware supports it.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from clsa.learning.models import group_norms
from clsa.options.detection_cards import DetectCard
from clsa.system.errors import ClsaError
from clsa.views import transform

RATIOS = (0.5, 1.0, 2.0)
PYRAMID_STRIDE = 4
DIVISIBLE = 32
C4_POOL, FPN_POOL, MASK_POOL = 14, 7, 14
CODER_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
NMS_RPN, NMS_BOXES = 0.7, 0.5
POSITIVE_ANCHORS, POSITIVE_REGIONS = 0.5, 0.25

Maps = Float[Tensor, "B C H W"]


class Frozen(nn.Module):
    """A container that, if `freeze` is set, keeps its modules in evaluation mode, not learning."""

    def __init__(self, freeze: bool):
        super().__init__()
        self.freeze = freeze

    def hold(self) -> None:
        """Freeze the modules that were added so far, if `freeze` is set."""
        if self.freeze:
            self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Set the mode; frozen modules stay in evaluation mode."""
        return super().train(mode and not self.freeze)


class Trunk(Frozen):
    """Stem and first stages of a ResNet: (B, 3, H, W) -> one map per stage."""

    def __init__(self, encoder: ResNet, num_stages: int, freeze: bool):
        super().__init__(freeze)
        self.stem = nn.Sequential(encoder.conv1, encoder.bn1, encoder.act1, encoder.maxpool)
        self.stages = nn.ModuleList(
            getattr(encoder, f"layer{stage}") for stage in range(1, num_stages + 1)
        )
        self.hold()

    def forward(self, x: Maps) -> list[Maps]:
        """The maps of all stages, from fine to coarse."""
        maps = []
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class LastMap(nn.Module):
    """The trunk's last map only, as C4 uses it."""

    def __init__(self, trunk: Trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Maps) -> "OrderedDict[str, Maps]":
        """The map as the only level, "0"."""
        return OrderedDict([("0", self.trunk(x)[-1].float().contiguous())])


class Pyramid(nn.Module):
    """Feature pyramid with batch norm over the stages in `used`, and one pooled level on top."""

    def __init__(self, trunk: Trunk, used: Sequence[int], widths: Sequence[int], width: int):
        super().__init__()
        self.trunk, self.used = trunk, tuple(used)
        self.pyramid = FeaturePyramidNetwork(
            list(widths), width, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )

    def forward(self, x: Maps) -> "OrderedDict[str, Maps]":
        """The levels "0", "1", ... and "pool"."""
        maps = self.trunk(x)
        chosen = OrderedDict((str(level), maps[stage]) for level, stage in enumerate(self.used))
        return OrderedDict((name, each.float()) for name, each in self.pyramid(chosen).items())


class RegionPool(nn.Module):
    """Pools regions of one map to 14 x 14 (RoIAlign with the half-pixel shift).

    In training it keeps the last regions it pooled, for `SharedMaps`.
    """

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride
        self.regions: list[Tensor] = []

    def forward(
        self, maps: dict[str, Maps], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Maps:
        """Rows in the order of pictures and of their boxes."""
        if self.training:
            self.regions = boxes
        scale = 1 / self.stride
        boxes = [each.to(maps["0"].dtype) for each in boxes]
        return roi_align(maps["0"], boxes, C4_POOL, scale, sampling_ratio=0, aligned=True)


class LastStage(nn.Module):
    """Box head of C4: stage 4, extra batch norm and mean over pixels: (R, C, 14, 14) -> (R, F).

    If the encoder is frozen, its stage 4 is frozen too; the extra norm always learns.
    """

    def __init__(self, stage: nn.Module, width: int, freeze: bool):
        super().__init__()
        self.stage = Frozen(freeze)
        self.stage.add_module("layer4", stage)
        self.stage.hold()
        self.norm = nn.BatchNorm2d(width)
        self.shares_maps = False
        self.kept: Tensor | None = None

    def maps(self, regions: Maps) -> Maps:
        """Maps before the mean, (R, F, 7, 7)."""
        stage = cast(nn.Module, self.stage.layer4)
        return self.norm(stage(regions.contiguous(memory_format=torch.channels_last)))

    def forward(self, regions: Maps) -> Float[Tensor, "R F"]:
        """Mean features of each region."""
        maps = self.maps(regions)
        self.kept = maps if self.training and self.shares_maps else None
        return maps.mean((2, 3))


class SharedMaps(nn.Module):
    """Input maps of C4's mask head: in training those of the box head, as in detectron2.

    torchvision's heads pass the positive regions as boxes. Each box is among the last regions
    pooled, so its row is looked up. A second pass through stage 4 would count the positives twice
    in the batch norm.
    """

    def __init__(self, pool: RegionPool, head: LastStage):
        super().__init__()
        self._shared = [(pool, head)]  # in a list, or they would be registered as submodules twice

    def forward(
        self, maps: dict[str, Maps], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Maps:
        """Rows in the order of pictures and of their boxes."""
        pool, head = self._shared[0]
        if not self.training:
            return head.maps(pool(maps, boxes, sizes))
        rows, first = [], 0
        for wanted, pooled in zip(boxes, pool.regions, strict=True):
            same = (wanted[:, None] == pooled[None]).all(2)
            rows.append(first + same.int().argmax(1))
            first += len(pooled)
        return cast(Tensor, head.kept)[torch.cat(rows)]


class Resize(GeneralizedRCNNTransform):
    """Normalise, resize, pad and batch pictures; `sides` gives one train side per picture."""

    def __init__(self, settings: DetectCard):
        mean, std = list(transform.MEAN), list(transform.STD)
        side = cast(int, (settings.test_side,))  # torchvision also takes a tuple
        super().__init__(side, settings.max_side, mean, std, size_divisible=DIVISIBLE)
        self.sides: Iterator[int] = iter(())

    def torch_choice(self, k: list[int]) -> int:
        """The next train side; torchvision would draw one from the global generator."""
        return next(self.sides, k[-1])


def build_detector(
    encoder: nn.Module, num_classes: int, settings: DetectCard, seed: int
) -> GeneralizedRCNN:
    """Build a detector around a copy of `encoder`; `seed` decides the weights of new layers.

    In training it takes pictures and targets (boxes, labels counted from 1, masks) and returns
    losses. In evaluation it takes pictures and returns boxes, labels, scores and masks.

    Raises:
        ClsaError: if the encoder is not a ResNet, or the anchors do not fit the pyramid.
    """
    if not isinstance(encoder, ResNet):
        what, hint = f"a detector on a {type(encoder).__name__}", "use a ResNet"
        raise ClsaError(what, "only ResNets have the four stages it needs", hint)
    encoder = copy.deepcopy(encoder).requires_grad_(True)
    widths = [int(info["num_chs"]) for info in encoder.feature_info[1:]]
    strides = strides_of(encoder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        build = _c4 if settings.model == "c4" else _fpn
        backbone, channels, anchors, heads = build(encoder, widths, strides, settings, num_classes)
        head = RPNHead(channels, anchors.num_anchors_per_location()[0])
        before, after = (
            {"training": pair[0], "testing": pair[1]}
            for pair in zip(settings.train_proposals, settings.test_proposals, strict=True)
        )
        proposals = RegionProposalNetwork(
            anchors, head, 0.7, 0.3, settings.rpn_batch, POSITIVE_ANCHORS, before, after, NMS_RPN
        )
        regions = RoIHeads(
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=settings.roi_batch,
            positive_fraction=POSITIVE_REGIONS,
            bbox_reg_weights=CODER_WEIGHTS,
            score_thresh=settings.score_threshold,
            nms_thresh=NMS_BOXES,
            detections_per_img=settings.max_detections,
            **heads,
        )
    for part in (head, heads["box_predictor"], heads.get("mask_predictor")):
        if part is not None:
            part.register_forward_hook(_widened)
    detector = GeneralizedRCNN(backbone, proposals, regions, Resize(settings))
    group_norms(detector, 1)
    return detector


def _widened(module: nn.Module, given: Any, output: Any) -> Any:
    """Convert outputs to float32.

    torchvision computes boxes in the type of maps and offsets. In bfloat16 their coordinates would
    be rounded to half a pixel at 64 pixels, and to four pixels at 800.
    """
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_widened(module, given, each) for each in output)


def strides_of(encoder: ResNet) -> list[int]:
    """Stride of each stage's map in pixels; 4, 8, 16, 32 unless the stem is small."""
    return [int(info["reduction"]) // _spared(encoder) for info in encoder.feature_info[1:]]


def _spared(encoder: ResNet) -> int:
    """Factor by which timm's recorded strides are too large for an encoder with a small stem."""
    first = encoder.conv1[0] if isinstance(encoder.conv1, nn.Sequential) else encoder.conv1
    small_conv = cast(nn.Conv2d, first).stride[0] == 1
    return (2 if small_conv else 1) * (2 if isinstance(encoder.maxpool, nn.Identity) else 1)


def _c4(
    encoder: ResNet,
    widths: list[int],
    strides: list[int],
    settings: DetectCard,
    num_classes: int,
) -> tuple[nn.Module, int, AnchorGenerator, dict[str, Any]]:
    trunk = Trunk(encoder, 3, settings.freeze)
    anchors = AnchorGenerator((settings.anchors,), (RATIOS,))
    pool = RegionPool(strides[2])
    head = LastStage(cast(nn.Module, encoder.layer4), widths[3], settings.freeze)
    predictor = FastRCNNPredictor(widths[3], num_classes + 1)
    heads: dict[str, Any] = {
        "box_roi_pool": pool, "box_head": head, "box_predictor": predictor,
    }  # fmt: skip
    if settings.masks:
        head.shares_maps = True
        heads["mask_roi_pool"] = SharedMaps(pool, head)
        heads["mask_head"] = nn.Identity()
        heads["mask_predictor"] = MaskRCNNPredictor(widths[3], settings.width, num_classes + 1)
    return LastMap(trunk), widths[2], anchors, heads


def _fpn(
    encoder: ResNet,
    widths: list[int],
    strides: list[int],
    settings: DetectCard,
    num_classes: int,
) -> tuple[nn.Module, int, AnchorGenerator, dict[str, Any]]:
    used = [stage for stage, stride in enumerate(strides) if stride >= PYRAMID_STRIDE]
    if len(settings.anchors) != len(used) + 1:
        why = f"the pyramid has {len(used) + 1} levels"
        raise ClsaError(f"anchors {settings.anchors}", why, "give one anchor side per level")
    backbone = Pyramid(
        Trunk(encoder, 4, settings.freeze), used, [widths[stage] for stage in used], settings.width
    )
    sides = tuple((side,) for side in settings.anchors)
    anchors = AnchorGenerator(sides, (RATIOS,) * len(sides))
    levels = [str(level) for level in range(len(used))]
    heads: dict[str, Any] = {
        "box_roi_pool": MultiScaleRoIAlign(levels, FPN_POOL, 2),
        "box_head": TwoMLPHead(settings.width * FPN_POOL**2, settings.hidden),
        "box_predictor": FastRCNNPredictor(settings.hidden, num_classes + 1),
    }
    if settings.masks:
        layers = [settings.width] * settings.mask_convs
        heads["mask_roi_pool"] = MultiScaleRoIAlign(levels, MASK_POOL, 2)
        heads["mask_head"] = MaskRCNNHeads(settings.width, layers, 1, norm_layer=nn.BatchNorm2d)
        heads["mask_predictor"] = MaskRCNNPredictor(settings.width, settings.width, num_classes + 1)
    return backbone, settings.width, anchors, heads

"""Cards of object detection: how detectors are built, trained and judged. Needs no torch."""

from typing import Annotated, ClassVar, Literal

import pydantic

from clsa.options.cards import Card, Rate
from clsa.options.config import Count, Fraction, NotNegative


class DetectCard(Card):
    """A detector on the encoder; the defaults are those of Faster R-CNN C4 in detectron2."""

    pictures: ClassVar = "boxes"

    model: Literal["c4", "fpn"] = "c4"
    """c4: regions are cut from one feature map, that of stage 3, then pass stage 4 and an extra
    batch norm; fpn: a feature pyramid over the stages of stride 4 and more."""
    masks: bool = False
    """Mask R-CNN instead of Faster R-CNN."""
    measure: Literal["voc", "coco"] = "voc"
    """Use VOC's or COCO's average precision."""
    years: tuple[Literal["2007", "2012"], ...] = ("2007", "2012")
    """VOC: years whose `trainval` to learn from; the detector is judged on `test` of 2007."""
    library: Literal["clsa", "detectron2"] = "clsa"
    """Library that trains and judges the detector; detectron2 needs `clsa export` first."""
    freeze: bool = False
    """Keep the encoder unchanged, with its batch norm on running statistics."""
    short_sides: tuple[Count, ...] = (800,)
    """Short sides of training pictures in pixels, of which one is drawn for each picture."""
    test_side: Count = 800
    """Short side of test pictures in pixels."""
    max_side: Count = 1333
    """Largest long side of any picture in pixels."""
    batch: Count = 16
    """Pictures per step, over all processes."""
    lr: Rate = 0.02
    """Learning rate."""
    iters: Count = 24_000
    """Number of training steps."""
    drops: tuple[Count, ...] = (18_000, 22_000)
    """Steps at which the rate falls to a tenth."""
    warmup: Annotated[int, pydantic.Field(ge=0)] = 100
    """Steps over which the rate rises linearly from a thousandth."""
    weight_decay: NotNegative = 1e-4
    """Weight decay of all parameters except those of batch norm, as in detectron2's SGD."""
    precise_bn: Annotated[int, pydantic.Field(ge=0)] = 200
    """Batches over which batch norm's statistics are averaged before judging (0: no averaging)."""
    width: Count = 256
    """Channels of the feature pyramid and of the mask head."""
    hidden: Count = 1024
    """fpn: width of the box head's two layers."""
    mask_convs: Count = 4
    """fpn: convolutions of the mask head."""
    anchors: tuple[Count, ...] = (32, 64, 128, 256, 512)
    """Sides of the anchors in pixels: all at every place (c4), or one per level (fpn)."""
    rpn_batch: Count = 256
    """Anchors per picture that the region proposal network learns from."""
    roi_batch: Count = 512
    """Regions per picture that the heads learn from."""
    train_proposals: tuple[Count, Count] = (12_000, 2_000)
    """Number of best proposals kept in training, before and after non-maximum suppression (fpn:
    the first number is per level)."""
    test_proposals: tuple[Count, Count] = (6_000, 1_000)
    """The same numbers when judging."""
    score_threshold: Fraction = 0.05
    """Detections with lower scores are dropped."""
    max_detections: Count = 100
    """Detections kept per picture, those with the highest scores."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "DetectCard":
        if not self.short_sides or not self.anchors:
            raise ValueError("short_sides and anchors need at least one number")
        if max(*self.short_sides, self.test_side) > self.max_side:
            raise ValueError("a short side is larger than max_side")
        if self.masks and self.measure == "voc":
            raise ValueError("masks are judged by coco only")
        return self

    @property
    def frozen(self) -> bool:
        return self.freeze

    @property
    def headline(self) -> str:
        return "AP50" if self.measure == "voc" else "AP"


_SIDES = (640, 672, 704, 736, 768, 800)
DETECT_CARDS: dict[str, Card] = {
    "detect-voc-c4": DetectCard(
        about="Faster R-CNN C4 on VOC07+12, tested on VOC07", source="MoCo, CLSA",
        short_sides=tuple(range(480, 801, 32)),
    ),
    "detect-coco-c4": DetectCard(
        about="Mask R-CNN C4 on COCO, 2x", source="MoCo, CLSA", masks=True, measure="coco",
        short_sides=_SIDES, iters=180_000, drops=(120_000, 160_000),
        warmup=1_000,
    ),
    "detect-coco-fpn": DetectCard(
        about="Mask R-CNN FPN on COCO, 1x", source="MoCo, CLIM", model="fpn", masks=True,
        measure="coco", short_sides=_SIDES, iters=90_000, drops=(60_000, 80_000), warmup=1_000,
        train_proposals=(2_000, 1_000), test_proposals=(1_000, 1_000),
    ),
    "detect-lvis-fpn": DetectCard(
        about="Mask R-CNN FPN on LVIS v0.5, 2x, by detectron2", source="CLIM", model="fpn",
        library="detectron2", masks=True, measure="coco", short_sides=_SIDES, iters=180_000,
        drops=(120_000, 160_000), warmup=1_000, train_proposals=(2_000, 1_000),
        test_proposals=(1_000, 1_000),
    ),
    "detect-scenes-fpn": DetectCard(
        about="Faster R-CNN FPN on `clsa scenes`, encoder frozen, 2 minutes on a thread",
        source="ours", model="fpn", measure="coco", freeze=True, short_sides=(128,),
        test_side=128, max_side=256, batch=8, lr=0.02, iters=300, drops=(240,), warmup=20,
        precise_bn=0, width=64, hidden=256, mask_convs=2, anchors=(24, 40, 64), rpn_batch=64,
        roi_batch=32, train_proposals=(200, 100), test_proposals=(200, 50), max_detections=20,
    ),
}  # fmt: skip

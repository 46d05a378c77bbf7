"""How detectors are built, trained and judged: the papers' protocols, and one for small scenes.

Needs no torch.
"""

from typing import Annotated, Literal

import pydantic

from clsa.config import Config, Count, Fraction, NotNegative, Positive, nearest
from clsa.errors import ClsaError


class DetectSettings(Config):
    """One detector; the defaults are those of Faster R-CNN C4 in detectron2."""

    model: Literal["c4", "fpn"] = "c4"
    """c4: one map, of stage 3; stage 4 and an extra batch norm on each region. fpn: a feature
    pyramid over the stages of stride 4 and more."""
    masks: bool = False
    """Mask R-CNN instead of Faster R-CNN."""
    measure: Literal["voc", "coco"] = "voc"
    """Whose average precision."""
    freeze: bool = False
    """The encoder stays as it is, its batch norm on running statistics."""
    short_sides: tuple[Count, ...] = (800,)
    """Short side of train pictures in pixels, one of them drawn for each."""
    test_side: Count = 800
    """Short side of test pictures in pixels."""
    max_side: Count = 1333
    """Largest long side in pixels."""
    batch: Count = 16
    """Pictures a step, over all processes."""
    lr: Positive = 0.02
    """Learning rate."""
    iters: Count = 24_000
    """Steps."""
    drops: tuple[Count, ...] = (18_000, 22_000)
    """Steps at which the rate falls to a tenth."""
    warmup: Annotated[int, pydantic.Field(ge=0)] = 100
    """Steps over which it rises linearly from a thousandth."""
    weight_decay: NotNegative = 1e-4
    """Of all parameters, as in detectron2's SGD."""
    precise_bn: Annotated[int, pydantic.Field(ge=0)] = 200
    """Batches over which batch norm's statistics are averaged before judging; 0: not at all."""
    width: Count = 256
    """Channels of the pyramid, and of the mask head."""
    hidden: Count = 1024
    """Width of the pyramid's two layers on each region."""
    mask_convs: Count = 4
    """Convolutions of the pyramid's mask head."""
    anchors: tuple[Count, ...] = (32, 64, 128, 256, 512)
    """Sides of the anchors in pixels: all at every place (c4), or one a level (fpn)."""
    rpn_batch: Count = 256
    """Anchors a picture that the region proposal network learns from."""
    roi_batch: Count = 512
    """Regions a picture that the heads learn from."""
    train_proposals: tuple[Count, Count] = (12_000, 2_000)
    """Best proposals in training, before and after suppression (fpn: before, a level)."""
    test_proposals: tuple[Count, Count] = (6_000, 1_000)
    """The same when judging."""
    score_threshold: Fraction = 0.05
    """Detections of lower scores are dropped."""
    max_detections: Count = 100
    """Kept a picture, the surest."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "DetectSettings":
        if not self.short_sides or not self.anchors:
            raise ValueError("short_sides and anchors need at least one number")
        if self.masks and self.measure == "voc":
            raise ValueError("masks are judged by coco only")
        return self


_FPN = DetectSettings(
    model="fpn",
    masks=True,
    measure="coco",
    short_sides=(640, 672, 704, 736, 768, 800),
    iters=90_000,
    drops=(60_000, 80_000),
    train_proposals=(2_000, 1_000),
    test_proposals=(1_000, 1_000),
)
DETECTRON2_ONLY = ("detect-lvis-fpn",)
SETTINGS: dict[str, DetectSettings] = {
    # VOC07+12 trainval -> VOC07 test
    "detect-voc-c4": DetectSettings(short_sides=tuple(range(480, 801, 32))),
    # COCO 2x
    "detect-coco-c4": DetectSettings(
        masks=True,
        measure="coco",
        short_sides=(640, 672, 704, 736, 768, 800),
        iters=180_000,
        drops=(120_000, 160_000),
    ),
    # COCO 1x
    "detect-coco-fpn": _FPN,
    # `clsa scenes`, the encoder frozen, in about two minutes on one thread
    "detect-scenes-fpn": DetectSettings(
        model="fpn",
        measure="coco",
        freeze=True,
        short_sides=(128,),
        test_side=128,
        max_side=256,
        batch=8,
        lr=0.02,
        iters=300,
        drops=(240,),
        warmup=20,
        precise_bn=0,
        width=64,
        hidden=256,
        mask_convs=2,
        anchors=(24, 40, 64),
        rpn_batch=64,
        roi_batch=32,
        train_proposals=(200, 100),
        test_proposals=(200, 50),
        max_detections=20,
    ),
}


def settings_of(name: str) -> DetectSettings:
    """The protocol of a name.

    Raises:
        ClsaError: for an unknown one, and for LVIS, whose judging only its own library does.
    """
    if name in DETECTRON2_ONLY:
        hint = "clsa export RUN --to detectron2, then use the LVIS configuration there"
        raise ClsaError(name, "LVIS is trained and judged by detectron2", hint)
    if name not in SETTINGS:
        close = nearest(name, list(SETTINGS))
        hint = f"did you mean {close}?" if close else f"use one of {', '.join(SETTINGS)}"
        raise ClsaError(name, "no such detector", hint)
    return SETTINGS[name]

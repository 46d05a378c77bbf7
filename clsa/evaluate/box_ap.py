"""Average precision of detected objects, as VOC and as COCO compute it."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from clsa.annotations import Annotated, Thing
from clsa.evaluate.average_precision import average_precision
from clsa.extras import require

OVERLAPS = np.arange(10, 20) / 20
COCO_NAMES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")


class Detections(NamedTuple):
    """What was found in one picture.

    Attributes:
        boxes: (x1, y1, x2, y2), edges in pixels as `annotations` has them.
        scores: the higher the surer.
        labels: positions of the classes.
        masks: pixels of each object; of a picture without objects still (0, H, W). None: no masks.
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    masks: Bool[np.ndarray, "n H W"] | None = None


def overlaps(
    boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, "n m"]:
    """Intersection over union.

    VOC adds a pixel to each side, as its corners are the first and the last pixel; boxes here are
    edges (see `annotations`), so that their difference is the number of pixels already.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=2)
    sizes = [np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (boxes, others)]
    return common / (sizes[0][:, None] + sizes[1][None] - common)


def voc_ap(
    found: Sequence[Detections], things: Sequence[Sequence[Thing]], num_classes: int
) -> dict[str, float]:
    """Mean over the classes of VOC's average precision, in percent.

    `AP50` is the area under the envelope (VOC from 2010 on), `AP50-11pt` the mean at 11 recalls,
    as VOC 2007 and detectron2's evaluator for it have it; `AP75` and `AP` (mean over the overlaps
    .50, .55, ..., .95) are areas. Classes without an object to find are left out.

    Args:
        found: one a picture, in the order of `things`.
        things: the objects of each picture.
    """
    values: dict[str, list[float]] = {"AP50": [], "AP50-11pt": [], "AP75": [], "AP": []}
    for label in range(num_classes):
        matches = [_matched(found, things, label, overlap) for overlap in OVERLAPS]
        right, positives = matches[0]
        if not positives:
            continue
        areas = [average_precision(each, count, "all") for each, count in matches]
        values["AP50"].append(areas[0])
        values["AP50-11pt"].append(average_precision(right, positives, "11"))
        values["AP75"].append(areas[5])
        values["AP"].append(float(np.mean(areas)))
    return {name: 100 * float(np.mean(each)) if each else 0.0 for name, each in values.items()}


def _matched(
    found: Sequence[Detections], things: Sequence[Sequence[Thing]], label: int, overlap: float
) -> tuple[Bool[np.ndarray, " n"], int]:
    """Whether each detection of a class is right, the surest first; how many there are to find.

    A detection belongs to the object of its class that it overlaps most. By more than `overlap` it
    is right, unless a surer one had that object; a difficult object makes it count for nothing.
    """
    own = [each.labels == label for each in found]
    picture = np.repeat(np.arange(len(found)), [mine.sum() for mine in own])
    pairs = list(zip(found, own, strict=True))
    boxes = np.concatenate([np.zeros((0, 4)), *(each.boxes[mine] for each, mine in pairs)])
    scores = np.concatenate([np.zeros(0), *(each.scores[mine] for each, mine in pairs)])
    wanted = [[thing for thing in each if thing.label == label] for each in things]
    taken = [np.zeros(len(each), bool) for each in wanted]
    right = []
    for k in np.argsort(-scores, kind="stable").tolist():
        here = wanted[picture[k]]
        shared = overlaps(boxes[k : k + 1], np.array([thing.box for thing in here]).reshape(-1, 4))
        best = int(shared.argmax()) if here else -1
        if best < 0 or shared[0, best] <= overlap:
            right.append(False)
        elif not here[best].difficult:
            right.append(not taken[picture[k]][best])
            taken[picture[k]][best] = True
    positives = sum(not thing.difficult for each in wanted for thing in each)
    return np.array(right, bool), positives


def coco_ap(
    found: Sequence[Detections], annotated: Annotated, masks: bool = False
) -> dict[str, float]:
    """COCO's average precisions in percent, by pycocotools: of boxes, and `mask-` of masks.

    AP is the mean over the overlaps .50, .55, ..., .95; S, M and L are objects under 32 x 32, under
    96 x 96 and over. What there is no object for is left out.

    Args:
        found: one a picture, in the order of the pictures.
        masks: judge masks too; all detections and objects then have one.

    Raises:
        ClsaError: without pycocotools, which the extra `evaluation` brings.
    """
    values = _coco(found, annotated, "bbox")
    if masks:
        values |= {f"mask-{name}": v for name, v in _coco(found, annotated, "segm").items()}
    return values


def _coco(found: Sequence[Detections], annotated: Annotated, kind: str) -> dict[str, float]:
    purpose = "COCO average precision"
    coco = require("pycocotools.coco", "evaluation", purpose).COCO
    evaluation = require("pycocotools.cocoeval", "evaluation", purpose).COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        truth.dataset = _truth(found, annotated, kind)
        truth.createIndex()
        answers = [
            entry
            for place, each in enumerate(found)
            for entry in _entries(each, place + 1, annotated.classes, kind)
        ]
        if not answers:
            there = {"AP", "AP50", "AP75"} if truth.dataset["annotations"] else set()
            return dict.fromkeys(sorted(there), 0.0)
        judged = evaluation(truth, truth.loadRes(answers), kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    values = zip(COCO_NAMES, judged.stats[: len(COCO_NAMES)].tolist(), strict=True)
    return {name: 100 * value for name, value in values if value >= 0}


def _truth(found: Sequence[Detections], annotated: Annotated, kind: str) -> dict[str, Any]:
    """The set as pycocotools wants it; pictures and classes are numbered from 1."""
    entries: list[dict[str, Any]] = []
    for place, things in enumerate(annotated.things):
        for thing in things:
            x1, y1, x2, y2 = thing.box
            entry = {
                "id": len(entries) + 1, "image_id": place + 1, "category_id": thing.label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(thing.crowd),
                "area": (x2 - x1) * (y2 - y1) if thing.area is None else thing.area,
            }  # fmt: skip
            if kind == "segm":
                entry["segmentation"] = thing.segmentation
            entries.append(entry)
    pictures: list[dict[str, Any]] = [{"id": place + 1} for place in range(len(found))]
    for picture, each in zip(pictures, found, strict=True):
        if each.masks is not None:
            picture["height"], picture["width"] = each.masks.shape[1:]
    kinds = [{"id": k + 1, "name": name} for k, name in enumerate(annotated.classes)]
    return {"images": pictures, "annotations": entries, "categories": kinds}


def _entries(each: Detections, picture: int, classes: list[str], kind: str) -> list[dict[str, Any]]:
    entries = []
    for k, (box, score, label) in enumerate(
        zip(each.boxes.tolist(), each.scores.tolist(), each.labels.tolist(), strict=True)
    ):
        entry = {"image_id": picture, "category_id": label + 1, "score": score}
        if kind == "bbox":
            x1, y1, x2, y2 = box
            entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        else:
            assert each.masks is not None
            encode = require("pycocotools.mask", "evaluation", "COCO average precision").encode
            entry["segmentation"] = encode(np.asfortranarray(each.masks[k].astype(np.uint8)))
        entries.append(entry)
    return entries

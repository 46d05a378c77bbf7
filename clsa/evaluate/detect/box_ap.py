"""Average precision of detections: VOC's rule in NumPy, COCO's through pycocotools.

Both take boxes as edges (x1, y1, x2, y2), as in `clsa.pictures.annotations`. VOC's code counts
pixels: a box from pixel `xmin` to pixel `xmax`, both inside, is `xmax - xmin + 1` wide. In edges
that is x2 - x1, so the overlaps here equal VOC's.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from clsa.evaluate.classify.average_precision import Points, average_precision
from clsa.pictures.annotations import Thing
from clsa.system.extras import require

OVERLAPS = tuple(n / 100 for n in range(50, 100, 5))
COCO_NAMES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")


class Detections(NamedTuple):
    """Objects that a detector found in one picture, in any order.

    Attributes:
        boxes: edges in pixels of the picture.
        scores: confidence, larger is surer.
        labels: numbers of the classes.
        masks: one per object, as `pack_mask` makes them; None if only boxes are predicted.
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    masks: list[dict[str, Any]] | None = None


def overlaps(
    boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, "n m"]:
    """Intersection over union of each pair."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [(each[:, 2:] - each[:, :2]).prod(1) for each in (boxes, others)]
    union = areas[0][:, None] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def voc_matches(
    found: Sequence[Detections], things: Sequence[list[Thing]], label: int, least: float
) -> tuple[Bool[np.ndarray, " n"], int]:
    """Which detections of one class are right, the surest first, and the number of objects to find.

    VOC's rule: each detection is matched to the object of its class that it overlaps most. It is
    right if that overlap is at least `least` and no surer detection took the same object; other
    detections of that object are wrong. Difficult objects need not be found, and detections matched
    to them are left out. Detections with equal scores keep the order of the pictures.
    """
    truths = [[thing for thing in each if thing.label == label] for each in things]
    positives = sum(not thing.difficult for each in truths for thing in each)
    scores, pictures, targets, best = [], [], [], []
    for place, (each, truth) in enumerate(zip(found, truths, strict=True)):
        mine = each.labels == label
        count = int(mine.sum())
        scores.append(each.scores[mine])
        pictures.append(np.full(count, place))
        if truth:
            iou = overlaps(each.boxes[mine], np.array([thing.box for thing in truth], float))
            targets.append(iou.argmax(1))
            best.append(iou.max(1))
        else:
            targets.append(np.zeros(count, int))
            best.append(np.full(count, -1.0))
    order = np.argsort(-np.concatenate([*scores, np.zeros(0)]), kind="stable")
    picture, target, overlap = (
        np.concatenate([*parts, np.zeros(0)])[order] for parts in (pictures, targets, best)
    )
    taken: set[tuple[int, int]] = set()
    right = []
    for i, j, iou in zip(picture.astype(int), target.astype(int), overlap, strict=True):
        if iou < least:
            right.append(False)
        elif not truths[i][j].difficult:
            right.append((i, j) not in taken)
            taken.add((i, j))
    return np.array(right, bool), positives


def voc_ap(
    found: Sequence[Detections], things: Sequence[list[Thing]], num_classes: int
) -> dict[str, float]:
    """Mean average precision in percent, over the classes that have objects to find.

    Args:
        found: one entry per picture.
        things: objects of the same pictures.

    Returns:
        AP50 at an overlap of 0.5, AP75, and AP, the mean over overlaps of 0.5 to 0.95, all by the
        all-points rule. The names ending in -11pt hold the same by the 11-point rule, which
        detectron2's evaluator uses for all three on VOC 2007. NaN if there is nothing to find.
    """
    matches = {
        least: [voc_matches(found, things, label, least) for label in range(num_classes)]
        for least in OVERLAPS
    }

    def mean(least: float, points: Points) -> float:
        values = [average_precision(*match, points) for match in matches[least] if match[1]]
        return 100 * float(np.mean(values)) if values else float("nan")

    found_ap: dict[str, float] = {}
    kinds: tuple[tuple[Points, str], ...] = (("all", ""), ("11", "-11pt"))
    for points, ending in kinds:
        every = [mean(least, points) for least in OVERLAPS]
        found_ap[f"AP50{ending}"] = every[0]
        found_ap[f"AP75{ending}"] = every[OVERLAPS.index(0.75)]
        found_ap[f"AP{ending}"] = float(np.mean(every))
    return found_ap


def coco_ap(
    found: Sequence[Detections],
    things: Sequence[list[Thing]],
    num_classes: int,
    sizes: Sequence[tuple[int, int]],
    masks: bool = False,
) -> dict[str, float]:
    """COCO's average precision of boxes and optionally of masks, in percent, by pycocotools.

    Objects are small if their area is under 32^2 pixels, and large if it is over 96^2. The area is
    the one in COCO's file, or else that of the mask, or else that of the box. Difficult objects
    count as crowds: they need not be found.

    Args:
        found: one entry per picture.
        things: objects of the same pictures.
        sizes: height and width of each picture.
        masks: judge masks too.

    Returns:
        AP, AP50, AP75, AP_S, AP_M and AP_L of boxes; the names starting with `mask-` are those of
        masks. NaN if there is no object of that kind to find.
    """
    coco = require("pycocotools.coco", "evaluation", "COCO average precision")
    judge = require("pycocotools.cocoeval", "evaluation", "COCO average precision")
    pixels = require("pycocotools.mask", "evaluation", "COCO average precision")
    truth, truths = coco.COCO(), []
    for place, (each, size) in enumerate(zip(things, sizes, strict=True), 1):
        for thing in each:
            truth_of = _item(place, thing.label, thing.box) | {"id": len(truths) + 1}
            truth_of["iscrowd"] = int(thing.crowd or thing.difficult)
            truth_of["area"] = _area(thing.box) if thing.area is None else thing.area
            if masks or (thing.area is None and thing.segmentation):
                truth_of["segmentation"] = packed(thing, size)
                if thing.area is None and thing.segmentation:
                    truth_of["area"] = float(pixels.area(truth_of["segmentation"]))
            truths.append(truth_of)
    pictures = [
        {"id": place, "height": size[0], "width": size[1]} for place, size in enumerate(sizes, 1)
    ]
    kinds = [{"id": label + 1} for label in range(num_classes)]
    truth.dataset = {"images": pictures, "annotations": truths, "categories": kinds}
    values: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        for kind in ("bbox", "segm") if masks else ("bbox",):
            answers = _answers(found, kind, pixels)
            stats = np.full(6, -1.0)
            if answers and truths:
                run = judge.COCOeval(truth, _index(coco, truth, answers), kind)
                run.evaluate()
                run.accumulate()
                run.summarize()
                stats = run.stats[:6]
            elif truths:  # pycocotools refuses an empty list
                stats = _none_found([each["area"] for each in truths if not each["iscrowd"]])
            for name, value in zip(COCO_NAMES, stats, strict=True):
                prefix = "" if kind == "bbox" else "mask-"
                values[prefix + name] = 100 * float(value) if value >= 0 else float("nan")
    return values


def _none_found(areas: list[float]) -> Float64[np.ndarray, "6"]:
    """pycocotools' six values when nothing was detected: 0, or -1 where nothing is to be found."""
    every, small, large = (0.0, np.inf), 32.0**2, 96.0**2
    ranges = [every, every, every, (0.0, small), (small, large), (large, np.inf)]
    found = [any(low <= area <= high for area in areas) for low, high in ranges]
    return np.where(found, 0.0, -1.0)


def pack_mask(mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
    """A mask as pycocotools' packed run lengths, decoded to a string."""
    pixels = require("pycocotools.mask", "evaluation", "masks")
    runs = pixels.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}


def packed(thing: Thing, size: tuple[int, int]) -> Any:
    """An object's mask as pycocotools' packed run lengths; its box if it has no mask."""
    pixels = require("pycocotools.mask", "evaluation", "masks")
    outline: Any = thing.segmentation
    if outline is None:
        x1, y1, x2, y2 = thing.box
        outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    if isinstance(outline, list):
        return pixels.merge(pixels.frPyObjects(outline, *size))
    if isinstance(outline["counts"], list):
        return pixels.frPyObjects(outline, *outline["size"])
    return outline


def _answers(found: Sequence[Detections], kind: str, pixels: Any) -> list[dict[str, Any]]:
    answers = []
    for place, each in enumerate(found, 1):
        for row, (box, score) in enumerate(zip(each.boxes, each.scores, strict=True)):
            item = _item(place, int(each.labels[row]), box) | {"score": float(score)}
            if kind == "segm":
                item["segmentation"] = cast(list[Any], each.masks)[row]
                item["area"] = float(pixels.area(item["segmentation"]))
            else:
                item["area"] = _area(box)
            answers.append(item | {"id": len(answers) + 1, "iscrowd": 0})
    return answers


def _index(coco: Any, truth: Any, answers: list[dict[str, Any]]) -> Any:
    """Do what `COCO.loadRes` does with a list of detections, without its checks."""
    result = coco.COCO()
    result.dataset = {**truth.dataset, "annotations": answers}
    result.createIndex()
    return result


def _item(place: int, label: int, box: Sequence[float] | np.ndarray) -> dict[str, Any]:
    x1, y1, x2, y2 = map(float, box)
    return {"image_id": place, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}


def _area(box: Sequence[float] | np.ndarray) -> float:
    x1, y1, x2, y2 = map(float, box)
    return (x2 - x1) * (y2 - y1)

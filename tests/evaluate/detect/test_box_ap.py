"""Average precision: hand values, scikit-learn, pycocotools, and a slow copy of VOC's rule."""

import contextlib
import io

import numpy as np
import pytest

from clsa.evaluate.classify.average_precision import average_precision
from clsa.evaluate.detect.box_ap import (
    Detections,
    coco_ap,
    overlaps,
    pack_mask,
    voc_ap,
    voc_matches,
)
from clsa.evaluate.detect.scenes import run_lengths
from clsa.pictures.annotations import Thing

NAN = float("nan")


@pytest.mark.parametrize(
    ("right", "positives", "every", "eleven"),
    [
        ([1, 0, 1], 2, 0.833333, 0.848485),
        ([1, 1], 2, 1.0, 1.0),
        ([0, 0], 3, 0.0, 0.0),
        ([], 3, 0.0, 0.0),
        ([1], 2, 0.5, 6 / 11),  # recall 0.5 answers 0, .1, ..., .5
        ([0, 1], 1, 0.5, 0.5),
        ([1, 1, 1], 10, 0.3, 4 / 11),  # recall 0.3 is reached, though 3 * 0.1 > 0.3 in floats
        ([1, 0], 0, NAN, NAN),
    ],
)
def test_hand_values(right: list[int], positives: int, every: float, eleven: float) -> None:
    flags = np.array(right, bool)
    assert average_precision(flags, positives, "all") == pytest.approx(every, abs=1e-6, nan_ok=True)
    assert average_precision(flags, positives, "11") == pytest.approx(eleven, abs=1e-6, nan_ok=True)


def test_equals_scikit_learn_if_precision_only_falls() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for right in ([1, 1, 0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1]):
        theirs = metrics.average_precision_score(right, -np.arange(len(right)))
        ours = average_precision(np.array(right, bool), sum(right))
        assert ours == pytest.approx(theirs)
    right = np.array([0, 1, 1, 0, 1], bool)  # precision rises, so the envelope is higher
    assert average_precision(right, 3) > metrics.average_precision_score(right, -np.arange(5))


def test_overlap_counts_pixels_as_vocs_code_does() -> None:
    # in VOC's inclusive pixels 1..10 and 6..15: 5 x 10 shared of 150
    boxes, others = np.array([[0, 0, 10, 10.0]]), np.array([[5, 0, 15, 10.0], [10, 0, 20, 10.0]])
    assert overlaps(boxes, others).tolist() == [[pytest.approx(1 / 3), 0.0]]
    assert overlaps(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0]]


def detections(*rows: tuple[float, ...]) -> Detections:
    """Rows of x1, y1, x2, y2, score, label."""
    table = np.array(rows, float).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(int))


def test_each_object_is_found_once_and_difficult_ones_count_neither_way() -> None:
    plain, hard = Thing((0, 0, 10, 10), 0), Thing((20, 0, 30, 10), 0, difficult=True)
    found = detections(
        (20, 0, 30, 10, 0.95, 0),  # the difficult one: left out
        (0, 0, 10, 10, 0.9, 0),
        (0, 0, 10, 9, 0.8, 0),  # a second time: wrong
        (50, 50, 60, 60, 0.7, 0),
        (0, 0, 10, 10, 0.99, 1),  # another class
    )
    right, positives = voc_matches([found], [[plain, hard]], 0, 0.5)
    assert right.tolist() == [True, False, False] and positives == 1
    half = detections((0, 0, 10, 5, 0.9, 0))  # an overlap of exactly 0.5 is enough
    assert voc_matches([half], [[plain]], 0, 0.5)[0].tolist() == [True]


def test_a_detection_is_not_passed_on_to_the_next_best_object() -> None:
    things = [Thing((0, 0, 10, 10), 0), Thing((0, 0, 10, 8), 0)]
    found = detections((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 9.5, 0.8, 0))
    assert voc_matches([found], [things], 0, 0.5)[0].tolist() == [True, False]


def test_voc_averages_over_the_classes_with_objects() -> None:
    things = [[Thing((0, 0, 10, 10), 0)], [Thing((0, 0, 10, 10), 0), Thing((0, 0, 8, 8), 2)]]
    found = [
        detections((0, 0, 10, 10, 0.9, 0), (0, 0, 5, 5, 0.2, 1)),
        detections((40, 40, 50, 50, 0.8, 0), (0, 0, 10, 7, 0.7, 0)),
    ]
    values = voc_ap(found, things, 3)
    # class 0 ranks right, wrong, right; class 2 is never found; class 1 has nothing to find
    assert values["AP50"] == pytest.approx(100 * 0.833333 / 2, abs=1e-3)
    assert values["AP50-11pt"] == pytest.approx(100 * 0.848485 / 2, abs=1e-3)
    assert values["AP75"] == pytest.approx(100 * 0.5 / 2)
    # an overlap of 0.7 counts at .5, .55, .6, .65, .7
    assert values["AP"] == pytest.approx(100 * (0.833333 * 5 + 0.5 * 5) / 10 / 2, abs=1e-3)
    assert np.isnan(voc_ap([detections()], [[]], 3)["AP50"])


def random_case(seed: int) -> tuple[list[Detections], list[list[Thing]], list[tuple[int, int]]]:
    draw = np.random.default_rng(seed)
    found, things = [], []
    for _ in range(12):
        truth, rows, masks = [], [], []
        for _ in range(draw.integers(0, 5)):
            x, y = draw.integers(0, 60, 2)
            wide, high = draw.integers(5, 130, 2)
            label, mask = int(draw.integers(3)), np.zeros((200, 200), bool)
            mask[y : y + high, x : x + wide] = True
            mask[y : y + high // 3, x : x + wide // 3] = False
            crowd = bool(draw.random() < 0.1)
            box = (float(x), float(y), float(x + wide), float(y + high))
            truth.append(Thing(box, label, False, crowd, run_lengths(mask)))
            for _ in range(draw.integers(0, 3)):
                moved = np.array(truth[-1].box) + draw.integers(-6, 7, 4)
                rows.append((*np.clip(moved, 0, 200), draw.random(), label))
                masks.append(np.roll(mask, draw.integers(-5, 6), 1))
        each = detections(*rows)
        things.append(truth)
        found.append(each._replace(masks=[pack_mask(mask) for mask in masks]))
    return found, things, [(200, 200)] * 12


def test_coco_equals_pycocotools_on_its_own_format() -> None:
    coco = pytest.importorskip("pycocotools.coco")
    judge = pytest.importorskip("pycocotools.cocoeval")
    pixels = pytest.importorskip("pycocotools.mask")
    found, things, sizes = random_case(0)
    ours = coco_ap(found, things, 3, sizes, masks=True)
    truths, answers = [], []
    for number, (each, truth) in enumerate(zip(found, things, strict=True)):
        for thing in truth:
            x1, y1, x2, y2 = thing.box
            runs = pixels.frPyObjects(thing.segmentation, 200, 200)
            truths.append({"id": len(truths) + 1, "image_id": number, "category_id": thing.label,
                           "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(thing.crowd),
                           "area": int(pixels.area(runs)), "segmentation": runs})  # fmt: skip
        assert each.masks is not None
        for row, box in enumerate(each.boxes):
            x1, y1, x2, y2 = box.tolist()
            runs = each.masks[row]
            answers.append({"image_id": number, "category_id": int(each.labels[row]),
                            "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(each.scores[row]),
                            "segmentation": runs})  # fmt: skip
    for kind, prefix in (("bbox", ""), ("segm", "mask-")):
        with contextlib.redirect_stdout(io.StringIO()):
            truth_set = coco.COCO()
            pictures = [{"id": n, "height": 200, "width": 200} for n in range(12)]
            kinds = [{"id": n} for n in range(3)]
            truth_set.dataset = {"images": pictures, "annotations": truths, "categories": kinds}
            truth_set.createIndex()
            keys = ("image_id", "category_id", "score")
            keys += ("bbox",) if kind == "bbox" else ("segmentation",)
            sent = [{key: answer[key] for key in keys} for answer in answers]
            run = judge.COCOeval(truth_set, truth_set.loadRes(sent), kind)
            run.evaluate()
            run.accumulate()
            run.summarize()
        names = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
        for name, value in zip(names, run.stats[:6], strict=True):
            expected = 100 * value if value >= 0 else NAN
            assert ours[prefix + name] == pytest.approx(expected, nan_ok=True), (kind, name)
    assert 5 < ours["AP"] < 95 and 5 < ours["mask-AP"] < 95


def test_coco_of_perfect_and_of_no_detections() -> None:
    pytest.importorskip("pycocotools")
    things = [[Thing((0, 0, 20, 20), 0), Thing((0, 0, 60, 60), 1)], []]
    perfect = [detections((0, 0, 20, 20, 0.9, 0), (0, 0, 60, 60, 0.9, 1)), detections()]
    values = coco_ap(perfect, things, 2, [(100, 100)] * 2)
    assert values["AP"] == values["AP_S"] == values["AP_M"] == pytest.approx(100)
    assert np.isnan(values["AP_L"])
    assert coco_ap([detections()] * 2, things, 2, [(100, 100)] * 2)["AP"] == 0
    assert np.isnan(coco_ap([detections()] * 2, [[], []], 2, [(9, 9)] * 2)["AP"])


@pytest.mark.parametrize("difficult", [False, True])
def test_sizes_with_nothing_to_find_are_no_numbers_when_nothing_is_detected(
    difficult: bool,
) -> None:
    """As pycocotools judges one detection that finds nothing."""
    things = [[Thing((0.0, 0.0, 20.0, 20.0), 0), Thing((0.0, 0.0, 98.0, 99.0), 1, difficult)]]
    missed = [detections((50, 50, 51, 51, 0.5, 0))]
    ours, theirs = (coco_ap(found, things, 2, [(100, 100)]) for found in ([detections()], missed))
    np.testing.assert_equal(ours, theirs)
    assert ours["AP"] == ours["AP_S"] == 0 and np.isnan(ours["AP_M"])
    assert np.isnan(ours["AP_L"]) == difficult


def test_voc_equals_a_slow_copy_of_its_rule_on_many_detections() -> None:
    found, things, _ = random_case(4)
    for label in range(3):
        ranked = sorted(
            (-float(score), place, row)
            for place, each in enumerate(found)
            for row, score in enumerate(each.scores)
            if each.labels[row] == label
        )
        used, right = set(), []
        for _, place, row in ranked:
            box, best, at = found[place].boxes[row], -1.0, -1
            for number, thing in enumerate(things[place]):
                if thing.label != label:
                    continue
                # VOC's own arithmetic on inclusive pixels
                a, b = (np.add(each, [1, 1, 0, 0]) for each in (box, thing.box))
                wide = min(a[2], b[2]) - max(a[0], b[0]) + 1
                high = min(a[3], b[3]) - max(a[1], b[1]) + 1
                if wide > 0 and high > 0:
                    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
                    iou = wide * high / (sum(areas) - wide * high)
                    if iou > best:
                        best, at = iou, number
            good = best >= 0.5 and (place, at) not in used
            right.append(good)
            if good:
                used.add((place, at))
        assert voc_matches(found, things, label, 0.5)[0].tolist() == right

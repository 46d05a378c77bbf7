import json
from pathlib import Path

import numpy as np
import pytest

from clsa.annotations import Annotated, Thing
from clsa.evaluate.box_ap import Detections, coco_ap, overlaps, voc_ap
from clsa.sources import Folder


def found(*entries: tuple[float, tuple[float, float, float, float], int]) -> Detections:
    """(score, box, label) of one picture."""
    boxes = np.array([box for _, box, _ in entries], float).reshape(-1, 4)
    scores = np.array([score for score, _, _ in entries], float)
    return Detections(boxes, scores, np.array([label for _, _, label in entries], np.int64))


def annotated(things: list[list[Thing]], classes: int = 1) -> Annotated:
    names = [f"{i}.jpg" for i in range(len(things))]
    source = Folder("/", names, np.full(len(names), -1, np.int64), [])
    return Annotated(source, [f"c{k}" for k in range(classes)], things, list(range(len(things))))


BOX, FAR = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)


def test_overlap_counts_pixels() -> None:
    """VOC's boxes 1..10 and 6..15 share 5 of 15 columns; as edges (0, 10) and (5, 15)."""
    pair = overlaps(np.array([BOX]), np.array([(5.0, 0.0, 15.0, 10.0), FAR, BOX]))
    assert pair.tolist() == [[pytest.approx(1 / 3), 0.0, 1.0]]


def test_the_hand_computed_ranking() -> None:
    """Right, wrong, right with two to find: 0.8333 of all points, 0.8485 of eleven."""
    things = [[Thing(BOX, 0), Thing(FAR, 0)]]
    answers = found((0.9, BOX, 0), (0.8, (20, 20, 30, 30), 0), (0.7, FAR, 0))
    values = voc_ap([answers], things, 1)
    assert values["AP50"] == pytest.approx(83.3333, abs=1e-4)
    assert values["AP50-11pt"] == pytest.approx(84.8485, abs=1e-4)
    assert values["AP75"] == values["AP"] == values["AP50"]


def test_the_second_to_find_an_object_is_wrong() -> None:
    things = [[Thing(BOX, 0)]]
    twice = voc_ap([found((0.9, BOX, 0), (0.8, BOX, 0))], things, 1)
    assert twice["AP50"] == 100.0
    shifted = found((0.9, (0, 0, 9, 10), 0), (0.8, BOX, 0))  # the surer one has it
    assert voc_ap([shifted], things, 1)["AP50"] == 100.0
    assert voc_ap([shifted], things, 1)["AP"] < 100.0


def test_difficult_objects_count_for_nothing() -> None:
    things = [[Thing(BOX, 0, difficult=True), Thing(FAR, 0)]]
    answers = found((0.9, BOX, 0), (0.8, FAR, 0))
    assert voc_ap([answers], things, 1)["AP50"] == 100.0
    plain = [[Thing(BOX, 0), Thing(FAR, 0)]]
    assert voc_ap([found((0.9, BOX, 0))], plain, 1)["AP50"] == 50.0
    assert voc_ap([found((0.9, BOX, 0), (0.8, BOX, 0), (0.7, FAR, 0))], things, 1)["AP50"] == 100.0


def test_half_overlap_is_not_enough() -> None:
    """More than .5, as in the devkit's Python and in detectron2."""
    assert voc_ap([found((0.9, (0, 0, 5, 10), 0))], [[Thing(BOX, 0)]], 1)["AP50"] == 0.0
    assert voc_ap([found((0.9, (0, 0, 5.1, 10), 0))], [[Thing(BOX, 0)]], 1)["AP50"] == 100.0


def test_classes_are_averaged_and_empty_ones_left_out() -> None:
    things = [[Thing(BOX, 0)], [Thing(FAR, 2)]]
    answers = [found((0.9, BOX, 0), (0.8, BOX, 1)), found()]
    assert voc_ap(answers, things, 4)["AP50"] == 50.0
    assert voc_ap([found(), found()], things, 4)["AP50"] == 0.0
    assert voc_ap([found((0.9, BOX, 2)), found()], [[], []], 4)["AP"] == 0.0


def random_case(seed: int) -> tuple[list[Detections], Annotated]:
    """Noisy detections of random squares, some missed, some invented; three sizes, crowds."""
    drawn = np.random.default_rng(seed)
    things, answers = [], []
    for _ in range(12):
        here, entries = [], []
        for _ in range(drawn.integers(0, 5)):
            side = drawn.choice([12, 50, 120])
            x, y = drawn.integers(0, 60, 2)
            label = int(drawn.integers(0, 3))
            box = (float(x), float(y), float(x + side), float(y + side * 0.8))
            here.append(Thing(box, label, crowd=bool(drawn.random() < 0.1)))
            if drawn.random() < 0.8:
                shaken = tuple((np.array(box) + drawn.normal(0, side * 0.06, 4)).tolist())
                entries.append((float(drawn.random()), shaken, label))
            if drawn.random() < 0.4:
                entries.append((float(drawn.random()) / 2, (5, 5, 40, 30), int(drawn.integers(3))))
        things.append(here)
        answers.append(found(*entries))
    return answers, annotated(things, 3)


def test_coco_equals_pycocotools_on_files(tmp_path: Path) -> None:
    """The same case written as COCO's own files and judged by pycocotools alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    answers, truth = random_case(3)
    entries, results = [], []
    for i, things in enumerate(truth.things):
        for thing in things:
            x1, y1, x2, y2 = thing.box
            box = [x1, y1, x2 - x1, y2 - y1]
            entries.append(
                {"id": len(entries) + 1, "image_id": i, "category_id": 10 + thing.label,
                 "bbox": box, "area": box[2] * box[3], "iscrowd": int(thing.crowd)}
            )  # fmt: skip
        each = answers[i]
        for box, score, label in zip(each.boxes, each.scores, each.labels, strict=True):
            x1, y1, x2, y2 = box.tolist()
            results.append(
                {"image_id": i, "category_id": 10 + int(label), "score": float(score),
                 "bbox": [x1, y1, x2 - x1, y2 - y1]}
            )  # fmt: skip
    whole = {
        "images": [{"id": i} for i in range(12)],
        "annotations": entries,
        "categories": [{"id": 10 + k, "name": str(k)} for k in range(3)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(whole))
    (tmp_path / "found.json").write_text(json.dumps(results))
    coco = COCO(str(tmp_path / "truth.json"))
    judged = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "bbox")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    values = coco_ap(answers, truth)
    wanted = dict(zip(("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"), judged.stats, strict=False))
    assert values == {name: pytest.approx(100 * value) for name, value in wanted.items()}
    assert 5 < values["AP"] < values["AP50"] < 100


def test_voc_and_coco_agree_where_their_rules_do() -> None:
    """Perfect, empty and disjoint answers; elsewhere COCO samples precision at 101 recalls."""
    things = [[Thing(BOX, 0), Thing(FAR, 1)], [Thing(FAR, 0)]]
    truth = annotated(things, 2)
    perfect = [found((0.9, BOX, 0), (0.8, FAR, 1)), found((0.7, FAR, 0))]
    assert voc_ap(perfect, things, 2)["AP"] == 100.0
    assert coco_ap(perfect, truth)["AP"] == pytest.approx(100)
    assert coco_ap([found(), found()], truth) == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    answers, truth = random_case(5)
    bare = [[thing for thing in each if not thing.crowd] for each in truth.things]
    voc = voc_ap(answers, bare, 3)["AP50"]
    coco = coco_ap(answers, truth._replace(things=bare))["AP50"]
    assert voc == pytest.approx(coco, abs=1.5)


def test_masks_are_judged_by_their_pixels() -> None:
    mask = np.zeros((64, 64), bool)
    mask[:10, :10] = True
    outline = [[0.0, 0.0, 10.0, 0.0, 10.0, 10.0, 0.0, 10.0]]
    truth = annotated([[Thing(BOX, 0, segmentation=outline)], []])
    box = np.array([BOX])
    right = Detections(box, np.array([0.9]), np.array([0]), mask[None])
    none = Detections(
        np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), np.zeros((0, 64, 64), bool)
    )
    values = coco_ap([right, none], truth, masks=True)
    for name in ("AP", "mask-AP", "mask-AP_S"):
        assert values[name] == pytest.approx(100)
    half = mask.copy()
    half[5:] = False
    wrong = coco_ap([right._replace(masks=half[None]), none], truth, masks=True)
    assert wrong["AP"] == pytest.approx(100) and wrong["mask-AP"] == pytest.approx(10)  # .5 only

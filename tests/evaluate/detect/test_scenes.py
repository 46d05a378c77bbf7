"""Scenes: cutting out drawings, visible parts, repeatability, and files that others can read."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clsa.cli.main import main
from clsa.evaluate.detect.scenes import (
    CLASSES,
    Drawing,
    Draws,
    box_of,
    compose,
    cut_out,
    drawings,
    run_lengths,
    scene_of,
    scenes,
    texture,
)
from clsa.options.commands import ScenesOptions
from clsa.pictures.annotations import read_coco, read_voc
from clsa.system.errors import ClsaError


@pytest.fixture(scope="module")
def kinds() -> tuple[list[Drawing], ...]:
    return drawings("val")[:3]


def test_white_inside_a_closed_outline_belongs_to_the_drawing() -> None:
    pixels = np.full((7, 8, 3), 255, np.uint8)
    pixels[1:6, 2:7] = 0
    pixels[2:5, 3:6] = 250  # inside the ring
    mask = cut_out(pixels)
    assert mask.sum() == 25 and box_of(mask) == (2, 1, 7, 6)
    pixels[1, 4] = 255  # the ring opens, so its inside becomes background
    assert cut_out(pixels).sum() == 25 - 1 - 9
    assert not cut_out(np.full((4, 4, 3), 255, np.uint8)).any()
    assert cut_out(np.zeros((4, 4, 3), np.uint8)).all()


def test_run_lengths_are_those_of_coco() -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    for mask in (np.eye(4, 5, dtype=bool), ~np.eye(3, dtype=bool), np.zeros((2, 2), bool)):
        runs = run_lengths(mask)
        packed = coco_mask.frPyObjects(runs, *runs["size"])
        assert np.array_equal(coco_mask.decode(packed), mask)
    assert run_lengths(np.array([[0, 1], [1, 1]], bool)) == {"size": [2, 2], "counts": [1, 3]}
    assert run_lengths(np.array([[1, 0], [0, 0]], bool)) == {"size": [2, 2], "counts": [0, 1, 3]}


def test_only_what_stays_visible_counts() -> None:
    square = Drawing(np.full((40, 40, 3), 7, np.uint8), np.ones((40, 40), bool), 0)
    partly = 0
    for number in range(30):
        scene, placed = compose([[square]], Draws(3, 0, number), 128, None)
        seen = np.zeros((128, 128), int)
        for thing in placed:
            seen += thing.mask
            x1, y1, x2, y2 = thing.box
            assert thing.mask[y1:y2, x1:x2].sum() == thing.mask.sum() > 0
            assert thing.mask[y1].any() and thing.mask[:, x2 - 1].any()
            assert 0 <= thing.hidden < 1
            partly += thing.hidden > 0
        assert seen.max() == 1  # no pixel shows two objects
        assert (scene[seen == 1] == 7).all()
    assert partly > 5


def test_a_scene_is_a_function_of_seed_split_and_number(kinds: tuple[list[Drawing], ...]) -> None:
    options = ScenesOptions(seed=5, size=64)
    first, again = (scene_of(kinds, options, "val", 7, None) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert [thing.box for thing in first[1]] == [thing.box for thing in again[1]]
    for split, number, seed in (("val", 8, 5), ("train", 7, 5), ("val", 7, 6)):
        other = scene_of(kinds, ScenesOptions(seed=seed, size=64), split, number, None)
        assert not np.array_equal(first[0], other[0])


def test_every_class_has_drawings_for_both_splits() -> None:
    for split in ("train", "val"):
        counts = [len(kind) for kind in drawings(split)]
        assert min(counts) >= 10, dict(zip(CLASSES, counts, strict=True))


def test_draws_suffice_for_every_kind_of_ground() -> None:
    spread = [texture(Draws(0, 0, number), 32).std() for number in range(20)]
    assert min(spread) > 2


def test_coco_layout_is_read_by_this_package_and_by_pycocotools(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    written = scenes(ScenesOptions(out=tmp_path / "s", train=6, test=4, classes=4, seed=1))
    train, test = (read_coco(tmp_path / "s", split) for split in ("train", "val"))
    assert (len(train.source), len(test.source)) == (6, 4) and train.classes == CLASSES[:4]
    assert train.source.read(0).shape == (128, 128, 3)
    count = sum(map(len, train.things + test.things))
    assert written.scenes == 10 and count == written.things - written.hidden > 0
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = coco.COCO(str(tmp_path / "s" / "annotations" / "instances_train.json"))
    for number in theirs.getAnnIds():
        item = theirs.loadAnns([number])[0]
        mask = theirs.annToMask(item).astype(bool)
        x, y, wide, high = item["bbox"]
        assert box_of(mask) == (x, y, x + wide, y + high) and mask.sum() == item["area"]


def test_voc_layout_is_read_back(tmp_path: Path) -> None:
    main(["scenes", "--out", str(tmp_path / "s"), "--layout", "voc", "--train", "5",
          "--test", "30", "--size", "64", "--seed", "2"])  # fmt: skip
    root = tmp_path / "s" / "VOCdevkit"
    sizes = {}
    for split in ("train", "val", "trainval", "test"):
        found = read_voc(root, [("2007", split)], CLASSES[:8])
        sizes[split] = len(found.source)
    assert sizes == {"train": 3, "val": 2, "trainval": 5, "test": 30}
    things = [thing for things in found.things for thing in things]
    assert any(thing.difficult for thing in things) and not all(t.difficult for t in things)
    assert all(0 <= t.box[0] < t.box[2] <= 64 and 0 <= t.box[1] < t.box[3] <= 64 for t in things)


def test_photographs_can_be_the_ground(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (90, 60), (10, 200, 30)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.png").write_bytes(b"no picture")
    photos = str(tmp_path / "photos")
    scenes(ScenesOptions(out=tmp_path / "s", train=2, test=1, size=64, backgrounds=photos))
    found = read_coco(tmp_path / "s", "train")
    runs = json.loads((tmp_path / "s" / "annotations" / "instances_train.json").read_text())
    assert runs["images"][0]["width"] == 64
    corner = found.source.read(0).reshape(-1, 3).astype(int)
    near = np.abs(corner - [10, 200, 30]).max(1) < 20
    assert near.mean() > 0.3
    (tmp_path / "photos" / "a.png").unlink()
    with pytest.raises(ClsaError, match="cannot be read"):
        scenes(ScenesOptions(out=tmp_path / "t", train=1, test=1, backgrounds=photos))


def test_a_folder_that_is_not_empty_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").write_text("mine")
    assert main(["scenes", "--out", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err

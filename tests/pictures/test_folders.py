"""What is taken of a folder: splits, classes, links, system folders; and the words that say so."""

import os
from pathlib import Path

import numpy as np
import pytest

from clsa.options.run import DataOptions
from clsa.pictures.folders import describe, halves, tell
from clsa.pictures.opening import open_source, open_val, val_of
from clsa.pictures.sources import Pictures, Source
from tests.support.pictures import encoded, photograph

PICTURE = encoded(photograph(0, 9, 12))


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURE)
    return root


def train_of(root: Path) -> Source:
    return open_source(str(root), "train", DataOptions())


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "test"),
        ("Train", "Valid"),
        ("training", "validation"),
        ("TRAIN", "dev"),
        ("seg_train", "seg_test"),
    ],
)
def test_folders_called_like_splits_are_splits(tmp_path: Path, train: str, val: str) -> None:
    tree(tmp_path, f"{train}/cat/1.png", f"{train}/dog/2.png", f"{val}/dog/3.png", "extra/x.png")
    source = train_of(tmp_path)
    assert source.classes == ["cat", "dog"] and source.ids == ["cat/1.png", "dog/2.png"]
    options = DataOptions(data=str(tmp_path))
    assert val_of(options) == str(tmp_path)
    held = open_val(options, source.classes)
    assert held is not None and held.ids == ["dog/3.png"] and held.labels.tolist() == [1]
    assert source.taken[0] == f"from {train}/; {val}/ is to evaluate on; not read: extra/"
    assert held.taken[0] == f"from {val}/; {train}/ is to learn from; not read: extra/"


def test_val_is_preferred_to_test_and_a_split_needs_both(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.png", "test/a/1.png", "val/a/1.png")
    found = halves(str(tmp_path))
    assert found is not None and found == ("train", "val", ["test"])
    assert halves(str(tree(tmp_path / "b", "train/a/1.png", "tests/a/1.png"))) is None
    assert halves(str(tree(tmp_path / "c", "val/a/1.png", "test/a/1.png"))) is None


def test_val_pictures_of_one_class_or_of_unknown_classes(tmp_path: Path) -> None:
    tree(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/dog/1.png")
    options = DataOptions(data=str(tmp_path))
    held = open_val(options, ["cat", "dog"])
    assert held is not None and held.labels.tolist() == [1] and held.classes == ["cat", "dog"]
    tree(tmp_path, "val/emu/1.png", "val/emu/2.png")
    held = open_val(options, ["cat", "dog"])
    assert held is not None and held.labels.tolist() == [1, -1, -1]
    assert held.taken[-1].startswith("not judged, 2 pictures of classes that training")
    assert held.taken[-1].endswith("lack: emu")
    tree(tmp_path / "plain", "train/1.png", "val/dog/1.png")
    held = open_val(DataOptions(data=str(tmp_path / "plain")), [])
    assert held is not None and held.classes == [] and held.labels.tolist() == [-1]


def test_classes_one_level_deeper_are_found(tmp_path: Path) -> None:
    tree(tmp_path, "images/all/cat/1.png", "images/all/dog/deep/2.png")
    source = train_of(tmp_path)
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 1]
    assert source.ids == ["images/all/cat/1.png", "images/all/dog/deep/2.png"]
    assert source.taken == (f"classes are the folders of images{os.sep}all/",)
    tree(tmp_path, "images/loose.png")  # now images/ holds pictures itself
    assert train_of(tmp_path).classes == []


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    tree(tmp_path / "set", "a/1.png", "b/1.png")
    tree(tmp_path / "far", "1.png", "2.png")
    os.symlink(tmp_path / "far", tmp_path / "set" / "c")
    os.symlink(tmp_path / "far", tmp_path / "set" / "d")
    os.symlink(tmp_path / "set", tmp_path / "far" / "back")
    os.symlink(tmp_path, tmp_path / "set" / "a" / "up")
    source = train_of(tmp_path / "set")
    assert source.ids == ["a/1.png", "b/1.png", "c/1.png", "c/2.png"]
    assert source.classes == ["a", "b", "c"]
    assert "links followed: c" in source.taken
    passed = next(line for line in source.taken if "passed over" in line)
    assert passed.endswith("a/up, d, c/back") or passed.endswith("d, a/up, c/back")


def test_system_folders_are_no_classes(tmp_path: Path) -> None:
    names = ["@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"]
    tree(tmp_path, "cat/1.png", "dog/1.png", "dog/@eaDir/1.png", *(f"{n}/1.png" for n in names))
    source = train_of(tmp_path)
    assert source.classes == ["cat", "dog"] and len(source) == 2
    told = next(line for line in source.taken if "system" in line)
    assert all(name in told for name in [*names, "dog/@eaDir"])


def test_what_was_taken_is_told_in_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path, "cat/1.png", "cat/2.JPG", "dog/1.jpg", "loose.png", "cat/.hidden.png")
    for name in ("a.heic", "b.HEIC", "c.mp4", "README"):
        (tmp_path / name).write_bytes(b"x")
    tell(train_of(tmp_path), "pictures")
    assert capsys.readouterr().err.splitlines() == [
        "pictures: 4 pictures (png 2, jpg 2), 2 classes: cat 2, dog 1; 1 without a class",
        "pictures: left out, no pictures by their endings: .heic 2, no ending 1, .mp4 1",
        "pictures: left out, hidden files and folders: 1",
        "pictures: HEIC pictures are not read: convert them to JPEG, for example",
    ]


def test_many_classes_and_sets_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    images = np.zeros((20, 4, 4, 3), np.uint8)
    labels = np.array([*range(9), *[3] * 11])
    source = Pictures(images, labels, [f"c{k}" for k in range(9)])
    assert describe(source) == [
        "20 pictures, 9 classes: c3 12, c0 1, c1 1, c2 1, c4 1, c5 1, 3 more (3)"
    ]
    assert describe(Pictures(images, np.full(20, -1), [])) == ["20 pictures, no classes"]

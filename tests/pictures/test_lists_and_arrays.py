"""Lists and array files as other programs write them: marks, tables, names, number types."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clsa.options.run import DataOptions
from clsa.pictures.lists import class_order, read_list
from clsa.pictures.opening import open_source, open_val, val_of
from clsa.pictures.sources import Source
from clsa.system.errors import Exit
from tests.support.pictures import photograph
from tests.support.refusals import refusal


def listed(path: Path, text: str, encoding: str = "utf-8") -> list[tuple[str, str]]:
    path.write_bytes(text.encode(encoding))
    return list(zip(*read_list(path), strict=True))


def opened(path: Path, **arrays: np.ndarray) -> Source:
    np.savez(path, allow_pickle=False, **arrays)
    return open_source(str(path), "train", DataOptions())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_first_path(tmp_path: Path, encoding: str) -> None:
    text = "é.png\ta\r\nb.png\tb\r\n"
    assert listed(tmp_path / "list.txt", text, encoding) == [("é.png", "a"), ("b.png", "b")]


@pytest.mark.parametrize(
    ("line", "pair"),
    [
        ("a.png,cat", ("a.png", "cat")),
        ("a.png ; cat", ("a.png", "cat")),
        ("a.png golden retriever", ("a.png", "golden retriever")),
        ("my dog.JPG\tgolden retriever", ("my dog.JPG", "golden retriever")),
        ("my dog.jpeg golden retriever", ("my dog.jpeg", "golden retriever")),
        ("a, b.png", ("a, b.png", "")),
        ("a.png b.png", ("a.png b.png", "")),
        ("img_0001 7", ("img_0001", "7")),
        ('"a.png","cat"', ("a.png", "cat")),
    ],
)
def test_lines_of_a_list(tmp_path: Path, line: str, pair: tuple[str, str]) -> None:
    assert listed(tmp_path / "list.txt", line) == [pair]


def test_tables_with_a_first_line_of_names(tmp_path: Path) -> None:
    table = 'id,Label,File_Name\n1,"cat, big",in/a.png\n2,dog,"b,c.png"\n'
    expected = [("in/a.png", "cat, big"), ("b,c.png", "dog")]
    assert listed(tmp_path / "set.csv", table) == expected
    assert listed(tmp_path / "set.tsv", "image\tclass\na.png\tx y\n") == [("a.png", "x y")]
    assert listed(tmp_path / "set.csv", "filename\na.png\n") == [("a.png", "")]
    assert listed(tmp_path / "set.csv", "a.png,cat\nb.png,dog\n")[1] == ("b.png", "dog")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a.png,cat,3\n", "3 columns and no first line that names them"),
        (
            "path,label\na.png,cat\nb.png,cat,big\n",
            "line 3 - has 3 columns, the first line names 2",
        ),
    ],
)
def test_tables_that_cannot_be_understood_are_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "set.csv").write_text(text)
    told, code = refusal(lambda: open_source(str(tmp_path / "set.csv"), "train", DataOptions()))
    assert why in told and code == Exit.USAGE


def test_equal_numbers_have_one_order_whatever_the_hash_seed(tmp_path: Path) -> None:
    assert class_order({"1", "01", "001", "10", "9", "-1"}) == ["001", "01", "1", "9", "10"]
    (tmp_path / "list.txt").write_text("".join(f"{k}.png {'0' * k}1\n" for k in range(6)))
    code = (
        "import sys; from clsa.pictures.opening import open_source;"
        "from clsa.options.run import DataOptions;"
        "print(open_source(sys.argv[1], 'train', DataOptions()).classes)"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "list.txt")],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3", "4")
    }
    assert told == {f"{['000001', '00001', '0001', '001', '01', '1']}\n"}


IMAGES = np.stack([photograph(i, 8, 10) for i in range(4)])
NUMBERS = np.array([[5], [2], [-1], [5]])


@pytest.mark.parametrize(
    ("images", "labels"),
    [("x_train", "y_train"), ("train_images", "train_labels"), ("data", "labels"), ("x", "y")],
)
def test_arrays_of_other_names(tmp_path: Path, images: str, labels: str) -> None:
    source = opened(tmp_path / "set.npz", **{images: IMAGES, labels: NUMBERS})
    assert source.classes == ["2", "5"] and source.labels.tolist() == [1, 0, -1, 1]
    np.testing.assert_array_equal(source.read(3), IMAGES[3])


def test_files_with_both_splits_are_judged_on_the_second(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    halves = {"x_train": IMAGES, "y_train": NUMBERS, "x_test": IMAGES[:2], "y_test": NUMBERS[:2]}
    options = DataOptions(data=str(path))
    source = opened(path, **halves)
    assert len(source) == 4 and val_of(options) == str(path)
    val = open_val(options, source.classes)
    assert val is not None and len(val) == 2 and val.labels.tolist() == [1, 0]
    opened(path, x_train=IMAGES)
    assert val_of(options) is None and open_val(options, []) is None


def test_numbers_of_other_types(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.testing.assert_array_equal(opened(path, images=IMAGES > 99).read(1), (IMAGES[1] > 99) * 255)
    np.testing.assert_array_equal(opened(path, images=IMAGES / 255).read(2), IMAGES[2])
    half = np.full((1, 2, 2), 0.5, np.float32)  # 127.5 rounds to the even 128
    assert opened(path, images=half).read(0)[0, 0].tolist() == [128, 128, 128]
    told, code = refusal(lambda: opened(path, images=IMAGES.astype(np.float32)))
    assert "floats from 0 to 1" in told and "from 0 to" in told and code == Exit.USAGE
    np.save(tmp_path / "set.npy", IMAGES)
    source = open_source(str(tmp_path / "set.npy"), "train", DataOptions())
    assert len(source) == 4 and source.classes == []
    np.testing.assert_array_equal(source.read(0), IMAGES[0])

"""Reading objects from VOC and COCO folders: conventions, and errors for damaged files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clsa.pictures.annotations import VOC_CLASSES, Thing, read_coco, read_voc
from clsa.system.errors import ClsaError, Exit
from tests.support.pictures import encoded, photograph, voc_folder

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>
</part></object>"""


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(path)


def voc(folder: Path, split: str, pictures: dict[str, list[tuple[Any, ...]]]) -> Path:
    """Write a VOC folder; objects are (name, difficult, x1, y1, x2, y2)."""
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join([*pictures, ""]))
    keys = ("name", "difficult", "x1", "y1", "x2", "y2")
    for stem, objects in pictures.items():
        picture(folder / "JPEGImages" / f"{stem}.jpg")
        inner = "".join(OBJECT.format(**dict(zip(keys, item, strict=True))) for item in objects)
        text = f"<annotation><filename>{stem}.jpg</filename>{inner}</annotation>"
        (folder / "Annotations" / f"{stem}.xml").write_text(text)
    return folder


def coco(root: Path, split: str, content: dict[str, Any], pictures: str) -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    for image in content["images"]:
        picture(root / pictures / image["file_name"])
    return root


CONTENT: dict[str, Any] = {
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
    "images": [{"id": 9, "file_name": "b.png"}, {"id": 4, "file_name": "a.png"}],
    "annotations": [
        {"image_id": 9, "category_id": 90, "bbox": [1, 2, 3.5, 4], "iscrowd": 0,
         "segmentation": [[1, 2, 4, 2, 4, 6]]},
        {"image_id": 9, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1,
         "segmentation": {"size": [20, 30], "counts": [0, 600]}},
        {"image_id": 9, "category_id": 3, "bbox": [7, 7, 0, 5]},
    ],
}  # fmt: skip


def test_voc_pixels_become_edges_and_flags_stay(tmp_path: Path) -> None:
    objects = [("car", 0, 1, 1, 30, 20), ("dog", 1, 5, 6, 5, 6), ("cat", 0, 9, 9, 8, 12)]
    voc(tmp_path / "VOC2007", "trainval", {"000005": objects, "000007": []})
    found = read_voc(tmp_path, [("2007", "trainval")])
    assert found.classes == VOC_CLASSES and len(found.classes) == 20
    car, dog = VOC_CLASSES.index("car"), VOC_CLASSES.index("dog")
    assert found.things[0] == [Thing((0, 0, 30, 20), car), Thing((4, 5, 5, 6), dog, True)]
    assert found.things[1] == [] and found.dropped == 1
    assert found.image_ids == ["000005", "000007"]
    assert list(found.source.ids) == [f"VOC2007/JPEGImages/{n}.jpg" for n in ("000005", "000007")]
    assert found.source.read(0).shape == (20, 30, 3) and found.source.labels.tolist() == [-1, -1]
    assert found.subset([1]).image_ids == ["000007"] and len(found.subset([1]).source) == 1


def test_voc_years_follow_one_another_and_one_year_may_be_given_alone(tmp_path: Path) -> None:
    voc(tmp_path / "VOC2007", "trainval", {"000001": [("cow", 0, 1, 1, 2, 2)]})
    voc(tmp_path / "VOC2012", "trainval", {"2008_000001": [("sofa", 0, 1.6, 1, 2, 2)]})
    both = read_voc(tmp_path, [("2007", "trainval"), ("2012", "trainval")])
    assert both.image_ids == ["000001", "2008_000001"]
    assert both.things[1][0].box == pytest.approx((0.6, 0, 2, 2))
    alone = read_voc(tmp_path / "VOC2012", [("2012", "trainval")])
    assert alone.things == both.things[1:] and alone.source.read(0).shape == (20, 30, 3)
    with pytest.raises(ClsaError, match="the folder of one year"):
        read_voc(tmp_path / "VOC2012", [("2007", "trainval"), ("2012", "trainval")])


def test_voc_with_other_classes(tmp_path: Path) -> None:
    folder = voc(tmp_path, "train", {"1": [("zebra", 0, 1, 1, 2, 2), ("ant", 0, 1, 1, 2, 2)]})
    assert read_voc(folder, [("2007", "train")]).classes == ["ant", "zebra"]
    assert read_voc(folder, [("2007", "train")], ["zebra", "ant", "b"]).things[0][1].label == 1
    with pytest.raises(ClsaError, match="unknown class zebra - did you mean zebras") as error:
        read_voc(folder, [("2007", "train")], ["ant", "zebras"])
    assert error.value.code == Exit.BAD_DATA


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<annotation><object>", "damaged"),
        ("<annotation><object><name>car</name></object></annotation>", "without name or bndbox"),
        (OBJECT.format(name="car", difficult=0, x1="nan", y1=1, x2=3, y2=3), "not a finite number"),
        (OBJECT.format(name="car", difficult="x", x1=1, y1=1, x2=3, y2=3), "damaged"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "not a VOC annotation file"),
    ],
)
def test_damaged_xml_is_named(tmp_path: Path, text: str, why: str) -> None:
    voc(tmp_path, "train", {"1": []})
    if text.startswith("<object"):
        text = f"<annotation>{text}</annotation>"
    (tmp_path / "Annotations" / "1.xml").write_text(text)
    with pytest.raises(ClsaError, match=why) as error:
        read_voc(tmp_path, [("2007", "train")])
    assert error.value.code == Exit.BAD_DATA and "1.xml" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_voc_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ClsaError, match="VOC2007 - holds no JPEGImages"):
        read_voc(tmp_path)
    voc(tmp_path, "train", {"1": [], "2": []})
    with pytest.raises(ClsaError, match=r"test.txt - no such split - use one of train"):
        read_voc(tmp_path, [("2007", "test")])
    (tmp_path / "JPEGImages" / "2.jpg").unlink()
    with pytest.raises(ClsaError, match=r"2.jpg - a listed picture is missing") as error:
        read_voc(tmp_path, [("2007", "train")])
    assert error.value.code == Exit.NO_INPUT
    (tmp_path / "Annotations" / "2.xml").unlink()
    with pytest.raises(ClsaError, match=r"2.xml - No such file"):
        read_voc(tmp_path, [("2007", "train")])
    for text, why in (("", "no pictures are listed"), ("../1", "is not a picture name")):
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text(text)
        with pytest.raises(ClsaError, match=why):
            read_voc(tmp_path, [("2007", "train")])


@pytest.mark.parametrize("pictures", ["train2017", "images/train2017", "train", "images", "."])
def test_coco_is_read_wherever_its_pictures_are(tmp_path: Path, pictures: str) -> None:
    found = read_coco(coco(tmp_path, "train2017", CONTENT, pictures), "train")
    assert found.classes == ["car", "toothbrush"]  # by ascending id
    assert found.image_ids == [4, 9] and found.things[0] == [] and found.dropped == 1
    outline, runs = found.things[1]
    assert outline == Thing((1, 2, 4.5, 6), 1, False, False, [[1, 2, 4, 2, 4, 6]])
    assert runs.crowd and runs.segmentation == {"size": [20, 30], "counts": [0, 600]}
    assert found.source.read(1).shape == (20, 30, 3)


def test_coco_takes_the_class_order_of_another_split(tmp_path: Path) -> None:
    root = coco(tmp_path, "val", CONTENT, "val")
    assert read_coco(root, "val", ["toothbrush", "x", "car"]).things[1][0].label == 0
    with pytest.raises(ClsaError, match="unknown class car"):
        read_coco(root, "val", ["toothbrush"])


def broken(**changes: Any) -> dict[str, Any]:
    return {**CONTENT, **changes}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"images": []},
        broken(annotations=[{"image_id": 77, "category_id": 3, "bbox": [0, 0, 1, 1]}]),
        broken(annotations=[{"image_id": 9, "category_id": 5, "bbox": [0, 0, 1, 1]}]),
        broken(annotations=[{"image_id": 9, "category_id": 3, "bbox": [0, 0, 1]}]),
        broken(annotations=[{"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, "b"]}]),
        broken(images=[{"id": 1}]),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, content: Any) -> None:
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ClsaError, match="damaged") as error:
        read_coco(tmp_path, "train")
    assert error.value.code == Exit.BAD_DATA and "\n" not in str(error.value)
    path.write_text('{"images": [')
    with pytest.raises(ClsaError, match="damaged"):
        read_coco(tmp_path, "train")


def test_missing_coco_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ClsaError, match=r"instances_train.json - no such file") as error:
        read_coco(tmp_path, "train")
    assert error.value.code == Exit.NO_INPUT
    coco(tmp_path, "train2014", CONTENT, "train2014")
    coco(tmp_path, "train2017", CONTENT, "train2017")
    with pytest.raises(ClsaError, match="use one of train2014, train2017"):
        read_coco(tmp_path, "train")
    (tmp_path / "train2017" / "b.png").unlink()
    with pytest.raises(ClsaError, match=r"b.png - a listed picture is missing"):
        read_coco(tmp_path, "train2017")
    outside = broken(images=[{"id": 9, "file_name": "../x.png"}])
    coco(tmp_path / "x", "train", outside, "train")
    with pytest.raises(ClsaError, match="a path outside the set"):
        read_coco(tmp_path / "x", "train")


def coco_with(folder: Path, **over: object) -> Path:
    """Write a COCO folder: one picture of 64 x 48 pixels with one object."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "train").mkdir()
    (folder / "train" / "a.jpg").write_bytes(encoded(photograph(0, 48, 64), "JPEG"))
    thing = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], **over}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}],
        "annotations": [thing],
        "categories": [{"id": 1, "name": "x"}],
    }
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return folder


def test_short_polygons_are_ignored_and_tiny_boxes_dropped(tmp_path: Path) -> None:
    for place, polygons in enumerate(([[5, 5, 25, 25]], [[]], [[1, 2, 3, 4, 5]])):
        found = read_coco(coco_with(tmp_path / str(place), segmentation=polygons), "train")
        assert found.things[0][0].segmentation is None
    found = read_coco(coco_with(tmp_path / "tiny", bbox=[50.0, 5, 1e-6, 20]), "train")
    assert found.things == [[]] and found.dropped == 1


def test_masks_that_do_not_fit_are_damaged(tmp_path: Path) -> None:
    for place, mask in enumerate(
        ({"size": [10, 10], "counts": [100]}, {"size": [48, 64], "counts": [5000, 9000]})
    ):
        folder = coco_with(tmp_path / str(place), segmentation=mask)
        with pytest.raises(ClsaError, match="damaged"):
            read_coco(folder, "train")


def test_a_picture_of_another_size_than_its_annotations_is_refused(tmp_path: Path) -> None:
    found = read_coco(coco_with(tmp_path), "train")
    found.require_size(0, 48, 64)
    with pytest.raises(ClsaError, match=r"48x64 pixels upright, and 64x48 in the annotations"):
        found.require_size(0, 64, 48)


def test_the_folder_of_another_year_is_refused(tmp_path: Path) -> None:
    top = voc_folder(tmp_path, {"train": 3, "test": 2}) / "VOC2007"
    with pytest.raises(ClsaError, match="not the folder of 2012"):
        read_voc(top, [("2012", "train")])

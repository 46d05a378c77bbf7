"""Reads pictures with their objects (boxes, classes, masks) from VOC and COCO folders.

A box is four edges in pixels, (x1, y1, x2, y2), counted from the outer border of the first pixel. A
box around the first pixel alone is (0, 0, 1, 1), and x2 - x1 is the width in pixels. COCO's files
use the same convention. VOC's files count pixels from 1 and give the first and the last pixel
inside the box, so VOC's (xmin, ymin, xmax, ymax) becomes (xmin - 1, ymin - 1, xmax, ymax) here.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Never
from xml.etree import ElementTree

import numpy as np

from clsa.options.config import nearest
from clsa.pictures.sources import Folder
from clsa.system.errors import ClsaError, Exit, first_line

VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
]
VOC_ENDINGS = (".jpg", ".jpeg", ".png")
MAX_XML_BYTES = 1 << 22
LEAST_SIDE = 0.01  # of a box, in pixels, so that float32 still tells its edges apart

Box = tuple[float, float, float, float]
Segmentation = list[list[float]] | dict[str, Any]


class Thing(NamedTuple):
    """One object of a picture.

    Attributes:
        box: (x1, y1, x2, y2), edges in pixels.
        label: position of its class in `Annotated.classes`.
        difficult: VOC's flag: evaluation counts it neither as missed nor as a false detection.
        crowd: COCO's flag: one box around many objects.
        segmentation: COCO's polygons (x, y, x, y, ... in pixels) or run lengths; None if absent.
        area: of the object in pixels, from COCO's file; None if absent.
    """

    box: Box
    label: int
    difficult: bool = False
    crowd: bool = False
    segmentation: Segmentation | None = None
    area: float | None = None


class Annotated(NamedTuple):
    """Pictures and the objects in each of them.

    Attributes:
        source: the image files; their labels are all -1.
        classes: names of the classes.
        things: one list per picture, empty if the picture has no objects.
        image_ids: number or name of each picture in the annotation files.
        dropped: how many objects were left out because their box has (nearly) no area.
        sizes: height and width of each picture in pixels, from the annotations; None if missing.
    """

    source: Folder
    classes: list[str]
    things: list[list[Thing]]
    image_ids: list[int | str]
    dropped: int = 0
    sizes: Sequence[tuple[int, int] | None] = ()

    def require_size(self, row: int, height: int, width: int) -> None:
        """Check that a picture has the size on which its boxes were drawn.

        Raises:
            ClsaError: 65 if not: it was resized later, or its EXIF orientation turns it.
        """
        noted = self.sizes[row] if self.sizes else None
        if noted is not None and noted != (height, width):
            why = f"{width}x{height} pixels upright, and {noted[1]}x{noted[0]} in the annotations"
            hint = "use the pictures that were annotated, without EXIF orientation"
            _refuse(Path(self.source.ids[row]), why, hint, Exit.BAD_DATA)

    def subset(self, rows: Sequence[int]) -> "Annotated":
        """Only these pictures, in this order; `dropped` still counts the whole set."""
        source = self.source.subset(np.array(rows, np.int64))
        things, ids = [self.things[row] for row in rows], [self.image_ids[row] for row in rows]
        sizes = [self.sizes[row] for row in rows] if self.sizes else ()
        return Annotated(source, self.classes, things, ids, self.dropped, sizes)


def read_voc(
    root: Path,
    years_and_splits: Sequence[tuple[str, str]] = (("2007", "trainval"),),
    classes: list[str] | None = None,
) -> Annotated:
    """Read pictures and objects from VOC folders, one split after the other.

    Args:
        root: VOCdevkit, which holds VOC2007 and VOC2012, or one such folder (JPEGImages,
            Annotations/*.xml, ImageSets/Main/SPLIT.txt).
        years_and_splits: such as [("2007", "trainval"), ("2012", "trainval")].
        classes: class names; labels are positions in this list. Default: VOC's 20 classes, or, if
            the files contain any other class, the names found in them, sorted.

    Raises:
        ClsaError: 66 if a folder, list, picture or XML file is missing; 65 if an XML file is
            damaged or names a class that is not in `classes`.
    """
    top = root if (root / "JPEGImages").is_dir() else None
    if top is not None and len({year for year, _ in years_and_splits}) > 1:
        _refuse(root, "the folder of one year", "give VOCdevkit, with all years", Exit.NO_INPUT)
    for year, _ in years_and_splits if top is not None else ():
        if re.fullmatch(r"VOC\d{4}", root.name) and root.name != f"VOC{year}":
            _refuse(root, f"not the folder of {year}", "give VOCdevkit or that one", Exit.NO_INPUT)
    base = root if top is None else root.parent
    stems: list[tuple[Path, str]] = []
    for year, split in years_and_splits:
        folder = root / f"VOC{year}" if top is None else top
        stems += [(folder, stem) for stem in _voc_list(folder, split)]
    read = [_voc_read(folder / "Annotations" / f"{stem}.xml") for folder, stem in stems]
    named, sizes = [objects for objects, _ in read], [size for _, size in read]
    found = {name for objects in named for name, _ in objects}
    if classes is None:
        classes = VOC_CLASSES if found <= set(VOC_CLASSES) else sorted(found)
    position = _positions(classes, found, root)
    things, dropped = [], 0
    for objects in named:
        kept = [thing._replace(label=position[name]) for name, thing in objects]
        things.append([thing for thing in kept if _has_area(thing.box)])
        dropped += len(kept) - len(things[-1])
    paths = [str(_voc_picture(folder, stem).relative_to(base)) for folder, stem in stems]
    source = _folder(base, paths, classes)
    return Annotated(source, list(classes), things, [stem for _, stem in stems], dropped, sizes)


def _voc_list(folder: Path, split: str) -> list[str]:
    """Picture names of a split. A list for one class, with lines like `NAME -1`, works too."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        if not (folder / part).is_dir():
            hint = "give VOCdevkit or one of its folders VOC2007, VOC2012"
            _refuse(folder, f"holds no {part}", hint, Exit.NO_INPUT)
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        known = sorted(each.stem for each in path.parent.glob("*.txt") if "_" not in each.stem)
        _refuse(path, "no such split", f"use one of {', '.join(known)}", Exit.NO_INPUT)
    text = path.read_text("utf-8", errors="replace")
    names = [line.split()[0] for line in text.splitlines() if line.strip()]
    bad = next((name for name in names if not re.fullmatch(r"[\w.-]+", name)), None)
    if bad is not None:
        _refuse(path, f"{bad!r} is not a picture name", "correct the list", Exit.BAD_DATA)
    return names


def _voc_picture(folder: Path, stem: str) -> Path:
    for ending in VOC_ENDINGS:
        path = folder / "JPEGImages" / f"{stem}{ending}"
        if path.is_file():
            return path
    path = folder / "JPEGImages" / f"{stem}.jpg"
    _refuse(path, "a listed picture is missing", "complete the folder", Exit.NO_INPUT)


def _voc_read(path: Path) -> tuple[list[tuple[str, Thing]], tuple[int, int] | None]:
    """One XML file: (class name, object with label -1) for each object; the picture's size."""
    try:
        data = path.read_bytes()
    except OSError as error:
        why = error.strerror or str(error)
        _refuse(path, why, "complete the folder", Exit.NO_INPUT)
    if len(data) > MAX_XML_BYTES or b"<!ENTITY" in data:
        _refuse(path, "not a VOC annotation file", "remove or replace it", Exit.BAD_DATA)
    found = []
    try:
        root = ElementTree.fromstring(data)
        for item in root.findall("object"):
            corners = item.find("bndbox")
            name = (item.findtext("name") or "").strip()
            if corners is None or not name:
                raise ValueError("an object without name or bndbox")
            x1, y1, x2, y2 = (
                _number(corners.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")
            )
            difficult = int(item.findtext("difficult") or 0) == 1
            found.append((name, Thing((x1 - 1, y1 - 1, x2, y2), -1, difficult)))
        sides = [root.findtext(f"size/{side}") for side in ("height", "width")]
        high, wide = (int(float(side or 0)) for side in sides)
        return found, (high, wide) if high and wide else None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        why = f"damaged ({first_line(error)})"
        _refuse(path, why, "replace it, or remove it from the lists", Exit.BAD_DATA)


def read_coco(root: Path, split: str, classes: list[str] | None = None) -> Annotated:
    """Read pictures and objects from a COCO folder.

    Reads annotations/instances_SPLIT.json. If there is no such file, but exactly one whose name
    starts with instances_SPLIT (instances_train2017.json for "train"), reads that one. The pictures
    are in the folder of that name (train2017, images/train2017), in the folder SPLIT, in images, or
    at `file_name` relative to `root`.

    Args:
        classes: class names; labels are positions in this list. Default: all categories, by
            ascending id.

    Raises:
        ClsaError: 66 if a file, folder or picture is missing; 65 if the JSON file is damaged or
            uses a class that is not in `classes`.
    """
    path = _coco_file(root, split)
    try:
        content = json.loads(path.read_bytes())
        ids = sorted(int(item["id"]) for item in content["categories"])
        name_of = {int(item["id"]): str(item["name"]) for item in content["categories"]}
        images = sorted(content["images"], key=lambda image: image["id"])
        names = [str(image["file_name"]) for image in images]
        sizes = [(int(image["height"]), int(image["width"])) if "height" in image else None
                 for image in images]  # fmt: skip
        row_of = {image["id"]: row for row, image in enumerate(images)}
        things: list[list[Thing]] = [[] for _ in images]
        dropped = 0
        labelled = classes or [name_of[number] for number in ids]
        used = {int(item["category_id"]) for item in content["annotations"]}
        position = _positions(labelled, {name_of[number] for number in used}, path)
        for item in content["annotations"]:
            row = row_of[item["image_id"]]
            thing = _coco_thing(item, position[name_of[int(item["category_id"])]], sizes[row])
            if _has_area(thing.box):
                things[row].append(thing)
            else:
                dropped += 1
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"damaged ({type(error).__name__}: {first_line(error)})"
        _refuse(path, why, "replace it", Exit.BAD_DATA)
    folder = _coco_pictures(root, path.stem.removeprefix("instances_"), split, names)
    paths = [str((folder / name).relative_to(root)) for name in names]
    for name in paths:
        if not (root / name).is_file():
            _refuse(root / name, "a listed picture is missing", "add it", Exit.NO_INPUT)
    source = _folder(root, paths, labelled)
    ids_of = [image["id"] for image in images]
    return Annotated(source, list(labelled), things, ids_of, dropped, sizes)


def _coco_file(root: Path, split: str) -> Path:
    folder = root / "annotations"
    exact = folder / f"instances_{split}.json"
    if exact.is_file():
        return exact
    found = sorted(folder.glob(f"instances_{split}*.json"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.stem.removeprefix("instances_") for path in found)
        _refuse(folder, f"several splits begin with {split}", f"use one of {names}", Exit.USAGE)
    hint = "give the folder that holds annotations/ and the pictures"
    _refuse(exact, "no such file", hint, Exit.NO_INPUT)


def _coco_pictures(root: Path, name: str, split: str, files: list[str]) -> Path:
    bad = next((f for f in files if PurePosixPath(f).is_absolute() or ".." in f.split("/")), None)
    if bad is not None:
        _refuse(Path(bad), "a path outside the set", "correct the JSON file", Exit.BAD_DATA)
    tried = [root / name, root / "images" / name, root / split, root / "images", root]
    there = [folder for folder in tried if folder.is_dir()]
    first = files[0] if files else ""
    for folder in there:
        if (folder / first).exists():
            return folder
    _refuse(root / name / first, "a listed picture is missing", "add it", Exit.NO_INPUT)


def _coco_thing(item: dict[str, Any], label: int, size: tuple[int, int] | None) -> Thing:
    """One object. Ignores polygons with fewer than three corners, as detectron2 does."""
    x, y, wide, high = (_number(value) for value in item["bbox"])
    outline = item.get("segmentation")
    if isinstance(outline, dict):
        outline = {"size": list(outline["size"]), "counts": outline["counts"]}
        if size is not None and outline["size"] != list(size):
            raise ValueError("a mask and its picture differ in size")
        counts = outline["counts"]
        if isinstance(counts, list) and sum(counts) != outline["size"][0] * outline["size"][1]:
            raise ValueError("run lengths that do not add up to the picture's size")
    elif outline:
        polygons = [[_number(value) for value in polygon] for polygon in outline]
        outline = [each for each in polygons if len(each) >= 6 and len(each) % 2 == 0]
    crowd = int(item.get("iscrowd", 0)) == 1
    area = _number(item["area"]) if "area" in item else None
    return Thing((x, y, x + wide, y + high), label, False, crowd, outline or None, area)


def _positions(classes: Sequence[str], found: set[str], path: Path) -> dict[str, int]:
    """Position of each class; refuses a name from the files that is not in `classes`."""
    unknown = sorted(found - set(classes))
    if unknown:
        close = nearest(unknown[0], list(classes))
        hint = f"did you mean {close}?" if close else f"use one of {', '.join(classes[:8])}"
        _refuse(path, f"holds the unknown class {unknown[0]}", hint, Exit.BAD_DATA)
    return {name: place for place, name in enumerate(classes)}


def _number(value: Any) -> float:
    number = float("nan" if value is None else value)
    if not math.isfinite(number):
        raise ValueError("a coordinate or area is not a finite number")
    return number


def _has_area(box: Box) -> bool:
    x1, y1, x2, y2 = box
    return x2 - x1 > LEAST_SIDE and y2 - y1 > LEAST_SIDE


def _folder(root: Path, paths: list[str], classes: list[str]) -> Folder:
    if not paths:
        _refuse(root, "no pictures are listed", "give another split", Exit.NO_INPUT)
    return Folder(str(root), paths, np.full(len(paths), -1, np.int64), list(classes))


def _refuse(path: Path, why: str, hint: str, code: Exit) -> Never:
    raise ClsaError(str(path), why, hint, code)

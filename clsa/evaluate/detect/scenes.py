"""Scenes with known objects: embedded drawings pasted on textures or on crops of photographs.

With them, object detection and instance segmentation can be tried without a download. A scene is a
pure function of the seed, the split and its number. Train scenes show the train drawings and test
scenes the val drawings, so no drawing is in both.
"""

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from clsa.options.commands import ScenesOptions
from clsa.options.run import DataOptions
from clsa.pictures.decode import DecodeError
from clsa.pictures.named_sets import Split
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Source
from clsa.system import files
from clsa.system.errors import ClsaError, Exit
from clsa.views import rng

# Classes with the most train drawings (120 to 50), without those that mix kinds of things (icon,
# food-other, office) and those that draw things of other classes (mapsymbol).
CLASSES = [
    *("flag", "people", "vehicle", "card", "mammal"),
    *("arrow", "tool", "fruit-veg", "plant", "music"),
]
STREAM, SLOTS = 1_000_030, 1024
WHITE = 238  # not 255, because the embedded WebP files are lossy
LEAST_SIDE, LEAST_FILL = 28, 0.35  # of a drawing: longer side in pixels, share that is not white
SIDES, MAX_THINGS = (24.0, 64.0), 4  # sides in scenes of 128 pixels
TRIES, MAX_COVER = 12, 0.6
QUALITY = 95


class Drawing(NamedTuple):
    """A drawing, and a mask that excludes its white background."""

    pixels: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]
    label: int


class Placed(NamedTuple):
    """The visible part of one object in a scene.

    Attributes:
        mask: pixels of the object that no other object hides.
        box: edges x1, y1, x2, y2 around the mask in pixels.
        hidden: share of the object's pixels that others hide.
    """

    label: int
    mask: Bool[np.ndarray, "S S"]
    box: tuple[int, int, int, int]
    hidden: float


class Draws:
    """The stream of uniform numbers that decides one scene."""

    def __init__(self, seed: int, part: int, number: int):
        at = np.array([number], np.int64)
        slots = np.arange(SLOTS, dtype=np.int64)
        self._values, self._next = rng.uniforms(seed, part, at, STREAM, slots)[0], 0

    def many(self, count: int) -> Float[np.ndarray, " count"]:
        """The next `count` numbers in [0, 1)."""
        first, self._next = self._next, self._next + count
        return self._values[first : self._next]

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        """The next number, in [low, high)."""
        return low + (high - low) * float(self.many(1)[0])

    def below(self, count: int) -> int:
        """The next number as an integer from 0 to count - 1."""
        return int(self.one() * count)


def cut_out(pixels: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """Mask of the drawing: all but the near-white pixels connected to the border (4-connected)."""
    white = pixels.min(2) >= WHITE
    ground = np.zeros_like(white)
    ground[[0, -1]], ground[:, [0, -1]] = white[[0, -1]], white[:, [0, -1]]
    while True:
        grown = ground.copy()
        grown[1:] |= ground[:-1]
        grown[:-1] |= ground[1:]
        grown[:, 1:] |= ground[:, :-1]
        grown[:, :-1] |= ground[:, 1:]
        grown &= white
        if np.array_equal(grown, ground):
            return ~ground
        ground = grown


@functools.cache
def drawings(split: Split) -> tuple[list[Drawing], ...]:
    """The usable drawings of each of `CLASSES`, cropped to their masks."""
    source = open_source("clipart", split, DataOptions()).with_classes(CLASSES)
    found: tuple[list[Drawing], ...] = tuple([] for _ in CLASSES)
    for row in np.flatnonzero(source.labels >= 0):
        pixels, label = source.read(int(row)), int(source.labels[row])
        mask = cut_out(pixels)
        if not mask.any():
            continue
        x1, y1, x2, y2 = box_of(mask)
        pixels, mask = pixels[y1:y2, x1:x2], mask[y1:y2, x1:x2]
        if max(mask.shape) >= LEAST_SIDE and mask.mean() >= LEAST_FILL:
            found[label].append(Drawing(pixels, mask, label))
    return found


def box_of(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """Edges (x1, y1, x2, y2) in pixels of the box around a mask; the mask must not be empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def texture(draws: Draws, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """A background of smooth noise over a plain colour, a gradient or stripes."""
    first, second = 40 + 190 * draws.many(3), 40 + 190 * draws.many(3)
    across = np.linspace(0, 1, size)
    angle = draws.one(0, np.pi)
    along = across[None] * np.cos(angle) + across[:, None] * np.sin(angle)
    kind = draws.below(3)
    if kind == 0:
        share = np.zeros((size, size))
    elif kind == 1:
        share = along / max(np.abs(along).max(), 1e-9)
    else:
        share = 0.5 + 0.5 * np.sin(2 * np.pi * along * draws.one(2, 12))
    ground = first + (second - first) * share[..., None]
    for cells, height in ((3, 60.0), (8, 30.0), (14, 20.0)):
        for channel in range(3) if cells < 4 else (slice(None),):
            grid = (draws.many(cells * cells).reshape(cells, cells) - 0.5).astype(np.float32)
            noise = np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))
            ground[..., channel] += height * (noise if cells < 4 else noise[..., None])
    return np.clip(np.rint(ground), 0, 255).astype(np.uint8)


def photograph(draws: Draws, source: Source, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """A square crop of a readable picture, at least a third of its short side wide."""
    for _ in range(TRIES):
        row, share, left, top = draws.below(len(source)), *draws.many(3).tolist()
        try:
            pixels = source.read(row)
        except DecodeError:
            continue
        height, width, _ = pixels.shape
        side = max(1, round(min(height, width) * (1 + 2 * share) / 3))
        x, y = int(left * (width - side + 1)), int(top * (height - side + 1))
        crop = Image.fromarray(pixels[y : y + side, x : x + side])
        return np.array(crop.resize((size, size), Image.Resampling.BILINEAR))
    raise ClsaError("--backgrounds", "its pictures cannot be read", "check them", Exit.BAD_DATA)


def compose(
    kinds: Sequence[list[Drawing]], draws: Draws, size: int, backgrounds: Source | None
) -> tuple[UInt8[np.ndarray, "S S 3"], list[Placed]]:
    """Compose one scene of one to four drawings; return it and the visible part of each drawing.

    Later drawings cover earlier ones. A drawing's longer side is 24 to 64 pixels in scenes of 128,
    log-uniform, and all classes are equally likely. A position is drawn again if the new box and
    another one would share more than 0.6 of the smaller of the two.

    Args:
        kinds: drawings of each class.
        size: side of the scene in pixels.
        backgrounds: photographs to cut backgrounds from; None for textures.
    """
    scene = texture(draws, size) if backgrounds is None else photograph(draws, backgrounds, size)
    boxes: list[tuple[int, int, int, int]] = []
    masks: list[np.ndarray] = []
    labels: list[int] = []
    wholes: list[int] = []
    for _ in range(1 + draws.below(MAX_THINGS)):
        kind = kinds[draws.below(len(kinds))]
        drawing = kind[draws.below(len(kind))]
        pixels, alpha = scaled(drawing, draws, size)
        high, wide = alpha.shape
        for _ in range(TRIES):
            x, y = (draws.below(size - extent + 1) for extent in (wide, high))
            box = (x, y, x + wide, y + high)
            if all(_cover(box, other) <= MAX_COVER for other in boxes):
                break
        else:
            continue
        part = scene[y : y + high, x : x + wide]
        part[:] = np.rint(part + alpha[..., None] * (pixels - part.astype(np.float32)))
        mask = np.zeros((size, size), bool)
        mask[y : y + high, x : x + wide] = alpha > 0.5
        boxes, labels = [*boxes, box], [*labels, drawing.label]
        masks = [*(other & ~mask for other in masks), mask]
        wholes.append(int(mask.sum()))
    seen = zip(labels, masks, wholes, strict=True)
    return scene, [
        Placed(label, mask, box_of(mask), 1 - int(mask.sum()) / whole)
        for label, mask, whole in seen
        if mask.any()
    ]


def scaled(
    drawing: Drawing, draws: Draws, size: int
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """Colours and opacity of a drawing at a random scale, mirrored half of the time."""
    low, high = np.log(SIDES)
    longer = np.exp(draws.one(low, high)) * size / 128
    step = -1 if draws.one() < 0.5 else 1
    rows, columns = drawing.mask.shape
    ratio = longer / max(rows, columns)
    to = (max(2, round(columns * ratio)), max(2, round(rows * ratio)))
    kind = Image.Resampling.BILINEAR
    pixels = Image.fromarray(np.ascontiguousarray(drawing.pixels[:, ::step])).resize(to, kind)
    cover = np.ascontiguousarray(drawing.mask[:, ::step]).astype(np.float32)
    alpha = Image.fromarray(cover).resize(to, kind)
    return np.asarray(pixels, np.float32), np.clip(np.asarray(alpha), 0, 1)


def _cover(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Area that both boxes share, divided by the area of the smaller one."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return max(wide, 0) * max(high, 0) / min(areas)


def scene_of(
    kinds: Sequence[list[Drawing]],
    options: ScenesOptions,
    split: Split,
    number: int,
    photos: Source | None,
) -> tuple[UInt8[np.ndarray, "S S 3"], list[Placed]]:
    """Scene `number` of a split."""
    draws = Draws(options.seed, int(split == "val"), number)
    return compose(kinds, draws, options.size, photos)


class Written(NamedTuple):
    """Counts of what `scenes` wrote.

    Attributes:
        scenes: scenes of both splits.
        things: objects in them, with those left out.
        hidden: objects left out or marked difficult, because more than half of them is hidden.
    """

    scenes: int
    things: int
    hidden: int


def scenes(options: ScenesOptions) -> Written:
    """Write train and test scenes in the layout of COCO or of VOC.

    COCO: train/, val/ (the test scenes), annotations/instances_train.json and instances_val.json,
    with masks as run lengths; objects that are more than half hidden are left out. VOC:
    VOCdevkit/VOC2007, with the train scenes as `trainval` (the first half is `train`, the rest
    `val`) and the test scenes as `test`; objects that are more than half hidden are `difficult`.

    Raises:
        ClsaError: 2 if the folder is not empty, 66 or 65 for bad backgrounds.
    """
    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ClsaError(str(out), "is not an empty folder", "choose another --out, or remove it")
    photos = None
    if options.backgrounds is not None:
        photos = open_source(options.backgrounds, "train", DataOptions())
    classes = CLASSES[: options.classes]
    totals = np.zeros(3, np.int64)
    names: dict[str, list[str]] = {}
    splits: list[tuple[Split, int]] = [("train", options.train), ("val", options.test)]
    for split, count in splits:
        kinds = drawings(split)[: options.classes]
        records: list[tuple[str, list[Placed]]] = []
        folder = out / split if options.layout == "coco" else _voc_root(out) / "JPEGImages"
        with files.output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            scene, placed = scene_of(kinds, options, split, number, photos)
            name = f"{number + 1 + (options.train if split == 'val' else 0):06d}"
            records.append((name, placed))
            encoded = _jpeg(scene)
            files.write_atomic(folder / f"{name}.jpg", lambda file, data=encoded: file.write(data))
            hidden = sum(thing.hidden > 0.5 for thing in placed)
            totals += (1, len(placed), hidden)
        names[split] = [name for name, _ in records]
        if options.layout == "coco":
            _write_coco(out, split, records, classes, options.size)
        else:
            _write_voc(out, records, classes, options.size)
    if options.layout == "voc":
        half = (options.train + 1) // 2
        lists = {"train": names["train"][:half], "val": names["train"][half:]}
        lists |= {"trainval": names["train"], "test": names["val"]}
        for split, listed in lists.items():
            path = _voc_root(out) / "ImageSets" / "Main" / f"{split}.txt"
            files.make_folder(path.parent)
            files.write_text(path, "".join(f"{name}\n" for name in listed))
    return Written(*totals.tolist())


def _voc_root(out: Path) -> Path:
    return out / "VOCdevkit" / "VOC2007"


def _jpeg(scene: UInt8[np.ndarray, "S S 3"]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(scene).save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def run_lengths(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """COCO's uncompressed run lengths by column; the first run is of zeros and may be empty."""
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def _write_coco(
    out: Path, split: Split, records: list[tuple[str, list[Placed]]], classes: list[str], size: int
) -> None:
    images, found = [], []
    for name, placed in records:
        images.append({"id": int(name), "file_name": f"{name}.jpg", "height": size, "width": size})
        for thing in placed:
            x1, y1, x2, y2 = thing.box
            if thing.hidden <= 0.5:
                found.append(
                    {
                        "id": len(found) + 1,
                        "image_id": int(name),
                        "category_id": thing.label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": int(thing.mask.sum()),
                        "iscrowd": 0,
                        "segmentation": run_lengths(thing.mask),
                    }
                )
    kinds = [{"id": place + 1, "name": name} for place, name in enumerate(classes)]
    content = {"images": images, "annotations": found, "categories": kinds}
    path = out / "annotations" / f"instances_{split}.json"
    files.make_folder(path.parent)
    files.write_text(path, json.dumps(content))


def _write_voc(
    out: Path, records: list[tuple[str, list[Placed]]], classes: list[str], size: int
) -> None:
    folder = _voc_root(out) / "Annotations"
    files.make_folder(folder)
    for name, placed in records:
        lines = [f"<annotation>\n<folder>VOC2007</folder>\n<filename>{name}.jpg</filename>"]
        lines.append(f"<size><width>{size}</width><height>{size}</height><depth>3</depth></size>")
        for thing in placed:
            x1, y1, x2, y2 = thing.box
            lines.append(
                f"<object>\n<name>{escape(classes[thing.label])}</name>\n"
                f"<difficult>{int(thing.hidden > 0.5)}</difficult>\n<bndbox><xmin>{x1 + 1}</xmin>"
                f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>\n</object>"
            )
        files.write_text(folder / f"{name}.xml", "\n".join([*lines, "</annotation>\n"]))

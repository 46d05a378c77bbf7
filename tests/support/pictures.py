"""Pictures for tests: drawn like photographs (gradients, coarse and fine noise), then encoded."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clsa.system.files import ASSETS

CLIPART = ASSETS / "clipart.tar"


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """A uint8 RGB picture with a gradient, soft blobs and grain."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    soft = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    ramp = np.linspace(-40, 40, width)[None, :, None] * rng.uniform(-1, 1, 3)
    return (soft + ramp + rng.normal(0, 3, soft.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_folder(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """A folder of JPEGs of these (height, width), 00.jpg, 01.jpg, ..."""
    root.mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate(sizes):
        data = encoded(photograph(i, height, width), "JPEG", quality=90)
        (root / f"{i:02d}.jpg").write_bytes(data)
    return root


def clipart_folder(root: Path, classes: int, each: int) -> Path:
    """The first `each` embedded drawings of `classes` classes, as root/CLASS/NAME.webp."""
    counts: dict[str, int] = {}
    with tarfile.open(CLIPART) as tar:
        for member in tar:
            split, name, *file = member.name.split("/")
            known = name in counts or len(counts) < classes
            if split == "train" and known and counts.setdefault(name, 0) < each:
                counts[name] += 1
                (root / name).mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                assert stream is not None
                (root / name / file[-1]).write_bytes(stream.read())
    return root


def voc_folder(root: Path, counts: dict[str, int], size: int = 40) -> Path:
    """VOC2007's layout: gray noise with red, green or blue squares, some of them difficult.

    In every list of `counts`, picture i shows colour i modulo 3. Every second picture also shows
    the next colour, and every fifth one a third colour, marked difficult. `trainval` holds `train`
    and `val`.
    """
    top = root / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (top / name).mkdir(parents=True)
    listed: dict[str, list[str]] = {}
    for part, (split, count) in enumerate(counts.items()):
        for i in range(count):
            name = f"{part}{i:05d}"
            listed.setdefault(split, []).append(name)
            pixels = np.random.default_rng([part, i]).integers(60, 190, (size, size, 1))
            image = np.repeat(pixels, 3, 2).astype(np.uint8)
            shown = [(i % 3, 0)] + [((i + 1) % 3, 0)] * (i % 2) + [((i + 2) % 3, 1)] * (i % 5 == 0)
            objects = ""
            for place, (colour, difficult) in enumerate(shown):
                low, side = place * size // 3, size // 4
                image[low : low + side, low : low + side] = np.eye(3)[colour] * 255
                first, last = low + 1, low + side
                box = f"<xmin>{first}</xmin><ymin>{first}</ymin>"
                box += f"<xmax>{last}</xmax><ymax>{last}</ymax>"
                objects += (
                    f"<object><name>{('red', 'green', 'blue')[colour]}</name>"
                    f"<difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"
                )
            (top / "JPEGImages" / f"{name}.jpg").write_bytes(encoded(image, "JPEG", quality=95))
            text = f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>"
            (top / "Annotations" / f"{name}.xml").write_text(text)
    listed["trainval"] = listed.get("train", []) + listed.get("val", [])
    for split, names in listed.items():
        (top / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root

"""Photographs to read: cut from pictures that a machine has, so that nothing is downloaded."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from clsa.errors import ClsaError, Exit

FOLDERS = ("/usr/share/backgrounds", "/usr/share/wallpapers")
LEAST_PIXELS = 2_000_000
CUTS_A_PHOTOGRAPH = 6
HINT = "apt install mate-backgrounds plasma-workspace-wallpapers, or give --photos DIR"


def photographs(folder: Path | None) -> list[Path]:
    """JPEGs of at least two megapixels below `folder`, or below Debian's folders of backgrounds,
    the largest first.

    Raises:
        ClsaError: 66 when there are none.
    """
    roots = [folder] if folder else [Path(name) for name in FOLDERS]
    found: dict[int, Path] = {}  # by size in bytes: the same picture stands under many names
    for root in roots:
        for path in sorted(root.rglob("*.[jJ][pP]*[gG]")):
            found.setdefault(path.stat().st_size, path)
    sizes = {path: _num_pixels(path) for path in found.values()}
    large = [path for path, pixels in sizes.items() if pixels >= LEAST_PIXELS]
    if not large:
        named = ", ".join(map(str, roots))
        raise ClsaError(f"no photographs in {named}", "2 MP JPEGs needed", HINT, Exit.NO_INPUT)
    return sorted(large, key=lambda path: (-sizes[path], path))


def _num_pixels(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except OSError:
        return 0


@contextmanager
def prepared(
    folder: Path | None, width: int, height: int, quality: int, count: int
) -> Iterator[Path]:
    """A temporary folder of `count` JPEGs of one size, random cuts of real photographs.

    Args:
        folder: where photographs are; None: Debian's.
        width, height: of the result, in pixels.
        quality: of the JPEGs.
    """
    paths = photographs(folder)
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        each = max(CUTS_A_PHOTOGRAPH, -(-count // len(paths))) if count > len(paths) else 1
        made = 0
        for path in paths:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            for _ in range(min(each, count - made)):
                cut = _cut(image, width / height, draw.uniform(0.3, 0.9) if each > 1 else 1.0, draw)
                resized = cut.resize((width, height), Image.Resampling.LANCZOS)
                resized.save(out / f"{made:05d}.jpg", quality=quality)
                made += 1
            if made == count:
                break
        yield out


def _cut(image: Image.Image, aspect: float, share: float, draw: np.random.Generator) -> Image.Image:
    width = int(min(image.width, image.height * aspect) * share)
    height = int(width / aspect)
    left = int(draw.integers(0, image.width - width + 1))
    top = int(draw.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))

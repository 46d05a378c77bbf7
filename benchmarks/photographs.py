"""Makes folders of JPEGs to read: cuts of photographs on this machine, or else drawn pictures."""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from clsa.system.errors import ClsaError, Exit
from clsa.system.machine import num_cores
from tests.support.pictures import photograph

FOLDERS = ("/usr/share/backgrounds", "/usr/share/wallpapers")
LEAST_PIXELS = 2_000_000
CUTS_A_PHOTOGRAPH = 6
HINT = "apt install mate-backgrounds plasma-workspace-wallpapers, or give --photos DIR"
SYNTHETIC = ", synthetic pictures"
FROM = "folder of JPEGs of at least 2 MP (default: Debian's wallpapers, or else drawn pictures)"


def photographs(folder: Path | None) -> list[Path]:
    """JPEGs of at least two megapixels below `folder`, or below Debian's folders of backgrounds,
    the largest first.

    Raises:
        ClsaError: 66 if there are none.
    """
    roots = [folder] if folder else [Path(name) for name in FOLDERS]
    found: dict[int, Path] = {}  # by size in bytes, as the same picture is stored under many names
    for root in roots:
        for path in sorted(root.rglob("*.[jJ][pP]*[gG]")):
            found.setdefault(path.stat().st_size, path)
    sizes = {path: _num_pixels(path) for path in found.values()}
    large = [path for path, pixels in sizes.items() if pixels >= LEAST_PIXELS]
    if not large:
        named = ", ".join(map(str, roots))
        raise ClsaError(
            f"no photographs in {named}", "needs JPEGs of at least 2 MP", HINT, Exit.NO_INPUT
        )
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
) -> Iterator[tuple[Path, str]]:
    """A temporary folder of `count` JPEGs of one size, and the text that a claim adds about them.

    They are random cuts of photographs. If the machine has none and no folder was named, they are
    drawn, and the text says that they are synthetic.

    Args:
        folder: folder of photographs; None for Debian's.
        width, height: size of the result in pixels.
        quality: quality of the JPEGs.

    Raises:
        ClsaError: 66 if `folder` has no photographs.
    """
    try:
        paths = photographs(folder)
    except ClsaError:
        if folder:
            raise
        paths = []
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)

        def save(number: int, image: Image.Image) -> None:
            image.save(out / f"{number:05d}.jpg", quality=quality)

        if paths:
            for number, image in enumerate(_cuts(paths, width, height, count)):
                save(number, image)
        else:
            with ThreadPoolExecutor(num_cores()) as pool:
                list(pool.map(lambda i: save(i, _drawn(i, width, height)), range(count)))
        yield out, "" if paths else SYNTHETIC


def _cuts(paths: list[Path], width: int, height: int, count: int) -> Iterator[Image.Image]:
    draw, made = np.random.default_rng(0), 0
    each = max(CUTS_A_PHOTOGRAPH, -(-count // len(paths))) if count > len(paths) else 1
    for path in paths:
        if made == count:
            return
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        for _ in range(min(each, count - made)):
            cut = _cut(image, width / height, draw.uniform(0.3, 0.9) if each > 1 else 1.0, draw)
            yield cut.resize((width, height), Image.Resampling.LANCZOS)
            made += 1


def _cut(image: Image.Image, aspect: float, share: float, draw: np.random.Generator) -> Image.Image:
    width = int(min(image.width, image.height * aspect) * share)
    height = int(width / aspect)
    left = int(draw.integers(0, image.width - width + 1))
    top = int(draw.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _drawn(seed: int, width: int, height: int) -> Image.Image:
    """Gradients, blobs and grain, so that files are as large as those of photographs."""
    image = photograph(seed, height, width).astype(np.float32)
    grain = np.random.default_rng(seed)
    for coarse, strength in ((2, 20), (6, 40)):
        noise = 128 + strength * grain.normal(size=(height // coarse, width // coarse))
        scaled = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((width, height))
        image += np.asarray(scaled, np.float32)[..., None] - 128
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))

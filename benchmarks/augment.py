"""Pixel work of whole batches: what it costs, its share of a step, and against kornia, torchvision.

    python -m benchmarks.augment [--batch 256]

First: crops and pixel operations of all views of a batch of `clsa-small` (3 views) and of
`clsa-multi-small` (11 views) at 32 and at 64 pixels, beside the whole step that they are part of.
The drawings are resident, so nothing is decoded.

Second: the weak recipe alone (random resized crop, jitter 0.8, grayscale 0.2, blur 0.5, flip 0.5,
normalise), one view of the same uint8 batch of 64x64 drawings. All draw their parameters in the
time that is measured. kornia draws for each picture and works on the batch; torchvision v2 draws
once a call, so that a parameter a picture means a call a picture; its row with one draw for the
whole batch does less than the others.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks import report
from benchmarks.drive import Drive
from benchmarks.report import Row, alternate, medians, share, versus
from clsa.color import BLUR_TAPS
from clsa.intake import open_source
from clsa.options import DataOptions
from clsa.sources import Pictures, Source
from clsa.views import MAX_SIGMA, MEAN, MIN_SIGMA, STD

SIZES = (32, 64)


def scaled(recipe: str, size: int) -> dict[str, Any]:
    """Options that put a -small recipe (32 pixels) at `size`."""
    factor = size // 32
    many = recipe == "clsa-multi-small"
    sides = tuple(factor * side for side in ((32, 28, 24, 20, 16) if many else (32,)))
    return {"views": {"size": size, "weak": {"sizes": sides}, "strong": {"sizes": sides}}}


def shares(source: Source, batch: int, repeats: int) -> Iterable[Row]:
    """Pixel work of a batch in ms, and as a share of the step."""
    for recipe, num_views in (("clsa-small", 3), ("clsa-multi-small", 11)):
        for size in SIZES:
            values = scaled(recipe, size) | {"batch_size": batch}
            with (
                tempfile.TemporaryDirectory() as folder,
                Drive(recipe, Path(folder), source, **values) as drive,
            ):
                sides = {"views": drive.views, "step": drive.step}
                taken = medians(alternate(sides, repeats, warmup=2))
            named = f"`{recipe}`, {num_views} views at {size} px, batch {batch}"
            yield Row(f"{named}: crops and pixel work", 1e3 * taken["views"], unit="ms")
            yield share(f"{named}: crops and pixel work of the step", taken["views"], taken["step"])


# ---- the weak recipe alone


class Weak:
    """One weak view of each picture of one batch, by ours and by the peers.

    Args:
        images: uint8 (B, 3, H, W).
        size: side of the view.
        drive: a `moco-v2-small` at `size` with blur, over `images`.
    """

    def __init__(self, images: Tensor, size: int, drive: Drive):
        from kornia import augmentation

        self.images, self.drive = images, drive
        weak = drive.options.views.weak
        scale, sigmas = drive.options.views.scale, (MIN_SIGMA, MAX_SIGMA)
        self.kornia = nn.Sequential(
            augmentation.RandomResizedCrop((size, size), scale=scale),
            augmentation.ColorJitter(*weak.jitter, p=weak.jitter_probability),
            augmentation.RandomGrayscale(p=weak.grayscale),
            augmentation.RandomGaussianBlur((BLUR_TAPS, BLUR_TAPS), sigmas, p=weak.blur),
            augmentation.RandomHorizontalFlip(p=weak.flip),
            augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )
        self.torchvision = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, antialias=True),
                v2.RandomApply([v2.ColorJitter(*weak.jitter)], p=weak.jitter_probability),
                v2.RandomGrayscale(weak.grayscale),
                v2.RandomApply([v2.GaussianBlur(BLUR_TAPS, sigmas)], p=weak.blur),
                v2.RandomHorizontalFlip(weak.flip),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def sides(self) -> dict[str, Callable[[], Tensor]]:
        """Calls that give one normalised view (B, 3, size, size) each."""
        return {
            "ours": lambda: self.drive.views().views[0],
            "kornia": lambda: self.kornia(self.images.float() / 255),
            "torchvision": lambda: torch.stack([self.torchvision(one) for one in self.images]),
            "one draw": lambda: self.torchvision(self.images),
        }


def weak_recipe(source: Pictures, batch: int, repeats: int) -> Iterable[Row]:
    """The weak recipe of one view against the peers."""
    rows = np.arange(batch)
    few = source.subset(rows)
    images = torch.from_numpy(np.ascontiguousarray(few.images.transpose(0, 3, 1, 2)))
    for size in SIZES:
        values = scaled("moco-v2-small", size) | {"batch_size": batch}
        values["views"]["weak"]["blur"] = 0.5
        values["views"]["strong"] = {"sizes": ()}
        with (
            tempfile.TemporaryDirectory() as folder,
            Drive("moco-v2-small", Path(folder), few, slice(1, 2), **values) as drive,
        ):
            sides = Weak(images, size, drive).sides()
            for name, side in sides.items():
                view = side()
                assert view.shape == (batch, 3, size, size), f"{name}: {view.shape}"
            taken = {name: 1e3 * each for name, each in in_turn(sides, repeats).items()}
        named = f"weak recipe, one view at {size} px, batch {batch}"
        for peer, told in (
            ("kornia", "kornia"),
            ("torchvision", "torchvision v2, a call a picture"),
            ("one draw", "torchvision v2, one draw for the batch (does less)"),
        ):
            yield versus(named, taken["ours"], taken[peer], "ms", told, less_is_better=True)


def in_turn(sides: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median seconds; a call a picture, the slowest by far, runs a quarter as often."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, side in sides.items():
            if name == "torchvision" and repeat % 4:
                continue
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    """Measure both parts."""
    parser = report.parser(__doc__, threads=2)
    parser.add_argument("--batch", type=int, default=256, help="pictures (256)")
    args = parser.parse_args()
    report.require("kornia")
    torch.set_num_threads(args.threads)
    batch, repeats = (16, 1) if args.quick else (args.batch, 5)
    source = open_source("clipart", "train", DataOptions(data="clipart"))
    assert isinstance(source, Pictures)
    rows = [
        *shares(source, batch, repeats),
        *weak_recipe(source, batch, 1 if args.quick else 20),
    ]
    title = "Augmentation of whole batches"
    notes = [
        f"Blur has {BLUR_TAPS} taps on every side. kornia's crop is bilinear without antialiasing, "
        "ours and torchvision's are antialiased. One process, freed memory kept for all sides."
    ]
    peers = ("kornia", "kornia-rs")
    report.publish("augment", title, rows, args, peers=peers, notes=notes)


if __name__ == "__main__":
    report.run(main)

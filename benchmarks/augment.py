"""Pixel work of whole batches: its cost, its share of a step, and kornia and torchvision compared.

    python -m benchmarks.augment [--batch 256]

First: crops and pixel operations of all views of a batch of `clsa-small` (3 views) and of
`clsa-multi-small` (11 views) at 32 and at 64 pixels, compared with the whole step. The drawings are
resident, so nothing is decoded. Second: the weak recipe alone (random resized crop, jitter 0.8,
grayscale 0.2, blur 0.5, flip 0.5, normalise) against kornia and torchvision v2: one view of the
same uint8 batch of 64x64 drawings. The measured time includes drawing the parameters, on all sides.
kornia draws for each picture and works on the batch; only the order of its jitter is shared by the
batch. It crops by slicing or by resampling, and the faster of the two counts. torchvision v2 draws
once per call, so parameters per picture need one call per picture; its row with one draw for the
whole batch does less than the others.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks import report
from benchmarks.drive import Drive
from benchmarks.report import Row, alternate, medians, share, versus
from clsa.options.run import DataOptions, ViewOptions
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Pictures, Source
from clsa.views.color import BLUR_TAPS
from clsa.views.transform import MAX_SIGMA, MEAN, MIN_SIGMA, STD

SIZES = (32, 64)


def scaled(recipe: str, size: int) -> dict[str, Any]:
    """Options that scale a -small recipe (32 pixels) to `size`."""
    factor = size // 32
    many = recipe == "clsa-multi-small"
    sides = tuple(factor * side for side in ((32, 28, 24, 20, 16) if many else (32,)))
    return {"views": {"size": size, "weak": {"sizes": sides}}, "strong": {"sizes": sides}}


def shares(source: Source, batch: int, repeats: int) -> Iterable[Row]:
    """Rows with the pixel work of a batch in ms, and as a share of the step."""
    for recipe, num_views in (("clsa-small", 3), ("clsa-multi-small", 11)):
        for size in SIZES:
            values: dict[str, Any] = {**scaled(recipe, size), "batch_size": batch}
            with Drive(recipe, source, **values) as drive:
                sides = {"views": drive.views, "step": drive.step}
                taken = medians(alternate(sides, repeats, warmup=2))
            named = f"`{recipe}`, {num_views} views at {size} px, batch {batch}"
            yield Row(f"{named}: crops and pixel work", 1e3 * taken["views"], unit="ms")
            yield share(f"{named}: crops and pixel work of the step", taken["views"], taken["step"])


# ---- the weak recipe alone


def kornia_weak(views: ViewOptions, size: int, cropping: str) -> nn.Module:
    """kornia's weak recipe for floats (B, 3, H, W) from 0 to 1; `cropping` is slice or resample."""
    from kornia import augmentation

    weak, sigmas = views.weak, (MIN_SIGMA, MAX_SIGMA)
    return nn.Sequential(
        augmentation.RandomResizedCrop((size, size), scale=views.scale, cropping_mode=cropping),
        augmentation.ColorJitter(*weak.jitter, p=weak.jitter_probability),
        augmentation.RandomGrayscale(p=weak.grayscale),
        augmentation.RandomGaussianBlur((BLUR_TAPS, BLUR_TAPS), sigmas, p=weak.blur[0]),
        augmentation.RandomHorizontalFlip(p=weak.flip),
        augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )


def torchvision_weak(views: ViewOptions, size: int) -> v2.Compose:
    """torchvision's weak recipe for one uint8 picture or a batch."""
    weak, sigmas = views.weak, (MIN_SIGMA, MAX_SIGMA)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=views.scale, antialias=True),
            v2.RandomApply([v2.ColorJitter(*weak.jitter)], p=weak.jitter_probability),
            v2.RandomGrayscale(weak.grayscale),
            v2.RandomApply([v2.GaussianBlur(BLUR_TAPS, sigmas)], p=weak.blur[0]),
            v2.RandomHorizontalFlip(weak.flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def kornia_sides(views: ViewOptions, size: int, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """kornia's weak view of a uint8 batch (B, 3, H, W) in both ways of cropping."""

    def side(cropping: str) -> Callable[[], Tensor]:
        transform = kornia_weak(views, size, cropping).to(images.device)
        return lambda: transform(images.float() / 255)

    return {f"kornia, {way} crops": side(way) for way in ("slice", "resample")}


def weak_recipe(source: Pictures, batch: int, repeats: int) -> Iterable[Row]:
    """Rows that compare the weak recipe of one view with the peers."""
    few = source.subset(np.arange(batch))
    images = torch.from_numpy(np.ascontiguousarray(few.images.transpose(0, 3, 1, 2)))
    single, once = "torchvision v2, a call a picture", "torchvision v2, one draw (does less)"
    for size in SIZES:
        values: dict[str, Any] = {**scaled("moco-v2-small", size), "batch_size": batch}
        values["views"]["weak"]["blur"] = 0.5
        drive = Drive("moco-v2-small", few, slice(1, 2), **values)
        options = drive.options.views
        theirs = torchvision_weak(options, size)
        sides: dict[str, Callable[[], Tensor]] = {
            "ours": lambda drive=drive: drive.views().views[0],
            **kornia_sides(options, size, images),
            single: lambda theirs=theirs: torch.stack([theirs(one) for one in images]),
            once: lambda theirs=theirs: theirs(images),
        }
        for name, side in sides.items():
            view = side()
            assert view.shape == (batch, 3, size, size), f"{name}: {view.shape}"
        taken = {name: 1e3 * each for name, each in medians(alternate(sides, repeats)).items()}
        kornia = min((name for name in sides if "kornia" in name), key=lambda name: taken[name])
        named = f"weak recipe, one view at {size} px, batch {batch}"
        for peer in (kornia, single, once):
            yield versus(named, taken["ours"], taken[peer], "ms", peer, less_is_better=True)


def main() -> None:
    """Measure both parts."""
    parser = report.parser(__doc__, threads=2)
    parser.add_argument("--batch", type=int, default=256, help="pictures per batch (256)")
    args = parser.parse_args()
    report.require("kornia")
    torch.set_num_threads(args.threads)
    batch, repeats = (16, 1) if args.quick else (args.batch, 5)
    source = open_source("clipart", "train", DataOptions(data="clipart"))
    assert isinstance(source, Pictures)
    rows = [
        *shares(source, batch, repeats),
        *weak_recipe(source, batch, 1 if args.quick else 10),
    ]
    title = "Augmentation of whole batches"
    notes = [
        f"All sides blur with {BLUR_TAPS} taps. kornia's crop is bilinear without antialiasing; "
        "ours and torchvision's are antialiased. Ours draws an order of jitter for each picture, "
        "as torchvision does with one call per picture. All sides share one process, which keeps "
        "freed memory, as `clsa pretrain` does."
    ]
    peers = ("kornia", "kornia-rs")
    report.publish("augment", title, rows, args, __doc__, args.threads, peers, notes)


if __name__ == "__main__":
    report.run(main)

"""Input path of one core: JPEGs on disk -> crops of 2 views at 224 and 1 at 96, against Pillow.

    python -m benchmarks.input [--photos DIR]

The peer decodes with Pillow and makes each view with torchvision transforms of Pillow pictures, as
each worker of the official CLSA code and of lightly does: RandomResizedCrop, jitter, grayscale,
blur, flip, five rounds of strong operations for the third view, ToTensor, Normalize. Ours hands
over uint8 crops, since the pixel work after them runs batched where the model is: the first rows
compare this work of a worker. The last rows have both sides do everything, to normalised floats.

Both sides run in this process on one thread. The rate is pictures by the larger of wall time and
processor time.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import plain_views, report
from benchmarks.photographs import prepared
from benchmarks.report import Row, versus
from clsa import data
from clsa.host import keep_freed_memory
from clsa.intake import open_source
from clsa.options import RunOptions
from clsa.order import Order
from clsa.recipes import resolve
from clsa.signals import Stop
from clsa.train import Run, make_views
from clsa.views import ViewSpec, view_specs

CPU = torch.device("cpu")
PLAIN, PACKED = 8.0, 10.0  # budgets against the Pillow path
FAR = 1_000_000


class Ours:
    """Batches of a folder through the loader's own code, without workers."""

    def __init__(self, folder: Path, batch: int):
        values = {"data": str(folder), "workers": 0, "resident_limit": 1e-6}
        values = {"recipe": "clsa", "batch_size": batch, "data": values, "out": "unused"}
        self.options: RunOptions = resolve(values | {"model": {"norm_groups": 1}})
        options = self.options
        self.source = open_source(str(folder), "train", options.data)
        order = Order(len(self.source), batch, 0)
        self.specs: list[ViewSpec] = view_specs(options.views, options.method)
        self.run = Run(options, CPU, order.steps_per_epoch, Stop())
        flip = options.views.weak.flip
        self.batches = data.batches(self.source, self.specs, flip, order, 0, FAR, CPU, options.data)
        self.done = 0

    def decode(self) -> None:
        """Decode a batch of pictures in full."""
        for i in range(self.options.batch_size):
            self.source.read((self.done + i) % len(self.source))
        self.done += self.options.batch_size

    def crops(self) -> None:
        """uint8 crops of all views of a batch."""
        crops = next(self.batches)
        assert all(crop.dtype == torch.uint8 for crop in crops.crops), "the resident path ran"

    def floats(self) -> None:
        """Crops and all pixel work, to normalised floats."""
        make_views(next(self.batches), self.specs, 0, self.run)


class Pillows:
    """The same pictures through Pillow and torchvision."""

    def __init__(self, folder: Path, batch: int, ours: Ours):
        self.paths = sorted(folder.glob("*.jpg"))
        self.views = plain_views.Views(ours.options.views, ours.specs)
        self.batch, self.done = batch, 0

    def _next(self) -> Iterator[Path]:
        for i in range(self.batch):
            yield self.paths[(self.done + i) % len(self.paths)]
        self.done += self.batch

    def decode(self) -> None:
        """Decode a batch of pictures in full."""
        for path in self._next():
            plain_views.load(path)

    def floats(self) -> None:
        """All views of a batch, normalised and stacked."""
        rows = [self.views(plain_views.load(path)) for path in self._next()]
        [torch.stack(list(views)) for views in zip(*rows, strict=True)]


def rates(sides: dict[str, Callable[[], None]], batch: int, repeats: int) -> dict[str, float]:
    """Median images/s of each side over `repeats` batches, taken in turn after one to warm up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            wall, processor = time.perf_counter(), time.process_time()
            side()
            taken = max(time.perf_counter() - wall, time.process_time() - processor)
            if repeat:
                found[name].append(batch / taken)
    return {name: statistics.median(each) for name, each in found.items()}


@contextlib.contextmanager
def packed(folder: Path) -> Iterator[Path | None]:
    """`folder` as `clsa pack` makes it with its defaults; None where it fails."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "packed"
        command = [sys.executable, "-m", "clsa", "pack", "--data", str(folder), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "no words").splitlines()[-1]
            print(f"clsa pack failed, its rows are missing: {last}", file=sys.stderr)
        yield None if done.returncode else out


def measure(folder: Path, named: str, batch: int, repeats: int, budgets: bool) -> list[Row]:
    """The rows of one set of photographs."""
    ours = Ours(folder, batch)
    pillow = Pillows(folder, batch, ours)
    with packed(folder) as shards:
        sides: dict[str, Callable[[], None]] = {
            "Pillow": pillow.floats, "crops": ours.crops, "floats": ours.floats,
            "Pillow decodes": pillow.decode, "decode": ours.decode,
        }  # fmt: skip
        if shards:
            from_shards = Ours(shards, batch)
            sides |= {"packed": from_shards.crops, "packed floats": from_shards.floats}
        rate = rates(sides, batch, repeats)
    path = "Pillow and torchvision to normalised floats"
    told = [
        ("crops", f"{named}: JPEG to uint8 crops", PLAIN),
        ("packed", f"{named}: `clsa pack` shards to uint8 crops", PACKED),
        ("floats", f"{named}: JPEG to normalised floats, both do all work", None),
        ("packed floats", f"{named}: shards to normalised floats, both do all work", None),
    ]
    rows = [
        versus(claim, rate[side], rate["Pillow"], "images/s", path, budget if budgets else None)
        for side, claim, budget in told
        if side in rate
    ]
    claim = f"{named}: decode in full"
    return [*rows, versus(claim, rate["decode"], rate["Pillow decodes"], "images/s", "Pillow")]


def main() -> None:
    """Measure photographs of both sizes."""
    parser = report.parser(__doc__, threads=1)
    told = "folder of JPEGs of 2 MP and more (default: Debian's backgrounds and wallpapers)"
    parser.add_argument("--photos", type=Path, help=told)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as `clsa pretrain` does, and its workers after it; for both sides here
    count, batch, repeats = (12, 4, 1) if args.quick else (204, 68, 5)
    with prepared(args.photos, 500, 375, 88, count) as folder:
        rows = measure(folder, "500x375", batch, repeats, budgets=True)
    count, repeats = (2, 1) if args.quick else (16, 3)
    with prepared(args.photos, 4000, 3000, 90, count) as folder:
        rows += measure(folder, "12 MP", count, repeats, budgets=False)
    notes = [
        "Views: key and weak query at 224, strong query at 96, recipe `clsa`. 500x375 at quality "
        "88 and 4000x3000 at quality 90, cut from photographs; files in the page cache. One "
        "process, one thread a side, no loader workers, freed memory kept for both."
    ]
    title = "Input path of one core"
    report.publish("input", title, rows, args, notes=notes)


if __name__ == "__main__":
    report.run(main)

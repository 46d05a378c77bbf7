"""Input path of one core: JPEGs on disk -> crops of 2 views at 224 and 1 at 96, against Pillow.

    python -m benchmarks.input [--photos DIR]

The peer decodes with Pillow and makes each view with torchvision transforms of Pillow pictures, as
each worker of the official CLSA code and of lightly does: RandomResizedCrop, jitter, grayscale,
blur, flip, five rounds of strong operations for the third view, ToTensor, Normalize. In the first
rows both sides do all of this, up to normalised floats. In the rows with a budget ours stops at
uint8 crops, which is all that our workers do: the later pixel work runs in batches on the model's
device.

Both sides run in this process on one thread. The rate is the number of pictures divided by the
larger of wall time and processor time.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import plain_views, report
from benchmarks.drive import Drive
from benchmarks.photographs import FROM, prepared
from benchmarks.report import Row, versus
from clsa.options.commands import PackOptions
from clsa.pictures.pack import pack

PLAIN, PACKED = 8.0, 10.0  # budgets compared with the Pillow path
PEER = "Pillow and torchvision, to normalised floats"


class Ours:
    """Makes batches of a folder with the loader's own code, without workers."""

    def __init__(self, folder: Path, batch: int):
        data = {"data": str(folder), "workers": 0, "resident_limit": 1e-6}
        model = {"encoder": "resnet10-w32", "norm_groups": 1}  # not used
        self.drive = Drive("clsa", batch_size=batch, data=data, model=model)
        self.done = 0

    def decode(self) -> None:
        """Decode a batch of pictures in full."""
        source, batch = self.drive.source, self.drive.batch_size
        for i in range(batch):
            source.read((self.done + i) % len(source))
        self.done += batch

    def crops(self) -> None:
        """uint8 crops of all views of a batch."""
        crops = self.drive.next_crops()
        assert all(crop.dtype == torch.uint8 for crop in crops.crops), "the resident path ran"

    def floats(self) -> None:
        """Crops and all pixel work, to normalised floats."""
        self.drive.views()


class Pillows:
    """Makes batches of the same pictures with Pillow and torchvision."""

    def __init__(self, folder: Path, ours: Drive):
        self.paths = sorted(folder.glob("*.jpg"))
        self.views = plain_views.Views(ours.specs)
        self.batch, self.done = ours.batch_size, 0

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


def measure(
    folder: Path, size: str, told: str, batch: int, repeats: int, budgets: bool
) -> list[Row]:
    """The rows of one set of photographs; `told` is appended to their claims."""
    with tempfile.TemporaryDirectory() as name:
        options = PackOptions(data=str(folder), out=Path(name) / "packed", workers=0)
        packing = report.seconds(lambda: pack(options), one_core=True)
        ours, shards = Ours(folder, batch), Ours(options.out, batch)
        pillow = Pillows(folder, ours.drive)
        sides = {
            "Pillow": pillow.floats, "floats": ours.floats, "packed floats": shards.floats,
            "crops": ours.crops, "packed": shards.crops,
            "Pillow decodes": pillow.decode, "decode": ours.decode,
        }  # fmt: skip
        times = report.alternate(sides, repeats, one_core=True)
    rates = {name: batch / taken for name, taken in report.medians(times).items()}

    def row(claim: str, side: str, peer: str, against: str, budget: float | None = None) -> Row:
        ratios = [theirs / mine for mine, theirs in zip(times[side], times[peer], strict=True)]
        return versus(f"{size}: {claim}{told}", rates[side], rates[peer], "images/s", against,
                      budget if budgets else None, rounds=ratios)  # fmt: skip

    shards_read, alike = "`clsa pack` shards", "to normalised floats, both sides do all work"
    rest = "to uint8 crops of 2 x 224 and 96 (the pixel work after them runs on the device)"
    return [
        row(f"JPEG {alike}", "floats", "Pillow", PEER),
        row(f"{shards_read} {alike}", "packed floats", "Pillow", PEER),
        row(f"JPEG {rest}", "crops", "Pillow", PEER, PLAIN),
        row(f"{shards_read} {rest}", "packed", "Pillow", PEER, PACKED),
        row("decode in full", "decode", "Pillow decodes", "Pillow"),
        Row(f"{size}: `clsa pack`, once{told}", len(pillow.paths) / packing, unit="images/s"),
    ]


def main() -> None:
    """Measure photographs of both sizes."""
    parser = report.parser(__doc__)
    parser.add_argument("--photos", type=Path, help=FROM)
    args = parser.parse_args()
    torch.set_num_threads(1)
    count, batch, repeats = (8, 4, 1) if args.quick else (204, 68, 5)
    with prepared(args.photos, 500, 375, 88, count) as (folder, told):
        rows = measure(folder, "500x375", told, batch, repeats, budgets=True)
    count, repeats = (2, 1) if args.quick else (16, 3)
    with prepared(args.photos, 4000, 3000, 90, count) as (folder, told):
        rows += measure(folder, "12 MP", told, count, repeats, budgets=False)
    packs = PackOptions()
    drawn = "drawn: this machine has no photographs" if told else "cut from photographs"
    notes = [
        "Views: key and weak query at 224, strong query at 96, recipe `clsa`. 500x375 at quality "
        f"88 and 4000x3000 at quality 90, {drawn}; files in the page cache. Both sides run in one "
        "process on one thread, without loader workers, and keep freed memory, as `clsa pretrain` "
        f"does. Shards hold JPEGs of {packs.size} px on the short side at quality {packs.quality}; "
        "`clsa pack` makes them once, also on one core."
    ]
    title = "Input path of one core"
    report.publish("input", title, rows, args, __doc__, threads=1, notes=notes)


if __name__ == "__main__":
    report.run(main)

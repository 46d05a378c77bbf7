"""ResNet-50 at 224 on one GPU: whole steps, the encoder alone, views, loss, loader.

    bash benchmarks/gpu.sh                       # all except compiled, under 10 minutes
    python -m benchmarks.gpu PART [--minutes 4]  # steps, compiled, views, loss or loader

Each part has its own file of results, written row by row. Each figure is the mean of several calls
between two waits for the device. `--device cpu --quick` shows on any machine that it runs.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import page, report
from benchmarks.augment import kornia_sides
from benchmarks.drive import Drive
from benchmarks.gpu_clock import WARM_UP, alternately, breakdown, free, mean_ms, peak_gib
from benchmarks.loss import Sizes, unit_rows
from benchmarks.on_paper import EPOCHS, IMAGENET
from benchmarks.photographs import FROM, prepared
from benchmarks.report import Row, share, versus
from clsa.learning.losses import contrast_and_divergence
from clsa.loading.streaming import PREFETCH
from clsa.options.config import merge
from clsa.options.run import DataOptions, StrongOptions, ViewOptions, WeakViews
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Pictures, Source
from clsa.system import dist
from clsa.system.errors import ClsaError
from clsa.system.machine import num_cores
from clsa.training.step import make_views
from clsa.views.specs import ViewSpec, strong_specs, weak_specs
from clsa.views.transform import pixels, sample
from tests.support.reference import written_out

WISH = 2_000.0
TRITON_AT = 0.02  # above this share of a step, the loss needs its own kernel
MOST_OUTSIDE = {"clsa": 0.07, "clsa-multi": 0.10}
LEAST_OF_ENCODER = 0.9
# Recipe and batch, the most wanted first, in case the time is short.
PLAN = [
    *(("clsa", 256), ("moco-v2", 256), ("clsa-multi", 256), ("clsa", 512), ("clsa", 1024)),
    *(("moco-v2", 512), ("moco-v2", 1024), ("clsa-multi", 512), ("clsa-multi", 1024)),
]
PLAN_COMPILED = [*PLAN[:2], *PLAN[3:5], PLAN[2]]  # CLSA* last
VARIANTS = {"batch norm in 1 group": {"model": {"norm_groups": 1}}, "cudnn.benchmark": {}}
ALONE = "the encoder alone, the same run"
Rows = Iterator[Row | str]
"""Lines of the table, and notes."""


class Bench:
    """Arguments, device and deadline that all parts share."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, dist.pick_device(args.device)
        self.seconds = 0.0 if args.quick else args.seconds
        self.deadline = time.monotonic() + 60 * args.minutes

    @property
    def late(self) -> bool:
        """Whether this part has used up its minutes."""
        return time.monotonic() > self.deadline

    def batch(self, batch: int) -> int:
        """The batch size to use instead of `batch`: a smaller one with --quick."""
        return max(8, batch // 32) if self.args.quick else batch

    def drive(self, recipe: str, batch: int, **values: object) -> Drive:
        """A run of the recipe on resident pictures."""
        noise = pictures(40, 64) if self.args.quick else pictures(256, 2048)
        return self.made(recipe, batch, noise, **values)

    def made(self, recipe: str, batch: int, source: Source, **values: Any) -> Drive:
        """A run of the recipe on these pictures; with --quick, of its -small form."""
        batch = self.batch(batch)
        groups = {"norm_groups": min(8, batch // 2)}  # at least two pictures per group
        values = merge({"batch_size": batch, "model": groups}, values)
        name = f"{recipe}-small" if self.args.quick else recipe
        return Drive(name, source=source, device=self.device, **values)

    def times(self, *calls: Callable[[], object]) -> list[float]:
        """Mean ms of each call, measured in turn."""
        return alternately(calls, self.device, self.seconds)

    def guarded(self, named: str, rows: Callable[[], Rows]) -> Rows:
        """`rows`, or a note that no time or not enough memory was left."""
        if self.late:
            yield f"{named}: not measured, the time was over"
            return
        with free(self.device):
            try:
                yield from rows()
            except torch.cuda.OutOfMemoryError:
                yield f"{named}: does not fit into the memory of the device"


@lru_cache(maxsize=1)
def pictures(side: int, count: int) -> Pictures:
    """Pictures of noise, of one size; the values of pixels do not affect the time here."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Pictures(images, np.full(count, -1), [])


# ---- steps


def steps(bench: Bench) -> Rows:
    """Whole steps.

    Whole steps: `train_step` as `fit` calls it, with the journal, on resident uint8 pictures of
    256x256 that are cropped on the device. In turn with them runs the peer: forward and backward
    alone of the same networks on views of the same shapes. A phase has its time on the device, with
    waits for the host, and the host's time for the same calls. The last rows have batch norm
    without groups, and a search for convolution algorithms.
    """
    for recipe, batch in PLAN:
        yield from one_size(bench, recipe, batch, compiled=False)
    for told, values in VARIANTS.items():
        named = f"clsa, batch 256, plain, {told}"
        yield from bench.guarded(named, partial(variant, bench, named, values))


def compiled(bench: Bench) -> Rows:
    """Whole steps, compiled.

    The same steps with the encoders under torch.compile; each first step takes minutes.
    """
    for recipe, batch in PLAN_COMPILED:
        yield from one_size(bench, recipe, batch, compiled=True)


def one_size(bench: Bench, recipe: str, batch: int, compiled: bool) -> Rows:
    named = f"{recipe}, batch {batch}, {'compiled' if compiled else 'plain'}"
    rows = partial(step_rows, bench, named, recipe, batch, compiled)
    yield from bench.guarded(named, rows)


def step_rows(bench: Bench, named: str, recipe: str, batch: int, compiled: bool) -> Rows:
    with bench.drive(recipe, batch, compile=compiled) as drive:
        first = report.seconds(drive.step)
        if compiled:
            yield Row(f"{named}: first step, compiling", first, unit="s")
        step, encoder = bench.times(drive.step, drive.encoder_alone())
        rate, against = 1e3 * drive.batch_size / step, 1e3 * drive.batch_size / encoder
        claim = f"{named}: whole step"
        yield versus(claim, rate, against, "images/s", ALONE, at_least=LEAST_OF_ENCODER)
        most = MOST_OUTSIDE.get(recipe)
        yield share(f"{named}: outside the encoder", step - encoder, step, at_most=most)
        if recipe == "clsa" and rate >= WISH:
            yield f"{named}: the wish of {WISH:,.0f} images/s is reached"
        hours = IMAGENET * EPOCHS / rate / 3600
        yield Row(f"{named}: {EPOCHS} epochs of ImageNet at this rate", hours, unit="h")
        memory = peak_gib(drive.step, bench.device)
        if memory is not None:
            yield Row(f"{named}: peak memory", memory, unit="GiB")
        if not compiled and batch == PLAN[0][1]:
            yield from breakdown(drive, named)


def variant(bench: Bench, named: str, values: dict[str, Any]) -> Rows:
    """The cost of grouped batch norm, or the gain from a search for convolution algorithms."""
    was = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = was or named.endswith("cudnn.benchmark")
    try:
        with bench.drive("clsa", 256, **values) as drive:
            times = bench.times(drive.step, drive.encoder_alone())
            rate, against = (1e3 * drive.batch_size / ms for ms in times)
            yield versus(f"{named}: whole step", rate, against, "images/s", ALONE)
    finally:
        torch.backends.cudnn.benchmark = was


# ---- views


def views(bench: Bench) -> Rows:
    """Views.

    First, one weak view of 224, cropped from resident pictures, against kornia's with the faster of
    its two ways of cropping; the measured time includes drawing the parameters. Then all pixel work
    of a batch. Then each kind of pixel work alone, on uint8 crops as the loader delivers them.
    """
    yield from bench.guarded("weak recipe", partial(against_kornia, bench))
    for recipe in ("clsa", "clsa-multi"):
        yield from bench.guarded(f"views of {recipe}", partial(all_views, bench, recipe))
    for size in (224, 96):
        yield from bench.guarded(f"one view of {size}", partial(kinds, bench, size))


def all_views(bench: Bench, recipe: str) -> Rows:
    drive = bench.drive(recipe, 256)
    crops, specs = drive.next_crops(), drive.specs
    (ms,) = bench.times(lambda: make_views(crops, specs, 0, drive.run))
    yield Row(f"pixel work of all {len(specs)} views of {recipe}, batch 256", ms, unit="ms")


def against_kornia(bench: Bench) -> Rows:
    drive = bench.drive("moco-v2", 256, views={"weak": {"blur": 0.5}}, chosen=slice(1))
    claim = "weak recipe from pictures of one size, one view of 224, batch 256"
    try:
        report.require("kornia")
    except ClsaError as error:
        yield f"kornia is not compared with: {error}"
        (ms,) = bench.times(drive.views)
        yield Row(claim, ms, unit="ms")
        return
    rows = np.stack([drive.source.read(i) for i in range(drive.batch_size)])
    images = torch.from_numpy(rows.transpose(0, 3, 1, 2).copy()).to(bench.device)
    sides = kornia_sides(drive.options.views, drive.specs[0].size, images)
    ours, *theirs = bench.times(drive.views, *sides.values())
    ms, peer = min(zip(theirs, sides, strict=True))
    yield versus(claim, ours, ms, "ms", f"{peer} (no antialiasing)", less_is_better=True)


def kinds(bench: Bench, size: int) -> Rows:
    size, batch = (32 if bench.args.quick else size), bench.batch(256)
    none = {"jitter_probability": 0.0, "grayscale": 0.0, "blur": 0.0}
    chosen = {
        "normalise only": none,
        "jitter and normalise": none | {"jitter_probability": 0.8},
        "grayscale and normalise": none | {"grayscale": 0.2},
        "blur and normalise": none | {"blur": 0.5},
        "the whole weak recipe": {},
        "weak recipe and strong operations": {},
    }
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    crops = crops.to(bench.device).contiguous(memory_format=torch.channels_last)
    for told, weak in chosen.items():
        options = ViewOptions(size=size, weak=WeakViews(sizes=(size,), **weak))
        spec = weak_specs(options)[1]
        if "strong" in told:
            (spec,) = strong_specs(options, StrongOptions(sizes=(size,)), 2)

        def once(spec: ViewSpec = spec) -> object:
            return pixels(crops, sample(spec, 0, 0, np.arange(batch)), spec)

        (ms,) = bench.times(once)
        yield Row(f"one view of {size}, batch 256: {told}", ms, unit="ms")


# ---- loss


def loss(bench: Bench) -> Rows:
    """Loss.

    Forward and backward of both terms of CLSA in one pass over the bank, compared with the loss
    written out, and as a share of the steps that the part `steps` measured on this machine. Above
    2 % the loss needs its own kernel.
    """
    for batch in (256, 1024):
        for recipe, count in (("clsa", 1), ("clsa-multi", 5)):
            named = f"{recipe}, batch {batch}"
            rows = partial(loss_rows, bench, named, Sizes(batch, weak=count, strong=count))
            yield from bench.guarded(named, rows)


def loss_rows(bench: Bench, named: str, sizes: Sizes) -> Rows:
    used = sizes._replace(batch=bench.batch(sizes.batch))
    used = used._replace(queue=512, dim=16) if bench.args.quick else used
    weak, strong, bank = unit_rows(used, bench.device)
    positive = torch.arange(used.batch, device=bench.device)

    def one_pass() -> None:
        terms = contrast_and_divergence(weak, strong, bank, positive)
        (terms.contrast + terms.divergence).backward()

    def plain() -> None:
        written_out(weak, strong, bank, positive).backward()

    (ms,) = bench.times(one_pass)
    rate = step_rate(bench, named)
    if rate is None:
        yield f"share of the loss, {named}: its step was not measured"
    else:
        part = share(f"{named}: of its step", ms, 1e3 * used.batch / rate, at_most=TRITON_AT)
        yield part
        yield f"a Triton kernel for the loss of {named} is {'not ' if part.met else ''}due"
    try:
        ms, peer = bench.times(one_pass, plain)
    except torch.cuda.OutOfMemoryError:
        yield Row(f"{sizes}", ms, unit="ms", against="written out: no memory for it")
        return
    yield versus(f"{sizes}", ms, peer, "ms", "written out", less_is_better=True)
    ours, theirs = peak_gib(one_pass, bench.device), peak_gib(plain, bench.device)
    if ours is not None and theirs is not None:
        claim = f"{sizes}: peak memory"
        yield versus(claim, ours, theirs, "GiB", "written out", less_is_better=True)


def step_rate(bench: Bench, named: str) -> float | None:
    """images/s of whole steps of a recipe and batch; None if not measured on this machine."""
    found = page.load(bench.args.out or report.RESULTS).get("gpu-steps")
    here = report.machine((), bench.args.threads)
    if found is None or any(
        found["machine"].get(at) != here.get(at) for at in ("gpu", "processor")
    ):
        return None
    claim = f"steps: {named}, plain: whole step"
    return next((row["ours"] for row in found["rows"] if row["claim"] == claim), None)


# ---- loader


def loader(bench: Bench) -> Rows:
    """Loader.

    The rate at which uint8 crops of JPEGs arrive on the device, with several numbers of worker
    processes; then whole steps of `clsa` with the best number.
    """
    rates: dict[int, float] = {}
    count, workers = (32, [1, 2]) if bench.args.quick else (1024, bench.args.workers)
    with prepared(bench.args.photos, 500, 375, 88, count) as (folder, told):
        for number in workers:
            named = f"JPEGs of 500x375{told}: uint8 crops of 2 x 224 and 96, {number} workers"
            try:
                for row in bench.guarded(named, partial(loaded, bench, folder, named, number)):
                    yield row
                    if isinstance(row, Row) and row.ours:
                        rates[number] = row.ours
            except ClsaError as error:  # for example too little shared memory
                yield f"{named}: {error}"
        if rates:
            best = max(rates, key=lambda number: rates[number])
            named = f"JPEGs of 500x375{told}: whole step of clsa, {best} workers"
            rows = partial(trained, bench, folder, named, best, rates[best])
            yield from bench.guarded(named, rows)


def streamed(bench: Bench, folder: Path, workers: int) -> Drive:
    values = {"data": str(folder), "workers": workers, "resident_limit": 1e-6}
    source = open_source(str(folder), "train", DataOptions.parse(values, "loader"))
    return bench.made("clsa", 256, source, data=values)


def loaded(bench: Bench, folder: Path, named: str, workers: int) -> Rows:
    """Rate over two batches per worker, since all workers finish at about the same time."""
    drive = streamed(bench, folder, workers)
    mean_ms(drive.next_crops, bench.device, workers)
    ms = mean_ms(drive.next_crops, bench.device, 2 * workers)
    yield Row(named, 1e3 * drive.batch_size / ms, unit="images/s")


def trained(bench: Bench, folder: Path, named: str, workers: int, alone: float) -> Rows:
    with streamed(bench, folder, workers) as drive:
        mean_ms(
            drive.step, bench.device, PREFETCH * workers + WARM_UP
        )  # uses up prefetched batches
        rate = 1e3 * drive.batch_size / mean_ms(drive.step, bench.device, 4 * workers)
    yield versus(named, rate, alone, "images/s", "the loader alone")


# ---- running


def main() -> None:
    """Measure one part; write each row as soon as it is measured."""
    parser = report.parser(__doc__, threads=num_cores())
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (cuda)")
    parser.add_argument("--minutes", type=float, default=4, help="no new measurement after (4)")
    parser.add_argument("--seconds", type=float, default=3, help="length of each measurement (3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8, 15], help="loader workers")
    parser.add_argument("--photos", type=Path, help=FROM)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    part = PARTS[args.part]
    rows: list[Row] = []
    notes: list[str] = []
    title = f"One GPU, ResNet-50 at 224, bf16: {(part.__doc__ or '').split('.')[0].lower()}"
    result = (f"gpu-{args.part}", title, rows, args, part.__doc__, args.threads, ("kornia",), notes)
    for made in part(Bench(args)):
        if isinstance(made, Row):
            rows.append(dataclasses.replace(made, claim=f"{args.part}: {made.claim}"))
            print(f"{rows[-1].claim}: {page.number(made.ours)} {made.unit}", flush=True)
        else:
            notes.append(f"{made}.")
            print(notes[-1], flush=True)
        report.record(*result)
    report.publish(*result)


PARTS = {"steps": steps, "compiled": compiled, "views": views, "loss": loss, "loader": loader}


if __name__ == "__main__":
    report.run(main)

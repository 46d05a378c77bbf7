"""ResNet-50 at 224 on one GPU: whole steps, the encoder alone, views, loss, loader.

    bash benchmarks/gpu.sh                       # all but compiled, under 10 minutes
    python -m benchmarks.gpu PART [--minutes 4]  # steps, compiled, views, loss or loader

steps: `train_step` as `fit` calls it, over resident uint8 pictures of 256x256 that are cut on the
device, for `moco-v2`, `clsa`, `clsa-multi`, batch 256 to 1,024; beside it the same networks'
forward and backward alone on the same shapes, in turn. compiled: the same with torch.compile.
views: one weak view of 224 against kornia's, and each kind of pixel work. loss: one pass over the
bank against written out. loader: from JPEGs through worker processes, and whole steps from there.

Times on a GPU are those of its own clock (events). Results of the other parts stay in the file.
`--device cpu --quick` shows on any machine that it runs.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_rig, report
from benchmarks.drive import Drive
from benchmarks.gpu_book import Book, kept
from benchmarks.gpu_rig import WARM_UP, Spans, alternately, busy, each_call, free, peak_gib
from benchmarks.report import Row, share, versus
from clsa import data
from clsa.config import merge
from clsa.errors import ClsaError
from clsa.host import num_cores
from clsa.intake import open_source
from clsa.losses import contrast_and_divergence
from clsa.options import DataOptions, MethodOptions, StrongViews, ViewOptions, WeakViews
from clsa.sources import Source
from clsa.train import make_views
from clsa.views import pixels, sample, view_specs
from tests.reference import written_out

IMAGENET = 1_281_167
EPOCHS = 200
WISH = 2_000.0
TRITON_AT = 0.02  # share of a step from which a kernel of its own is due for the loss
MOST_OUTSIDE = {"clsa": 0.07, "clsa-multi": 0.10}
LEAST_OF_ENCODER = 0.9
# In the order of what a short session wants first: recipe and batch.
PLAN = [
    *(("clsa", 256), ("moco-v2", 256), ("clsa-multi", 256), ("clsa", 512), ("clsa", 1024)),
    *(("moco-v2", 512), ("moco-v2", 1024), ("clsa-multi", 512), ("clsa-multi", 1024)),
]
PLAN_COMPILED = [
    ("clsa", 256),
    ("moco-v2", 256),
    ("clsa", 512),
    ("clsa", 1024),
    ("clsa-multi", 256),
]
VARIANTS = {
    "batch norm in 1 group": {"model": {"norm_groups": 1}},
    "cudnn.benchmark": {},
}
Rows = Iterator[Row | str]
"""Lines of the table, and notes."""


class Bench:
    """What all parts share: arguments, device, deadline."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self.seconds = 0.0 if args.quick else args.seconds
        self.deadline = time.monotonic() + 60 * args.minutes

    @property
    def late(self) -> bool:
        """Whether the minutes of this part are over."""
        return time.monotonic() > self.deadline

    def batch(self, batch: int) -> int:
        """The batch size to use for one that is told."""
        return max(8, batch // 32) if self.args.quick else batch

    def drive(self, recipe: str, batch: int, **values: object) -> Drive:
        """A run of the recipe over resident pictures."""
        side, count = (40, 64) if self.args.quick else (256, 2048)
        source = gpu_rig.pictures(side, count)
        return self.made(recipe, batch, source, **values)

    def made(self, recipe: str, batch: int, source: Source, **values: Any) -> Drive:
        """A run of the recipe over these pictures."""
        batch = self.batch(batch)
        groups = {"norm_groups": min(8, batch // 2)}  # two pictures a group at least
        values = merge({"batch_size": batch, "model": groups}, values)
        return Drive(self.name(recipe), source=source, device=self.device, **values)

    def name(self, recipe: str) -> str:
        """The recipe to use for one that is told."""
        return f"{recipe}-small" if self.args.quick else recipe

    def time(self, once: Callable[[], object]) -> float:
        """Median ms of a call."""
        return each_call(once, self.device, self.seconds)


# ---- steps


def steps(bench: Bench) -> Rows:
    """All recipes and batch sizes; where a step goes; what grouped batch norm costs."""
    yield from variants(bench)
    for recipe, batch in PLAN:
        yield from one_size(bench, recipe, batch, compiled=False)


def compiled(bench: Bench) -> Rows:
    """The same with a compiled encoder; the first step of each takes minutes."""
    for recipe, batch in PLAN_COMPILED:
        yield from one_size(bench, recipe, batch, compiled=True)


def one_size(bench: Bench, recipe: str, batch: int, compiled: bool) -> Rows:
    named = f"{recipe}, batch {batch}, {'compiled' if compiled else 'plain'}"
    if bench.late:
        yield f"{named}: not measured, the minutes were over"
        return
    with free(bench.device):
        try:
            yield from step_rows(bench, named, recipe, batch, compiled)
        except torch.cuda.OutOfMemoryError:
            yield f"{named}: does not fit into the memory of the device"


def step_rows(bench: Bench, named: str, recipe: str, batch: int, compiled: bool) -> Rows:
    drive = bench.drive(recipe, batch, compile=compiled)
    start = time.perf_counter()
    drive.step()
    if compiled:
        yield Row(f"{named}: first step, compiling", time.perf_counter() - start, unit="s")
    step, encoder = alternately([drive.step, drive.encoder_alone()], bench.device, bench.seconds)
    rate = 1e3 * drive.batch_size / step
    against = 1e3 * drive.batch_size / encoder
    budget, met = f">= {LEAST_OF_ENCODER:g}x", rate >= LEAST_OF_ENCODER * against
    alone = "the encoder alone, the same run"
    yield Row(f"{named}: whole step", rate, against, "images/s", rate / against, budget, met, alone)
    most = MOST_OUTSIDE.get(recipe)
    yield share(f"{named}: outside the encoder", max(0.0, step - encoder), step, at_most=most)
    if recipe == "clsa" and rate >= WISH:
        yield f"{named}: the wish of {WISH:,.0f} images/s is reached"
    hours = IMAGENET * EPOCHS / rate / 3600
    yield Row(f"{named}: {EPOCHS} epochs of ImageNet at this rate", hours, unit="h")
    memory = peak_gib(drive.step, bench.device)
    if memory is not None:
        yield Row(f"{named}: peak memory", memory, unit="GiB")
    if not compiled and batch == PLAN[0][1]:
        yield from breakdown(drive, named)


def breakdown(drive: Drive, named: str) -> Rows:
    """Where a step goes: time on the device, waits for the host included, and host time."""
    spans = Spans(drive.device)
    for phase, (device_ms, host_ms) in spans.of(drive).items():
        yield Row(f"{named}: {phase}", device_ms, host_ms, "ms", against="host time of the call")
    if spans.missing:
        yield f"{named}: not found and so not timed: {', '.join(spans.missing)}"
    working = busy(drive.step, drive.device)
    if working is not None:
        share_busy, kernels, table = working
        yield Row(f"{named}: device at work during a step", 100 * share_busy, unit="%")
        yield Row(f"{named}: kernels a step", kernels, unit="")
        print(table)


def variants(bench: Bench) -> Rows:
    """What grouped batch norm costs, and what a search for convolution algorithms gains."""
    was = torch.backends.cudnn.benchmark
    for told, values in VARIANTS.items():
        torch.backends.cudnn.benchmark = told == "cudnn.benchmark"
        with free(bench.device):
            yield variant(bench, f"clsa, batch 256, plain, {told}", values)
    torch.backends.cudnn.benchmark = was


def variant(bench: Bench, named: str, values: dict[str, Any]) -> Row:
    drive = bench.drive("clsa", 256, **values)
    calls = [drive.step, drive.encoder_alone()]
    step, encoder = (
        1e3 * drive.batch_size / ms for ms in alternately(calls, bench.device, bench.seconds)
    )
    alone = "the encoder alone, the same run"
    return Row(f"{named}: whole step", step, encoder, "images/s", step / encoder, against=alone)


# ---- views


def views(bench: Bench) -> Rows:
    with free(bench.device):
        yield from against_kornia(bench)
    for recipe in ("clsa", "clsa-multi"):
        drive = bench.drive(recipe, 256)
        crops = next(drive.batches)
        specs = drive.method.view_specs
        ms = bench.time(lambda c=crops, s=specs, r=drive: make_views(c, s, 0, r.run))
        yield Row(f"pixel work of all {len(specs)} views of {recipe}, batch 256", ms, unit="ms")
        del drive, crops
    for size in (224, 96):
        yield from kinds(bench, size)


def against_kornia(bench: Bench) -> Rows:
    """One weak view, cut from resident pictures, parameters drawn in the time that is measured."""
    drive = bench.drive("moco-v2", 256, views={"weak": {"blur": 0.5}})
    specs, options = drive.method.view_specs[:1], drive.options
    stream = data.batches(
        drive.source, specs, options.views.weak.flip, drive.order, 0, 1 << 30, bench.device,
        options.data,
    )  # fmt: skip
    size, claim = specs[0].size, "weak recipe from pictures of one size, one view of 224, batch 256"

    def ours() -> object:
        return make_views(next(stream), specs, 0, drive.run)

    try:
        report.require("kornia")
    except ClsaError as error:
        yield f"kornia is not compared with: {error}"
        yield Row(claim, bench.time(ours), unit="ms")
        return
    pictures = np.stack([drive.source.read(i) for i in range(drive.batch_size)])
    images = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    theirs = gpu_rig.kornia_weak(options.views, size, images.to(bench.device), bench.device)
    mine, peer = alternately([ours, theirs], bench.device, bench.seconds)
    yield versus(claim, mine, peer, "ms", "kornia (no antialiasing)", less_is_better=True)


def kinds(bench: Bench, size: int) -> Rows:
    """Each kind of pixel work alone, on uint8 crops as the loader delivers them."""
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
        options = ViewOptions(size=size, weak=WeakViews(sizes=(size,), **weak),
                              strong=StrongViews(sizes=(size,)))  # fmt: skip
        spec = view_specs(options, MethodOptions())[-1 if "strong" in told else 1]

        def once(options: ViewOptions = options, spec=spec) -> object:
            return pixels(crops, sample(options, spec, 0, 0, np.arange(batch)), options, spec)

        yield Row(f"one view of {size}, batch 256: {told}", bench.time(once), unit="ms")


# ---- loss


def loss(bench: Bench) -> Rows:
    queue, dim = (512, 16) if bench.args.quick else (65536, 128)
    for batch in (256, 1024):
        for recipe, count in (("clsa", 1), ("clsa-multi", 5)):
            told = f"{count} x {count}, queue 65,536, batch {batch}, forward and backward"
            queries, bank = gpu_rig.unit_rows(
                bench.batch(batch), queue, dim, 2 * count, bench.device
            )
            weak, strong = queries[:count], queries[count:]
            positive = torch.arange(len(weak[0]), device=bench.device)

            def one_pass(w=weak, s=strong, z=bank, y=positive) -> None:
                terms = contrast_and_divergence(w, s, z, y)
                (terms.contrast + terms.divergence).backward()

            def plain(w=weak, s=strong, z=bank, y=positive) -> None:
                written_out(w, s, z, y).backward()

            with free(bench.device):
                try:
                    ms, peer = alternately([one_pass, plain], bench.device, bench.seconds)
                    yield versus(told, ms, peer, "ms", "written out", less_is_better=True)
                    memory = [peak_gib(call, bench.device) for call in (one_pass, plain)]
                    if memory[0] is not None and memory[1] is not None:
                        yield versus(f"{told}: peak memory", memory[0], memory[1], "GiB",
                                     "written out", less_is_better=True)  # fmt: skip
                except torch.cuda.OutOfMemoryError:
                    ms = bench.time(one_pass)
                    yield Row(told, ms, unit="ms", against="written out: no memory for it")
            yield from verdict(bench, recipe, batch, ms)


def verdict(bench: Bench, recipe: str, batch: int, ms: float) -> Rows:
    """The rule: above 2 % of a step the loss gets a kernel of its own."""
    claim = f"steps: {recipe}, batch {batch}, plain: whole step"
    rates = [row.ours for row in kept(bench.args)[0] if row.claim == claim and row.ours]
    if not rates:
        yield f"share of the loss of {recipe} at batch {batch}: no step of it was measured"
        return
    part = ms / (1e3 * bench.batch(batch) / rates[0])
    yield share(f"loss of {recipe}, batch {batch}: of its step", part, 1.0, at_most=TRITON_AT)
    due = "is due" if part > TRITON_AT else "is not due"
    yield f"a Triton kernel for the loss of {recipe} at batch {batch} {due}: {part:.2%} of the step"


# ---- loader


def loader(bench: Bench) -> Rows:
    """Crops from JPEGs by several numbers of workers, then whole steps by the best of them."""
    quick, batch = bench.args.quick, bench.batch(256)
    rates: dict[int, float] = {}
    with gpu_rig.jpegs(bench.args.photos, 32 if quick else 1024) as (folder, told):
        for count in (1, 2) if quick else bench.args.workers:
            if bench.late:
                yield f"{count} workers: not measured, the minutes were over"
                continue
            try:
                rates[count] = loader_rate(streamed(bench, folder, count), count)
            except ClsaError as error:  # too little shared memory, say
                yield f"{count} workers: {error}"
                continue
            claim = f"{told}: uint8 crops of 2 x 224 and 96 on the device, {count} workers"
            yield Row(claim, rates[count], unit="images/s")
        if not rates or bench.late:
            yield "whole steps from the loader: not measured"
            return
        best = max(rates, key=lambda count: rates[count])
        with free(bench.device):
            drive = streamed(bench, folder, best)
            for _ in range(best + WARM_UP):
                drive.step()
            rate = 1e3 * batch / gpu_rig.mean_call(drive.step, bench.device, 2 * best)
            claim = f"{told}: whole step of clsa from the loader, {best} workers"
            yield Row(claim, rate, rates[best], "images/s", against="the loader alone")


def streamed(bench: Bench, folder: Path, workers: int) -> Drive:
    values = {"data": str(folder), "workers": workers, "resident_limit": 1e-6}
    source = open_source(str(folder), "train", DataOptions.parse(values, "loader"))
    return bench.made("clsa", 256, source, data=values)


def loader_rate(drive: Drive, workers: int, rounds: int = 2) -> float:
    """images/s of whole rounds, since the workers end their batches at about the same time."""
    for _ in range(workers):
        drive.next_crops()
    return (
        1e3 * drive.batch_size / gpu_rig.mean_call(drive.next_crops, drive.device, rounds * workers)
    )


# ---- running


def main() -> None:
    """Measure one part."""
    parser = report.parser(__doc__, threads=num_cores())
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tiny", dest="quick", action="store_true", help="the same as --quick")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (cuda)")
    parser.add_argument("--minutes", type=float, default=4, help="start nothing after these (4)")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement (3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8, 15], help="of the loader")
    parser.add_argument("--photos", type=Path, help="photographs for the loader, not drawn ones")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        why, hint = "this machine has no GPU", "add --device cpu --quick to try the script"
        raise ClsaError(f"device {args.device}", why, hint)
    torch.set_num_threads(args.threads)
    book = Book(args, list(PARTS))
    for made in PARTS[args.part](Bench(args)):
        book.add(made)
    book.publish()


PARTS = {"steps": steps, "compiled": compiled, "views": views, "loss": loss, "loader": loader}

if __name__ == "__main__":
    report.run(main)

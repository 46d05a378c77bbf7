"""How costs grow: start-up, batch, size, queue, views, memory over time, processes.

    python -m benchmarks.scale                       # about 4 minutes on 2 cores
    python -m benchmarks.scale --parts start memory
    python -m benchmarks.scale --parts start --files 1000000     # the budgets; 5 GB of disk

Each part has its own file of results. A start-up on fewer than a million files has a separate one
(start-small).
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as td
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from benchmarks import report
from benchmarks.drive import CPU, Drive
from benchmarks.report import Row, share, versus
from clsa.pictures.listing import MIN_CACHED
from clsa.system import dist
from clsa.training.step import train_step

CLASSES, FEW = 1000, 200  # FEW is more than one step, so that no probe runs first
SETTLED_S = 3.0  # the listing of a younger folder is not cached
COLD_S, CACHED_S, JUDGED, GROWTH = 60.0, 5.0, 1_000_000, 0.02
STEPS = (200, 2000)
TINY = """
batch_size: 8
epochs: 1000
data: {num_images: 800, workers: 1}
views: {size: 16, weak: {sizes: [16]}}
strong: {sizes: [16]}
model: {norm_groups: 2, projector_hidden: 32, projector_dim: 16}
method: {queue_size: 64}
"""
STREAMED = ["--resident-limit", "1e-6"]
BASE: dict[str, Any] = {"batch_size": 128, "size": 32, "queue": 4096, "strong": 1}
GRID: dict[str, Sequence[int]] = {
    "batch_size": (64, 128, 256, 512),
    "size": (32, 64),
    "queue": (4096, 16384, 65536),
    "strong": (1, 2, 3, 4, 5),
}


# ---- processes and their memory


class Watched:
    """`clsa pretrain` in its own process, on one thread, and the memory that it uses."""

    def __init__(self, out: Path, args: Sequence[str], **env: str):
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "clsa", "pretrain", "--out", str(out), *args]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        self.out, self.start = out, time.time()
        self.said = out.with_suffix(".said")
        with open(self.said, "w") as file:
            self.process = subprocess.Popen(command, env=variables, stdout=file, stderr=file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def runs(self) -> bool:
        """Whether the process still runs; raises RuntimeError with its output if it failed."""
        if self.process.poll():
            raise RuntimeError(self.said.read_text())
        return self.process.returncode is None

    def memory(self) -> tuple[float, ...]:
        """MB resident in the main process, resident in its workers, and private to the workers."""
        pid = self.process.pid
        try:
            workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            workers = []
        kinds = ("Rss:", "Private_")
        return _memory(pid, "Rss:"), *(sum(_memory(one, kind) for one in workers) for kind in kinds)

    def step(self) -> int:
        """Steps done according to metrics.jsonl."""
        try:
            lines = (self.out / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"] if lines else 0
        except (OSError, ValueError):
            return 0


def _memory(pid: int | str, kind: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process has ended
        return 0.0
    return sum(float(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


# ---- start


def write_pictures(root: Path, count: int, classes: int) -> None:
    """Write `count` JPEGs of 40 x 36 pixels into `classes` folders."""
    generator = np.random.default_rng(0)
    contents = []
    for _ in range(64):
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((40, 36)).save(buffer, "JPEG", quality=60)
        contents.append(buffer.getvalue())
    for number in range(count):
        if number < classes:
            (root / f"class{number:04d}").mkdir(parents=True)
        name = f"class{number % classes:04d}/picture{number:07d}.jpg"
        handle = os.open(root / name, os.O_CREAT | os.O_WRONLY)
        os.write(handle, contents[number % len(contents)])
        os.close(handle)


def start_up(out: Path, pictures: Path, cache: str) -> tuple[float, float, float]:
    """Seconds to the end of the first step; peak MB of the main process and of its worker."""
    args = ["--data", str(pictures), "--batch-size", "64", "--max-steps", "1", "--workers", "1"]
    most = [0.0, 0.0, 0.0]
    with Watched(out, [*args, *STREAMED], CLSA_CACHE=cache) as run:
        while run.runs:
            most = list(map(max, most, run.memory()))
            time.sleep(0.25)  # each look slows the process down
    return (out / "metrics.jsonl").stat().st_mtime - run.start, most[0], most[2]


def start_rows(folder: Path, pictures: Path, quick: bool) -> Iterator[Row]:
    """Start-up.

    `clsa pretrain` on a folder of tiny JPEGs in 1,000 classes, from the launch of the process to
    the end of the first step (the time of metrics.jsonl). The first start lists the folder ("listed
    anew"), the second reads the cached listing. The page cache is warm both times. Memory of the
    main process is its largest resident set; memory of the worker is only its private part.
    """
    count = num_files(pictures)
    cache, few = folder / "cache", folder / "few"
    write_pictures(few, FEW, 2)
    sides = [(f"{count:,} files, listed anew", pictures, str(cache), COLD_S)]
    if count > MIN_CACHED:
        sides.append((f"{count:,} files, cached listing", pictures, str(cache), CACHED_S))
    for name, data, place, limit in [*sides, (f"{FEW} files", few, "off", None)]:
        if data == pictures:
            cached = num_files(cache) > 0
            assert cached == ("cached" in name), f"{name}, but the cache says otherwise"
        taken, main, worker = start_up(folder / "run", data, place)
        judged = limit is not None and count >= JUDGED
        budget = (f"<= {limit:g} s", taken <= limit) if limit and judged else ("", None)
        claim = f"first step, {name}, page cache warm: from launch to its end"
        yield Row(claim, taken, None, "s", None, *budget)
        yield Row(f"memory of the main process, {name}", main, unit="MB")
        yield Row(f"private memory of its worker, {name}", worker, unit="MB")


def num_files(root: Path) -> int:
    """Number of files below `root`."""
    return sum(len(names) for _, _, names in os.walk(root))


# ---- work


def work_rows(folder: Path, pictures: Path, quick: bool) -> Iterator[Row]:
    """Cost of work.

    Whole steps of `clsa-small` on the resident drawings, one number changed at a time.
    """
    torch.set_num_threads(2)
    seen = []
    for name, values in GRID.items():
        for value in values[:2] if quick else values:
            point = {**BASE, **({"batch_size": 16} if quick else {}), name: value}
            if point not in seen:
                seen.append(point)
                told = "batch {batch_size}, {size} px, queue {queue:,}, {strong} strong"
                ms = ms_a_picture(2 if quick else 4, **point)
                yield Row(f"clsa-small, {told.format(**point)}", ms, unit="ms a picture")


def ms_a_picture(repeats: int, batch_size: int, size: int, queue: int, strong: int) -> float:
    """Median time of whole steps, per picture."""
    options = {
        "batch_size": batch_size,
        "views": {"size": size, "weak": {"sizes": [size]}},
        "strong": {"sizes": [size] * strong},
        "method": {"queue_size": queue},
    }
    with Drive("clsa-small", **options) as drive:
        times = report.alternate({"step": drive.step}, repeats)
    return 1e3 * report.medians(times)["step"] / batch_size


# ---- memory


def memory_rows(folder: Path, pictures: Path, quick: bool) -> Iterator[Row]:
    """Memory over time.

    Resident sets of two tiny runs at step 200 and at step 2,000, each the largest of ten samples.
    One run has resident drawings, the other streams JPEGs with a worker.
    """
    steps = (20, 60) if quick else STEPS
    tiny = folder / "tiny.yaml"
    tiny.write_text(TINY)
    args = ["--config", str(tiny), "--max-steps", str(steps[1] + 100), "--data"]
    streaming = [*args, str(pictures), *STREAMED]
    with (
        Watched(folder / "resident", [*args, "clipart"]) as resident,
        Watched(folder / "streamed", streaming, CLSA_CACHE=str(folder / "cache")) as streamed,
    ):
        runs = {"resident": resident, "streamed": streamed}
        samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
        while any(len(taken) < 2 for taken in samples.values()):
            for name, run in runs.items():
                if len(samples[name]) < 2 and run.step() >= steps[len(samples[name])]:
                    samples[name].append(largest(run.memory))
                elif not run.runs and len(samples[name]) < 2:
                    raise RuntimeError(f"the {name} run ended before it was measured")
            time.sleep(0.02)
    for name, taken in samples.items():
        yield from growth(f"tiny {name} run", steps, *taken)


def growth(
    run: str, steps: tuple[int, int], early: Sequence[float], late: Sequence[float]
) -> Iterator[Row]:
    """Rows of one run; a run without a worker has no row for it."""
    for place, before, after in zip(("main process", "worker"), early, late, strict=False):
        if before and not after:
            raise RuntimeError(f"{run}: the {place} had ended before it was measured again")
        if before:
            claim = f"{run}, {place}: growth of the resident set, step {steps[0]:,} to {steps[1]:,}"
            yield share(claim, after - before, before, at_most=GROWTH)
            yield Row(f"{run}, {place}: resident set at step {steps[1]:,}", after, unit="MB")


def largest(sample: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """The largest of ten samples of each kind, taken over several steps."""
    taken = []
    for _ in range(10):
        taken.append(sample())
        time.sleep(0.02)
    return tuple(map(max, zip(*taken, strict=True)))


# ---- processes


def process_rows(folder: Path, pictures: Path, quick: bool) -> Iterator[Row]:
    """Two processes.

    Two gloo processes of one thread each, compared with one process at the same global batch. The
    shares of exchanges in a step come from steps with and, in turn, without the exchange of
    gradients.
    """
    steps, batch = (2, 32) if quick else (6, 256)
    results = []
    for world in (1, 2):
        side = ["-m", "benchmarks.scale", "--side", str(steps), str(batch)]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command = [sys.executable, *(launch if world > 1 else []), *side]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        told = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not told:
            raise RuntimeError(done.stderr)
        results.append(json.loads(told[-1]))
    one, two = results
    rates = [batch / side["step"] for side in results]
    claim = f"clsa-small, global batch {batch}, 2 gloo processes of one thread"
    yield versus(claim, rates[1], rates[0], "images/s", "1 process of one thread")
    step = two["step"]
    gathers = f"of that step: exchanging pictures, keys, flags ({two['calls']:g} calls)"
    yield share(gathers, two["waited"], step)
    yield share("of that step: gradients, beyond what backward hides", step - two["alone"], step)
    assert one["calls"] == 0


def process_side(steps: int, batch: int) -> None:
    """In each process, time steps with and, in turn, without the exchange of gradients."""
    torch.set_num_threads(1)
    waited: list[float] = []
    with dist.process_group(CPU), timed_exchanges(waited):
        drive = Drive("clsa-small", batch_size=batch)
        model = drive.model
        pause = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
        together, alone, exchanged = [], [], []
        for number in range(2 * steps + 2):
            parted = number % 2 == 1
            crops = drive.next_crops()
            waited.clear()
            with pause() if parted else nullcontext():
                taken = report.seconds(lambda c=crops: train_step(model, drive.state, c, drive.run))
            if number >= 2:
                (alone if parted else together).append(taken)
                if not parted:
                    exchanged.append((sum(waited), len(waited)))
        result = {
            "step": statistics.median(together),
            "alone": statistics.median(alone),
            "waited": statistics.median(seconds for seconds, _ in exchanged),
            "calls": statistics.median(count for _, count in exchanged),
        }
        if dist.rank() == 0:
            print(json.dumps(result), flush=True)


@contextmanager
def timed_exchanges(waited: list[float]) -> Iterator[None]:
    """Make every gather and reduction that our code calls append its seconds to `waited`."""
    names = ("all_to_all_single", "all_gather", "all_reduce")
    plain = {name: getattr(td, name) for name in names}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **keywords)
            finally:
                waited.append(time.perf_counter() - start)

        return run

    for name in names:
        setattr(td, name, timed(plain[name]))
    try:
        yield
    finally:
        for name in names:
            setattr(td, name, plain[name])


Part = Callable[[Path, Path, bool], Iterator[Row]]
PARTS: dict[str, tuple[Part, int]] = {  # function, threads of each process
    "start": (start_rows, 1),
    "work": (work_rows, 2),
    "memory": (memory_rows, 1),
    "processes": (process_rows, 1),
}


def main() -> None:
    """Run the parts and publish the rows of each."""
    parser = report.parser(__doc__)
    parser.add_argument("--files", type=int, default=100_000, help="files for part start (100,000)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    parser.add_argument("--pictures", type=Path, help="existing folder of pictures to use")
    parser.add_argument("--side", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        process_side(*args.side)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = args.pictures or folder / "pictures"
        if {"start", "memory"} & set(args.parts) and not pictures.exists():
            write_pictures(pictures, 2 * CLASSES if args.quick else args.files, CLASSES)
            time.sleep(SETTLED_S)
        for part, (rows, threads) in PARTS.items():
            if part in args.parts:
                made = list(rows(folder, pictures, args.quick))
                small = part == "start" and num_files(pictures) < JUDGED
                title = f"Scale: {(rows.__doc__ or '').split('.')[0].lower()}"
                about = rows.__doc__
                report.publish(
                    f"{part}-small" if small else part, title, made, args, about, threads
                )
                args.started = time.monotonic()


if __name__ == "__main__":
    report.run(main)

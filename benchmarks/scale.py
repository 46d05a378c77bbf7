"""Cost against work: start-up, batch, pictures, queue, views, memory over time, processes.

    python -m benchmarks.scale                       # about 4 minutes on 2 cores
    python -m benchmarks.scale --files 1000000       # the budgets of start-up (5 GB of disk)
    python -m benchmarks.scale --parts start memory

- start: `clsa pretrain` on a folder of tiny JPEGs in 1,000 classes, from the launch of the process
  to the end of the first step (the time of metrics.jsonl), listed anew and from the cache; the page
  cache is warm. Memory of the main process is its largest resident set; of the worker's, only what
  it shares with nobody is told.
- work: images/s of `clsa-small` on the resident drawings, one number changed at a time.
- memory: resident sets of tiny runs at step 200 and at step 2,000, each the largest of ten samples.
- processes: two gloo processes of one thread against one, the same global batch.
- paper: bytes that a step exchanges, and the hours of 200 ImageNet epochs as a formula of the rate
  of one GPU. Calculated, not measured.
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
from benchmarks.on_paper import on_paper
from benchmarks.report import Row, versus
from clsa import dist
from clsa.listing import MIN_CACHED
from clsa.train import train_step

CLASSES, FEW = 1000, 100
SETTLED_S = 3.0  # a younger folder is not cached
COLD_S, CACHED_S, GROWTH = 60.0, 5.0, 0.02
STEPS = (200, 2000)
TINY = """
batch_size: 8
epochs: 1000
data: {num_images: 800, workers: 1}
views: {size: 16, weak: {sizes: [16]}, strong: {sizes: [16]}}
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
    """`clsa pretrain` in a process of its own, one thread, and the memory that it takes."""

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
        """Whether it still does; raises RuntimeError with its message when it has failed."""
        if self.process.poll():
            raise RuntimeError(self.said.read_text())
        return self.process.returncode is None

    def memory(self) -> tuple[float, ...]:
        """MB resident in the main process, resident in its workers, and private to those."""
        pid = self.process.pid
        try:
            workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            workers = []
        kinds = ("Rss:", "Private_")
        return _memory(pid, "Rss:"), *(sum(_memory(one, kind) for one in workers) for kind in kinds)

    def step(self) -> int:
        """Steps done, by metrics.jsonl."""
        try:
            lines = (self.out / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"] if lines else 0
        except (OSError, ValueError):
            return 0


def _memory(pid: int | str, kind: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return sum(float(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


# ---- start


def write_pictures(root: Path, count: int, classes: int) -> None:
    """`count` JPEGs of 40 x 36 pixels in as many folders as there are classes."""
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
    """Seconds to the end of the first step; largest MB of the main process and of its worker."""
    args = ["--data", str(pictures), "--batch-size", "64", "--max-steps", "1", "--workers", "1"]
    most = [0.0, 0.0, 0.0]
    with Watched(out, [*args, *STREAMED], CLSA_CACHE=cache) as run:
        while run.runs:
            most = list(map(max, most, run.memory()))
            time.sleep(0.25)  # looking costs the process time
    return (out / "metrics.jsonl").stat().st_mtime - run.start, most[0], most[2]


def start_rows(folder: Path, pictures: Path, count: int) -> Iterator[Row]:
    """Start-up on all files, listed anew and cached, and on a few."""
    cache, out, full = str(folder / "cache"), folder / "run", count >= 1_000_000
    few = folder / "few"
    write_pictures(few, FEW, 2)
    sides = {
        f"{count:,} files, listed anew": (pictures, cache, COLD_S),
        f"{count:,} files, cached listing": (pictures, cache, CACHED_S),
        f"{FEW} files": (few, "off", None),
    }
    if count <= MIN_CACHED:
        sides.pop(f"{count:,} files, cached listing")
    for name, (data, place, limit) in sides.items():
        seconds, main, worker = start_up(out, data, place)
        judged = full and limit is not None
        budget = f"<= {limit:g} s" if judged else ""
        met = seconds <= limit if judged and limit is not None else None
        yield Row(f"launch to the end of the first step, {name}", seconds, None, "s", None,
                  budget, met)  # fmt: skip
        yield Row(f"memory of the main process, {name}", main, unit="MB")
        yield Row(f"private memory of its worker, {name}", worker, unit="MB")


# ---- work


def work_rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Images/s, one number of `BASE` changed at a time."""
    seen = set()
    for name, values in GRID.items():
        for value in values[:2] if quick else values:
            point = {**BASE, **({"batch_size": 16} if quick else {}), name: value}
            if tuple(point.items()) in seen:
                continue
            seen.add(tuple(point.items()))
            rate = images_per_s(folder / f"{name}{value}", 2 if quick else 4, **point)
            told = "batch {batch_size}, {size} px, queue {queue:,}, {strong} strong".format(**point)
            yield Row(f"clsa-small, {told}", rate, unit="images/s")


def images_per_s(
    out: Path, repeats: int, batch_size: int, size: int, queue: int, strong: int
) -> float:
    """Rate of whole steps by their median time."""
    views = {"size": size, "weak": {"sizes": [size]}, "strong": {"sizes": [size] * strong}}
    options = {"batch_size": batch_size, "views": views, "method": {"queue_size": queue}}
    with Drive("clsa-small", out, **options) as drive:
        times = report.alternate({"step": drive.step}, repeats)
    return batch_size / report.medians(times)["step"]


# ---- memory


def memory_rows(folder: Path, pictures: Path, steps: tuple[int, int]) -> Iterator[Row]:
    """Growth of resident and streamed runs, both at once on a core each."""
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
    for name, (early, late) in samples.items():
        places = {"main process": 0, "worker": 1}
        for place, i in places.items():
            if early[i]:
                grown = late[i] / early[i] - 1
                claim = f"tiny {name} run at step {steps[1]:,}, {place} ({grown:+.1%})"
                yield Row(claim, late[i], early[i], "MB", early[i] / late[i], "<= +2 %",
                          grown <= GROWTH, f"at step {steps[0]}")  # fmt: skip


def largest(sample: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """The largest of ten samples of each kind, over some steps."""
    taken = []
    for _ in range(10):
        taken.append(sample())
        time.sleep(0.02)
    return tuple(map(max, zip(*taken, strict=True)))


# ---- processes


def process_rows(folder: Path, steps: int, batch: int) -> Iterator[Row]:
    """Two processes against one, and where their time goes."""
    results = []
    for world in (1, 2):
        side = ["-m", "benchmarks.scale", "--side", str(folder / f"world{world}")]
        side += ["--steps", str(steps), "--batch", str(batch)]
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
    yield Row(gathers, 100 * two["waited"] / step, unit="%")
    hidden = "of that step: gradients, beyond what backward hides"
    yield Row(hidden, 100 * max(0.0, step - two["alone"]) / step, unit="%")
    assert one["calls"] == 0


def process_side(folder: Path, steps: int, batch: int) -> None:
    """In each process: time steps with and, in turn, without the exchange of gradients."""
    torch.set_num_threads(1)
    waited: list[float] = []
    with dist.process_group(CPU), timed_exchanges(waited):
        out = folder / f"rank{dist.rank()}"
        drive = Drive("clsa-small", out, batch_size=batch)
        model = drive.model
        pause = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
        together, alone, exchanged = [], [], []
        for number in range(2 * steps + 2):
            parted = number % 2 == 1
            crops = next(drive.batches)
            waited.clear()
            start = time.perf_counter()
            with pause() if parted else nullcontext():
                train_step(model, drive.state, crops, drive.run)
            taken = time.perf_counter() - start
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
    """Have every gather and reduction that our code asks for append its seconds to `waited`."""
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


PARTS = ("start", "work", "memory", "processes", "paper")


def main() -> None:
    """Run the parts and publish their rows."""
    parser = report.parser(__doc__, threads=2)
    parser.add_argument("--files", type=int, default=100_000, help="for start (100,000)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--pictures", type=Path, help="a folder that such a run has left here")
    for name, kind in (("side", Path), ("steps", int), ("batch", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        process_side(args.side, args.steps, args.batch)
        return
    torch.set_num_threads(args.threads)
    quick = args.quick
    count = 2 * CLASSES if quick else args.files
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = args.pictures or folder / "pictures"
        if {"start", "memory"} & set(args.parts) and not pictures.exists():
            write_pictures(pictures, count, CLASSES)
            time.sleep(SETTLED_S)
        if "start" in args.parts:
            rows += start_rows(folder, pictures, count)
        if "work" in args.parts:
            rows += work_rows(folder, quick)
        if "memory" in args.parts:
            rows += memory_rows(folder, pictures, (20, 60) if quick else STEPS)
        if "processes" in args.parts:
            rows += process_rows(folder, 2 if quick else 6, 32 if quick else 256)
    notes = [on_paper()] if "paper" in args.parts else []
    report.publish("scale", "Scale", rows, args, notes=notes)


if __name__ == "__main__":
    report.run(main)

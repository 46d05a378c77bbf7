"""What `benchmarks/gpu.py` measures with: a run on any device, its clocks, its phases."""

import gc
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.drive import Drive
from benchmarks.photographs import prepared
from clsa import train
from clsa.bank import KeyQueue
from clsa.color import BLUR_TAPS
from clsa.host import num_cores
from clsa.methods import clsa, moco
from clsa.options import ViewOptions
from clsa.sources import Pictures
from clsa.views import MAX_SIGMA, MEAN, MIN_SIGMA, STD
from tests.pictures import encoded, photograph

WARM_UP, LEAST, MOST = 3, 5, 50


@lru_cache(maxsize=1)
def pictures(side: int, count: int) -> Pictures:
    """Noise of one size: the values change no time here."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Pictures(images, np.full(count, -1), [])


@contextmanager
def jpegs(photos: Path | None, count: int) -> Iterator[tuple[Path, str]]:
    """A folder of `count` JPEGs of 500x375, quality 88, and what they are.

    Args:
        photos: a folder of photographs to cut them from; None: gradients, blobs and grain.
    """
    if photos:
        with prepared(photos, 500, 375, 88, count) as folder:
            yield folder, "photographs of 500x375"
        return

    def draw(i: int) -> int:
        image, grain = photograph(i, 375, 500).astype(np.float32), np.random.default_rng(i)
        for coarse, strength in ((2, 20), (6, 40)):  # as heavy a file as photographs make
            noise = 128 + strength * grain.normal(size=(375 // coarse, 500 // coarse))
            drawn = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((500, 375))
            image += np.asarray(drawn, np.float32)[..., None] - 128
        data = encoded(image.clip(0, 255).astype(np.uint8), "JPEG", quality=88)
        (folder / f"{i:05d}.jpg").write_bytes(data)
        return len(data)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ThreadPoolExecutor(num_cores()) as pool:
            sizes = list(pool.map(draw, range(count)))
        yield folder, f"synthetic JPEGs of 500x375, {np.mean(sizes) / 1000:.0f} kB each"


def unit_rows(
    batch: int, queue: int, dim: int, num_queries: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Sets of queries that want a gradient, and a bank of batch and queue, all of unit rows."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        drawn = torch.randn(rows, dim, generator=generator)
        return nn.functional.normalize(drawn, dim=1).to(device)

    return [unit(batch).requires_grad_() for _ in range(num_queries)], unit(batch + queue)


def kornia_weak(
    options: ViewOptions, size: int, images: Tensor, device: torch.device
) -> Callable[[], Tensor]:
    """kornia's weak recipe on the same uint8 batch."""
    from kornia import augmentation

    weak = options.weak
    steps = nn.Sequential(
        augmentation.RandomResizedCrop((size, size), scale=options.scale),
        augmentation.ColorJitter(*weak.jitter, p=weak.jitter_probability),
        augmentation.RandomGrayscale(p=weak.grayscale),
        augmentation.RandomGaussianBlur(
            (BLUR_TAPS, BLUR_TAPS), (MIN_SIGMA, MAX_SIGMA), p=weak.blur
        ),
        augmentation.RandomHorizontalFlip(p=weak.flip),
        augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ).to(device)
    return lambda: steps(images.float() / 255)


# ---- clocks


class Clock:
    """Marks on the time line of a device: its own events on CUDA, wall time on a CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """The present, once the work given to the device so far is done."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def ms(self, start: Any, end: Any) -> float:
        """From one mark to another; call `wait` before."""
        return start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)


def each_call(once: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median ms of a call, over about `seconds`, without waiting between the calls."""
    return statistics.median(_marked(once, device, seconds))


def _marked(once: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    clock = Clock(device)
    for _ in range(WARM_UP if seconds else 1):
        once()
    clock.wait()
    start = time.perf_counter()
    once()
    clock.wait()
    taken = time.perf_counter() - start
    count = min(MOST, max(LEAST, int(seconds / taken))) if seconds else 2
    marks = [clock.mark()]
    for _ in range(count):
        once()
        marks.append(clock.mark())
    clock.wait()
    return [clock.ms(a, b) for a, b in itertools.pairwise(marks)]


def alternately(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float
) -> list[float]:
    """Median ms of each call, measured in two halves in turn: a change of clocks hits all."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(2 if seconds else 1):
        for call, taken in zip(calls, times, strict=True):
            taken += _marked(call, device, seconds / 2)
    return [statistics.median(taken) for taken in times]


def mean_call(once: Callable[[], object], device: torch.device, count: int) -> float:
    """Mean ms of `count` calls: what counts where they come in bursts."""
    clock = Clock(device)
    clock.wait()
    start = time.perf_counter()
    for _ in range(count):
        once()
    clock.wait()
    return 1e3 * (time.perf_counter() - start) / count


def peak_gib(once: Callable[[], object], device: torch.device) -> float | None:
    """Most memory in use during a call, in GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    once()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


@contextmanager
def free(device: torch.device) -> Iterator[None]:
    """Afterwards the device's memory and what torch has compiled are free again."""
    try:
        yield
    finally:
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


# ---- phases


class Spans:
    """How long named calls inside a step take, on the device and on the host.

    On a GPU a span holds the waits in it: of a device that has nothing to do until the host gives
    it the next operation, too.
    """

    def __init__(self, device: torch.device):
        self.clock = Clock(device)
        self.found: dict[str, list[tuple[Any, Any, float]]] = defaultdict(list)
        self.missing: list[str] = []

    def of(self, drive: Drive, repeats: int = 5) -> dict[str, tuple[float, float]]:
        """Medians over some steps, in ms: on the device, on the host."""
        optimizer = drive.state.optimizer
        places: list[tuple[Any, str, str]] = [
            (drive, "next_crops", "crops"),
            (train, "make_views", "views"),
            (moco, "encode_shuffled", "keys: shuffle and encoder"),
            (moco, "info_nce", "contrastive loss, forward"),
            (clsa, "contrast_and_divergence", "both losses, forward"),
            (torch.nn.utils, "get_total_norm", "gradient norm"),
            (train, "require_finite", "the host's look at the loss"),
            (optimizer, "step", "optimiser"),
            (moco, "move_towards", "momentum copy"),
            (KeyQueue, "enqueue", "queue"),
        ]
        totals: dict[str, list[tuple[float, float]]] = defaultdict(list)
        with ExitStack() as stack:
            for target, attribute, name in places:
                inner = getattr(target, attribute, None)
                if inner is None:
                    self.missing.append(attribute)
                    continue
                stack.enter_context(patch.object(target, attribute, self._wrap(name, inner)))
            for _ in range(repeats):
                self.found.clear()
                drive.step()
                self.clock.wait()
                for name, calls in self.found.items():
                    device_ms = sum(self.clock.ms(start, end) for start, end, _ in calls)
                    totals[name].append((device_ms, 1e3 * sum(host for *_, host in calls)))
        return {
            name: (statistics.median(a for a, _ in taken), statistics.median(b for _, b in taken))
            for name, taken in totals.items()
        }

    def _wrap(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*args: Any, **kwargs: Any) -> Any:
            start, host = self.clock.mark(), time.perf_counter()
            result = inner(*args, **kwargs)
            self.found[name].append((start, self.clock.mark(), time.perf_counter() - host))
            return result

        return outer


def busy(once: Callable[[], object], device: torch.device) -> tuple[float, int, str] | None:
    """Share of a call's time in which kernels run, their number, and the ten longest; CUDA only."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    once()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        once()
        torch.cuda.synchronize()
    events = seen.events() or []
    kernels = [event.time_range for event in events if event.device_type.name == "CUDA"]
    if not kernels:
        return None
    first, last = min(span.start for span in kernels), max(span.end for span in kernels)
    table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=10)
    return sum(span.elapsed_us() for span in kernels) / (last - first), len(kernels), table

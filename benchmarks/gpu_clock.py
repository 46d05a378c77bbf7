"""Measures times, memory and the phases of a step on any device, for `benchmarks/gpu.py`."""

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import report
from benchmarks.drive import Drive
from benchmarks.report import Row
from clsa.learning.bank import KeyQueue
from clsa.methods import moco
from clsa.methods.wrappers import stronger
from clsa.training import step

WARM_UP, LEAST, MOST = 3, 5, 50


def mean_ms(once: Callable[[], object], device: torch.device, count: int) -> float:
    """Mean ms of `count` consecutive calls; the device is idle before and after them."""

    def all_of_them() -> None:
        for _ in range(count):
            once()
        wait(device)

    wait(device)
    return 1e3 * report.seconds(all_of_them) / count


def wait(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternately(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float
) -> list[float]:
    """Mean ms of each call, over about `seconds`; if `seconds` is 0, over two calls.

    All calls are measured once, then all again, so that a change of clock rates affects all alike.
    """
    halves: list[list[float]] = [[] for _ in calls]
    for _ in range(2 if seconds else 1):
        for call, found in zip(calls, halves, strict=True):
            mean_ms(call, device, WARM_UP if seconds else 1)
            one = mean_ms(call, device, 1)
            count = min(MOST, max(LEAST, int(500 * seconds / one))) if seconds else 2
            found.append(mean_ms(call, device, count))
    return [statistics.mean(found) for found in halves]


def peak_gib(once: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory in use during a call, in GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    once()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


@contextmanager
def free(device: torch.device) -> Iterator[None]:
    """On exit, free the device's memory and everything that torch has compiled."""
    try:
        yield
    finally:
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


# ---- phases


class Spans:
    """Measures how long named calls inside a step take, on the device and on the host.

    On a GPU a span includes all waits, also those of an idle device for the next operation from
    the host.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.found: dict[str, list[tuple[Any, Any, float]]] = defaultdict(list)
        self.missing: list[str] = []

    def of(self, drive: Drive, repeats: int = 5) -> dict[str, tuple[float, float]]:
        """Medians over `repeats` steps, in ms: on the device, on the host."""
        optimizer = drive.state.optimizer
        places: list[tuple[Any, str, str]] = [
            (drive, "next_crops", "crops"),
            (step, "make_views", "views"),
            (moco, "encode_shuffled", "keys: shuffle and encoder"),
            (moco, "streams", "contrastive loss, forward"),
            (moco, "contrast", "contrastive loss, forward"),
            (stronger, "streams", "divergence, forward"),
            (stronger, "divergence", "divergence, forward"),
            (torch.nn.utils, "get_total_norm", "gradient norm"),
            (step, "agree", "the host's look at the loss"),
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
                wait(self.device)
                for name, calls in self.found.items():
                    device_ms = sum(self._between(start, end) for start, end, _ in calls)
                    totals[name].append((device_ms, 1e3 * sum(host for *_, host in calls)))
        return {
            name: (statistics.median(a for a, _ in taken), statistics.median(b for _, b in taken))
            for name, taken in totals.items()
        }

    def _mark(self) -> Any:
        """The current time on the device: an event on CUDA, wall time on a CPU."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        on_gpu = self.device.type == "cuda"
        return start.elapsed_time(end) if on_gpu else 1e3 * (end - start)

    def _wrap(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*args: Any, **kwargs: Any) -> Any:
            start, host = self._mark(), time.perf_counter()
            result = inner(*args, **kwargs)
            self.found[name].append((start, self._mark(), time.perf_counter() - host))
            return result

        return outer


def busy(once: Callable[[], object], device: torch.device) -> tuple[float, int, str] | None:
    """Share of a call in which kernels run, their number, a table of the ten longest; CUDA only."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    once()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        once()
        torch.cuda.synchronize()
    events = seen.events() or []
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    )
    if not kernels:
        return None
    at_work, reached = 0.0, kernels[0][0]
    for start, end in kernels:  # kernels of different streams overlap
        at_work += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=10)
    return at_work / (reached - kernels[0][0]), len(kernels), table


def breakdown(drive: Drive, named: str) -> Iterator[Row | str]:
    """The phases of a step: time on the device, with waits for the host, and time on the host."""
    spans = Spans(drive.device)
    for phase, (device_ms, host_ms) in spans.of(drive).items():
        yield Row(f"{named}: {phase}", device_ms, unit="ms")
        yield Row(f"{named}: {phase}, on the host", host_ms, unit="ms")
    if spans.missing:
        yield f"{named}: not found, so not timed: {', '.join(spans.missing)}"
    working = busy(drive.step, drive.device)
    if working is not None:
        share_busy, kernels, table = working
        yield Row(f"{named}: device at work during a step", 100 * share_busy, unit="%")
        yield Row(f"{named}: kernels a step", kernels, unit="")
        print(table)

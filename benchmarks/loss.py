"""The loss of CLSA* (5 weak x 5 strong) on one pass over the bank against the written-out version.

    python -m benchmarks.loss [--batch 128 --queue 65536 --dim 128 --repeat 3]

Each side runs forward and backward in a process of its own, on one thread; memory is the growth of
the process's peak resident set (Linux). Prints both, the ratios, and the largest difference of
gradients.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference import written_out

from clsa.losses import contrast_and_divergence

SIDES = ("written out", "one pass")


def measure(side: str, batch: int, queue: int, dim: int, repeat: int) -> dict[str, object]:
    """Best time in s, extra peak memory in MB, loss, and the first gradients of one side."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)

    bank, positive = unit(batch + queue), torch.arange(batch)
    queries = [unit(batch).requires_grad_() for _ in range(10)]
    weak, strong = queries[:5], queries[5:]

    def once() -> torch.Tensor:
        for query in queries:
            query.grad = None
        if side == "one pass":
            terms = contrast_and_divergence(weak, strong, bank, positive)
            loss = terms.contrast + terms.divergence
        else:
            loss = written_out(weak, strong, bank, positive)
        loss.backward()
        return loss

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_mb("VmRSS")
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        loss = once()
        times.append(time.perf_counter() - start)
    peak = memory_mb("VmHWM") - before
    grads = [query.grad[0].tolist() for query in queries if query.grad is not None]
    return {"seconds": min(times), "peak_mb": peak, "loss": loss.item(), "grads": grads}


def memory_mb(field: str) -> float:
    """A line of /proc/self/status in MB (VmRSS: resident now, VmHWM: its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    """Run both sides and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("batch", 128), ("queue", 65536), ("dim", 128), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (args.batch, args.queue, args.dim, args.repeat)
    if args.side:
        print(json.dumps(measure(args.side, *sizes)))
        return
    results = []
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.loss", "--side", side]
        for name in ("batch", "queue", "dim", "repeat"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout))
        seconds, memory, loss = (results[-1][key] for key in ("seconds", "peak_mb", "loss"))
        print(f"{side:12} {seconds:7.2f} s  {memory:7.0f} MB  loss {loss:.5f}")
    plain, ours = results
    wanted, got = (torch.tensor(side["grads"]) for side in results)
    faster = plain["seconds"] / ours["seconds"]
    smaller = plain["peak_mb"] / ours["peak_mb"]
    gap = (wanted - got).abs().max() / wanted.abs().max()
    print(f"{faster:.1f}x faster, 1/{smaller:.0f} of the memory, gradients differ by {gap:.1e}")
    sizes_told = f"B {args.batch}, K {args.queue}, D {args.dim}"
    print(f"CLSA* 5 x 5, {sizes_told}, 1 thread, torch {torch.__version__}, {platform.machine()}")


if __name__ == "__main__":
    main()

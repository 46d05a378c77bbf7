"""The loss of CLSA* in one pass over the bank, against a written-out and a chunked log-softmax.

    python -m benchmarks.loss                    # about 3 minutes

Forward and backward of W + W S terms (W weak, S strong queries), on one thread. Written out: a
softmax matrix per pair and a copy of the bank per term, as in the official code. Chunked:
log-softmax in plain torch; logsumexp over chunks of the bank, then a second pass for the
expectations, each chunk checkpointed so that its matrices are not kept. Every side runs in its own
process; memory is the growth of its peak resident set (Linux). The gradients of all sides are
compared. The main sizes have all figures, the others only times.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import report
from benchmarks.report import Row, versus
from clsa.learning.losses import contrast_and_divergence
from clsa.system.errors import ClsaError, Exit
from tests.support.reference import written_out

TEMPERATURE = 0.2
CHUNK = 4096
SIDES = ("one pass", "written out", "chunked")
FASTER, SMALLER = 5.0, 10.0  # budgets compared with written out, at the first sizes
MAX_GAP = 1e-4  # largest difference of gradients, relative to the largest gradient


class Sizes(NamedTuple):
    """Queries per view, length of the queue, length of a projection, weak and strong views."""

    batch: int = 128
    queue: int = 65536
    dim: int = 128
    weak: int = 5
    strong: int = 5

    def __str__(self) -> str:
        told = f"{self.weak}x{self.strong}, B {self.batch}, K {self.queue:,}, D {self.dim}"
        return f"CLSA {told}"


GRID = (
    Sizes(),
    Sizes(batch=32),
    Sizes(queue=4096),
    Sizes(queue=16384),
    Sizes(dim=256),
    Sizes(weak=1, strong=1),
    Sizes(weak=1),
)


def chunked(weak: list[Tensor], strong: list[Tensor], bank: Tensor, positive: Tensor) -> Tensor:
    """The same loss in plain torch; backward keeps only (views, B) numbers per chunk."""
    parts, queries = bank.split(CHUNK), torch.stack([*weak, *strong])
    found = torch.stack([_checkpointed(_partition, queries, part) for part in parts])
    lse, num_weak = torch.logsumexp(found, 0), len(weak)
    own = (queries[:num_weak] * bank[positive]).sum(2) / TEMPERATURE
    loss = (lse[:num_weak] - own).mean(1).sum()
    for part in parts:
        loss = loss + _checkpointed(_cross_entropy, queries, lse, part, num_weak)
    return loss


def _checkpointed(function: Callable[..., Tensor], *given: Tensor | int) -> Tensor:
    result = checkpoint(function, *given, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result


def _partition(queries: Tensor, part: Tensor) -> Tensor:
    return torch.stack([torch.logsumexp(query @ part.T / TEMPERATURE, 1) for query in queries])


def _cross_entropy(queries: Tensor, lse: Tensor, part: Tensor, num_weak: int) -> Tensor:
    """- sum of t log r over all pairs and the rows of a chunk; the targets t are summed first."""
    targets, targets_lse = queries[:num_weak].detach(), lse[:num_weak].detach()
    terms = []
    t = torch.zeros(len(lse[0]), len(part))
    for query, total in zip(targets, targets_lse, strict=True):
        t += torch.exp(query @ part.T / TEMPERATURE - total[:, None])
    for query, total in zip(queries[num_weak:], lse[num_weak:], strict=True):
        terms.append((t * (query @ part.T / TEMPERATURE - total[:, None])).sum(1).mean())
    return -torch.stack(terms).sum()


def unit_rows(sizes: Sizes, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Weak and strong queries with gradient, and the bank (batch and queue), all of norm 1."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        drawn = torch.randn(rows, sizes.dim, generator=generator)
        return F.normalize(drawn, dim=1).to(device)

    bank = unit(sizes.batch + sizes.queue)
    queries = [unit(sizes.batch).requires_grad_() for _ in range(sizes.weak + sizes.strong)]
    return queries[: sizes.weak], queries[sizes.weak :], bank


def measure(side: str, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Best time in s, extra peak memory in MB and the gradients of each view's first query."""
    torch.set_num_threads(1)
    weak, strong, bank = unit_rows(sizes, torch.device("cpu"))
    queries, positive = [*weak, *strong], torch.arange(sizes.batch)

    def once() -> None:
        for query in queries:
            query.grad = None
        if side == "one pass":
            terms = contrast_and_divergence(weak, strong, bank, positive, TEMPERATURE)
            loss = terms.contrast + terms.divergence
        elif side == "chunked":
            loss = chunked(weak, strong, bank, positive)
        else:
            loss = written_out(weak, strong, bank, positive, TEMPERATURE)
        loss.backward()

    _checkpointed(torch.sin, torch.zeros(1))  # the first call in a process loads modules
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_mb("VmRSS")
    times = [report.seconds(once) for _ in range(repeats)]
    peak = memory_mb("VmHWM") - before
    grads = [query.grad[0].tolist() for query in queries if query.grad is not None]
    return {"seconds": min(times), "peak_mb": peak, "grads": grads}


def memory_mb(field: str) -> float:
    """A line of /proc/self/status in MB (VmRSS: resident now, VmHWM: its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def apart(side: str, sizes: Sizes, repeats: int) -> dict:
    """`measure` in its own process."""
    command = [sys.executable, "-m", "benchmarks.loss", "--side", side]
    command += ["--sizes", *map(str, sizes), "--repeat", str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compare(sizes: Sizes, repeats: int, main: bool) -> tuple[list[Row], float]:
    """The rows of one point of the grid, and the largest relative difference of gradients.

    Args:
        main: whether these are the sizes of the budgets; other sizes give only times.
    """
    found = {side: apart(side, sizes, repeats) for side in SIDES}
    ours = found["one pass"]
    wanted = torch.tensor(found["written out"]["grads"])
    gap = max(
        float((wanted - torch.tensor(found[side]["grads"])).abs().max() / wanted.abs().max())
        for side in ("one pass", "chunked")
    )
    if not gap < MAX_GAP:
        why = f"gradients differ by {gap:.1e} of the largest"
        raise ClsaError(f"{sizes}", why, "the sides do not compute the same loss", Exit.BUG)
    rows = []
    for side in SIDES[1:]:
        budgets = (FASTER, SMALLER) if main and side == "written out" else (None, None)
        kinds = [("seconds", "time", "s"), ("peak_mb", "extra peak memory", "MB")]
        for (name, told, unit), limit in zip(kinds, budgets, strict=True):
            if main or name == "seconds":
                figures = ours[name], found[side][name]
                rows.append(versus(f"{sizes}: {told}", *figures, unit, side, limit, True))
    return rows, gap


def main() -> None:
    """Run every point of the grid, or one side of one point."""
    parser = report.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="best of N (3; 2 for other sizes)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, Sizes(*args.sizes), args.repeat)))
        return
    grid = (Sizes(8, 5000, 16, 2, 2),) if args.quick else GRID
    rows, gaps = [], []
    for number, sizes in enumerate(grid):
        repeats = args.repeat if number == 0 else min(args.repeat, 2)
        found, gap = compare(sizes, repeats, main=number == 0)
        rows += found
        gaps.append(gap)
        print(f"{sizes}: done", file=sys.stderr)
    notes = [
        "Forward and backward on one thread, each side in its own process. Gradients of all sides "
        f"agree to {max(gaps):.0e} of the largest. Written out: a softmax matrix per pair, as in "
        f"the official code; chunked: plain torch in checkpointed chunks of {CHUNK:,} rows."
    ]
    report.publish("loss", "Loss of CLSA", rows, args, __doc__, threads=1, notes=notes)


if __name__ == "__main__":
    report.run(main)

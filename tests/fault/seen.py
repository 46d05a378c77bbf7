"""Records, inside an attempt, what a run has seen of each picture."""

import json
import os
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from clsa.loading import crops
from clsa.system import dist
from clsa.training import fit
from clsa.views import transform
from clsa.views.specs import ViewSpec


class Seen(NamedTuple):
    """The log of one run, over all its starts and processes."""

    steps: dict[int, list[list[list[Any]]]]
    """For each step, in the order of training, one entry per process: rank, numbers of the
    pictures, numbers that their views are drawn from, loss."""
    drawn: dict[tuple[Any, ...], Any]
    """Box and flip of a crop (key: "cut", epoch, view, picture), jitter and operations ("pixels",
    ...)."""
    faults: list[str]
    """Draws that were repeated with another result."""

    def order(self) -> dict[int, list[int]]:
        """Pictures of the global batch of each step, in the order of ranks."""
        return {
            step: [number for row in sorted(rows) for number in row[1]]
            for step, rows in self.steps.items()
        }

    def losses(self) -> dict[int, float]:
        """The loss of each step: mean over the processes."""
        return {
            step: sum(float(row[3]) for row in rows) / len(rows)  # pyright: ignore
            for step, rows in self.steps.items()
        }


def watch(log: Path, stop_at: Collection[int] = ()) -> None:
    """Write every crop, draw and step to `log`; loader workers, forked later, also write.

    Args:
        stop_at: numbers of steps; a signal to stop comes at the beginning of each.
    """
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    cuts, sample, step_of = crops.Plan.cuts, transform.sample, fit.train_step

    def tell(lines: list[Any]) -> None:
        os.write(handle, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def cut(self: crops.Plan, epoch: int, drawn: Any, heights: Any, widths: Any) -> Any:
        found = cuts(self, epoch, drawn, heights, widths)
        tell(
            [
                [["cut", epoch, spec.view, number], [box, flip]]
                for spec, (boxes, flips) in zip(self.specs, found, strict=True)
                for number, box, flip in zip(
                    drawn.tolist(), boxes.tolist(), flips.tolist(), strict=True
                )
            ]
        )
        return found

    def sampled(spec: ViewSpec, seed: int, epoch: int, drawn: Any) -> transform.Params:
        found = sample(spec, seed, epoch, drawn)
        rows = zip(*(values.tolist() for values in found), strict=True)
        numbers = drawn.tolist()
        tell([[["pixels", epoch, spec.view, n], row] for n, row in zip(numbers, rows, strict=True)])
        return found

    def stepped(model: Any, state: Any, crops: Any, run: Any) -> Any:
        if state.step + 1 in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        step, stats = state.step, step_of(model, state, crops, run)
        rows = crops.index.tolist(), crops.drawn.tolist()
        tell([[["step", step], [dist.rank(), *rows, float(stats.terms["loss"])]]])
        return stats

    crops.Plan.cuts, transform.sample, fit.train_step = cut, sampled, stepped


def read(log: Path) -> Seen:
    """Read the log that `watch` wrote."""
    seen = Seen({}, {}, [])
    for line in log.read_text().splitlines():
        key, told = json.loads(line)
        if key[0] == "step":
            seen.steps.setdefault(key[1], []).append(told)
        elif seen.drawn.setdefault(tuple(key), told) != told:
            seen.faults.append(f"{key} drawn again, with another result")
    return seen

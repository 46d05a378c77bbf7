"""Checks 8 and 10: a stop anywhere does not change a run; the same seed gives the same run."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clsa.loading.order import Order
from clsa.options.run import RunOptions
from clsa.runs import checkpoint
from clsa.system.errors import Exit
from clsa.views import transform
from clsa.views.specs import ViewSpec
from tests.fault import seen, tiny
from tests.fault.damage import Tally

EPOCHS, LAST = 3, 18
STOPS = {
    "the first step": [1],
    "amid an epoch": [9],
    "before the last batch of an epoch": [11],
    "an epoch's end": [12],
    "before the last step, at the last": [17, 18],
    "three times in an epoch": [7, 9, 10],
}
# (probe_every, loader processes of the starts in turn)
VARIANTS: list[tuple[int, tuple[int, ...]]] = [
    (0, (0,)), (1, (0,)), (0, (2,)), (1, (2,)), (0, (0, 2)), (1, (2, 1, 0)),
]  # fmt: skip
NOTE = "note: bitwise equality not promised: "


def classed(root: Path) -> Path:
    """The tiny pictures in two classes, so that the probe has labels."""
    tiny.make_pictures(root)
    (root / "all").rename(root / "a")
    (root / "b").mkdir()
    for path in sorted((root / "a").iterdir())[50:]:
        path.rename(root / "b" / path.name)
    return root


def options(pictures: Path, out: Path, **over: Any) -> RunOptions:
    """18 steps with weak and strong views, saved only at stops and ends of epochs."""
    given = {"recipe": "clsa-small", "epochs": EPOCHS, "save_minutes": 15, **over}
    return tiny.options(pictures, out, strong={"sizes": (16,)}, **given)


def scramble(seed: int) -> None:
    """Change the state of every global generator."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _global_generator() -> None:
    """A bad resume: a global generator, which no checkpoint saves, draws the jitter."""
    sample = transform.sample

    def drawn(spec: ViewSpec, seed: int, epoch: int, index: Any) -> transform.Params:
        return sample(spec, seed + int(np.random.randint(1 << 30)), epoch, index)

    transform.sample = drawn


def _order_anew() -> None:
    """A bad resume: each start begins the epoch's order at its first picture, as loaders
    without a saved state do."""
    indices, first = Order.indices, list[int]()

    def taken(self: Order, step: int) -> Any:
        first.append(step)
        return indices(self, step - first[0] % self.steps_per_epoch)

    Order.indices = taken


MUTANTS: dict[str, Callable[[], None]] = {
    "jitter from a global generator": _global_generator,
    "the order begins anew": _order_anew,
}


def mutants(pictures: Path, root: Path) -> Tally:
    """Runs that do not resume exactly: the check must detect both kinds."""
    tally = Tally()
    for name, mutate in MUTANTS.items():
        logs = [
            stopped(pictures, root / f"{name}-{k}", "fp32", stops, VARIANTS[0], mutate)[2]
            for k, stops in enumerate(([], [9]))
        ]
        whole, cut = map(seen.read, logs)
        tally.note(whole.steps != cut.steps and whole.drawn != cut.drawn, f"{name}: not detected")
    return tally


def stopped(
    pictures: Path,
    root: Path,
    precision: str,
    stops: list[int],
    variant: tuple[int, Any],
    mutate: Callable[[], None] = lambda: None,
) -> tuple[list[str], Path, Path]:
    """A run stopped by a signal at each of `stops`: what went wrong, its folder, its log."""
    root.mkdir()
    (probe_every, workers), out, log, wrong = variant, root / "run", root / "seen", []
    turns = itertools.cycle(workers)
    for start, (stop, count) in enumerate(zip([*stops, 0], turns, strict=False)):
        run = options(pictures, out, precision=precision, probe_every=probe_every)
        run = run.model_copy(update={"data": run.data.model_copy(update={"workers": count})})

        def body(run: RunOptions = run, stop: int = stop, start: int = start) -> int:
            scramble(17 + start)
            mutate()
            seen.watch(log, [stop])
            return tiny.pretrain(run)

        code, said = tiny.attempt(body, root / "log")
        expected = Exit.PREEMPTED if 0 < stop < LAST else Exit.OK
        if code != expected or NOTE in said:
            wrong.append(f"stop {stop} ended with {code}: {said.splitlines()[-1:]}")
        if stop and (newest := tiny.newest_whole(out)) != stop:
            wrong.append(f"stopped at {stop}, saved {newest}")
    return wrong, out, log


def stops(pictures: Path, root: Path, cases: list[tuple[str, str, int]]) -> Tally:
    """Compare each case (precision, name of the stops, variant) with an uninterrupted run."""
    tally, whole = Tally(), dict[str, tuple[str, seen.Seen, dict[int, float]]]()
    for precision in sorted({precision for precision, *_ in cases}):
        wrong, out, log = stopped(pictures, root / precision, precision, [], VARIANTS[0])
        if wrong:
            raise RuntimeError(str(wrong))
        whole[precision] = checkpoint.run_digest(out), seen.read(log), tiny.losses(out)
    for precision, name, variant in cases:
        place = root / f"{precision}-{name}-{variant}".replace(" ", "-")
        wrong, out, log = stopped(pictures, place, precision, STOPS[name], VARIANTS[variant])
        digest, log_of_whole, losses = whole[precision]
        found = seen.read(log)
        wrong += found.faults[:1]
        if found.steps != log_of_whole.steps:
            wrong.append("other pictures or losses, or some steps twice")
        if found.drawn != log_of_whole.drawn:
            wrong.append("other crops or jitter")
        if checkpoint.run_digest(out) != digest or tiny.losses(out) != losses:
            wrong.append("another digest, or another log")
        tally.note(not wrong, f"{place.name}: {wrong}")
    return tally


# ---- the seed, and what else the bits depend on


def seeds(pictures: Path, root: Path, count: int) -> Tally:
    """The same seed `count` times, then `count` other seeds."""
    tally, digests = Tally(), list[str]()
    for number in range(2 * count):
        out, seed = root / f"seed-{number}", max(0, number - count + 1)

        def body(out: Path = out, seed: int = seed, number: int = number) -> int:
            scramble(number)
            return tiny.pretrain(options(pictures, out, seed=seed, max_steps=8))

        code, said = tiny.attempt(body, root / "log")
        digests.append(checkpoint.run_digest(out) if not code else said)
        same = digests[-1] == digests[0] and not code
        is_new = len(set(digests)) == number - count + 2 and not code
        tally.note(same if number < count else is_new, f"seed {seed}, try {number}: {code}")
    return tally


def environments(pictures: Path, root: Path) -> Tally:
    """One line reports other threads, torch or processor; with the same there is no line."""
    tally, out = Tally(), root / "run"

    def go_on(stop: int, threads: int) -> list[str]:
        def body() -> int:
            return tiny.pretrain(options(pictures, out, max_steps=stop, threads=threads))

        code, said = tiny.attempt(body, root / "log")
        lines = [line for line in said.splitlines() if line.startswith(NOTE)]
        return [line.removeprefix(NOTE) for line in lines] if not code else [said]

    def forge(**over: str) -> None:
        path = tiny.manifests(out)[tiny.newest_whole(out)]
        facts = json.loads(path.read_text())
        facts["environment"] |= over
        path.write_text(json.dumps(facts))

    tally.note(go_on(2, 1) == [] == go_on(4, 1), "a note without a difference")
    tally.note(go_on(6, 2) == ["threads 1 -> 2"], "more threads")
    tally.note(go_on(7, 1) == ["threads 2 -> 1"], "fewer threads")
    forge(torch="2.0.1")
    tally.note(go_on(8, 1) == [f"torch 2.0.1 -> {torch.__version__}"], "another torch")
    forge(cpu="x86_64 NONE")
    (line, *more) = go_on(9, 1)
    tally.note(line.startswith("cpu x86_64 NONE -> ") and not more, "another processor")
    return tally

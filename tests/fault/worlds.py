"""Check 11: a run resumes with another number of processes (gloo), on the same pictures."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from clsa.learning import models
from clsa.options.run import RunOptions
from clsa.runs import checkpoint
from clsa.system.errors import Exit
from tests.fault import seen, tiny
from tests.fault.damage import Tally
from tests.fault.resumes import NOTE

CHANGES = [(1, 2), (2, 1), (2, 4), (4, 1)]
STOP, LAST = 4, 24
CLOSE = 1e-5  # largest relative difference of a loss
HOW = "processes {} -> {}; each process has its own batch norm statistics"


def options(pictures: Path, out: Path, **over: Any) -> RunOptions:
    """Options of 24 steps, 20 of them after the stop."""
    given = {"epochs": 4, "save_minutes": 15, "precision": "fp32", **over}
    return tiny.options(pictures, out, model={"norm_groups": 4}, **given)


def without_batch_norm() -> None:
    """In an attempt: use an encoder without batch norm, so that process counts do not matter."""

    def create(*_: Any) -> nn.Module:
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
        encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        encoder.num_features = encoder.head_hidden_size = 16  # pyright: ignore
        return encoder

    tiny.shrink_encoder = lambda *_: setattr(models, "_create", create)


def in_processes(world: int, run: RunOptions, root: Path, log: Path) -> tuple[list[int], str]:
    """A start in `world` processes, like torchrun's: exit codes and output."""
    said = root / "said"
    for path in root.glob("said.*"):
        path.unlink()

    def body() -> int:
        without_batch_norm()
        seen.watch(log)
        return tiny.pretrain(run)

    codes = [tiny.wait(pid) for pid in tiny.start_ranks(world, body, said)]
    told = sorted(root.glob("said.*"))
    return codes, "".join(path.read_text(errors="replace") for path in told)


def state_of(out: Path) -> dict[str, torch.Tensor]:
    """Weights, key network and queue at the end."""
    saved = checkpoint.load_newest(out / "checkpoints")
    return saved.state["method"] if saved else {}


def changes(pictures: Path, root: Path, seeds: int, pairs: list[tuple[int, int]]) -> Tally:
    """Each pair of process counts with each seed, compared with an uninterrupted single process."""
    tally = Tally()
    for seed in range(seeds):
        place = root / f"seed-{seed}"
        place.mkdir()
        whole, log = place / "whole", place / "seen-whole"
        codes, said = in_processes(1, options(pictures, whole, seed=seed), place, log)
        if codes != [0]:
            raise RuntimeError(said)
        one = seen.read(log)
        for before, after in pairs:
            out, log = place / f"{before}-{after}", place / f"seen-{before}-{after}"
            run = options(pictures, out, seed=seed, max_steps=STOP)
            codes, first = in_processes(before, run, place, log)
            run = options(pictures, out, seed=seed)
            more, said = in_processes(after, run, place, log)
            wrong = [] if not any(codes + more) else [f"{codes}, {more}: {(first + said)[-300:]}"]
            found = seen.read(log)
            if found.order() != one.order() or found.drawn != one.drawn or found.faults:
                wrong.append("other pictures or crops, or some lost or twice")
            losses, expected = found.losses(), one.losses()
            gaps = [abs(losses.get(n, 0) / loss - 1) for n, loss in expected.items()]
            if max(gaps) > CLOSE or len(losses) != LAST:
                wrong.append(f"losses differ by {max(gaps):.1e}")
            ends, theirs = state_of(out), state_of(whole)
            if not all(torch.allclose(ends[k], theirs[k], 1e-3, 1e-5) for k in theirs):
                wrong.append("weights or queue differ")
            if said.count(NOTE) != 1 or NOTE + HOW.format(before, after) not in said:
                wrong.append("no note, or more than one")
            tally.note(not wrong, f"{before} -> {after}, seed {seed}: {wrong}")
    return tally


def indivisible(pictures: Path, root: Path) -> Tally:
    """A batch of 16 for three processes: all refuse it, and the run stays unchanged."""
    tally, out, log = Tally(), root / "run", root / "seen"
    codes, said = in_processes(2, options(pictures, out, max_steps=STOP), root, log)
    before = checkpoint.run_digest(out)
    more, said = in_processes(3, options(pictures, out), root, log)
    same = checkpoint.run_digest(out) == before
    right = codes == [0, 0] and more == [Exit.USAGE] * 3 and "not divisible among 3" in said
    tally.note(right and same, f"{codes}, {more}: {said[-300:]}")
    return tally

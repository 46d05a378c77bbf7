"""Check 1: kills of a whole process group, half of them aimed at a save. Check 2: bad savers."""

import copy
import hashlib
import io
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clsa.runs import checkpoint
from clsa.runs.state import State
from clsa.system import files
from tests.fault import tiny
from tests.fault.tiny import EPOCH, Setup

AIM_S = 0.05
INSIDE = 0.4  # share of kills that must hit a save; below it, a storm proves nothing


class Storm(NamedTuple):
    """The result of a storm of kills."""

    kills: int
    inside: int
    """Kills that interrupted a save."""
    finished: int
    """Runs that finished."""
    faults: list[str]

    def is_void(self, share: float = INSIDE) -> bool:
        """Whether too few kills hit a save."""
        return self.inside < share * self.kills


def storm(
    setup: Setup,
    root: Path,
    kills: int,
    seed: int,
    workers: int = 0,
    mutate: Callable[[], None] = lambda: None,
    first_fault: bool = False,
    until: float = float("inf"),
) -> Storm:
    """Kill and resume until `kills` kills are done and the last run has finished.

    Args:
        setup: pictures, and the results of an uninterrupted run.
        root: parent of the run folders.
        kills: number of kills.
        seed: seed of the random times and aims.
        workers: number of loader processes.
        mutate: called in every attempt, to make its saver a bad one.
        first_fault: whether to stop at the first fault.
        until: time (monotonic) at which to stop early.
    """
    rng, faults, done, inside, finished = random.Random(seed), [], 0, 0, 0
    out, fresh = root / "run-0", True
    while True:
        over = (done >= kills or time.monotonic() > until) and fresh
        if over or (faults and first_fault):
            break
        expected, seen, log = tiny.newest_whole(out), root / "resumed", root / "log"
        seen.unlink(missing_ok=True)
        log.unlink(missing_ok=True)

        def body(out: Path = out, seen: Path = seen) -> int:
            mutate()
            tiny.note_resumed(seen)
            return tiny.pretrain(tiny.options(setup.pictures, out, data={"workers": workers}))

        pid = tiny.start(body, log)
        if done >= kills or time.monotonic() > until:
            code = tiny.wait(pid)  # the last run may finish
        elif done % 2:
            code = _kill_in_a_save(pid, out, rng)
        else:
            code = _kill_after(pid, rng.uniform(0.0, 0.5 * setup.seconds))
        wrong = []
        if seen.exists() and int(seen.read_text()) != expected:
            wrong.append(f"resumed from {seen.read_text()}, not {expected}")
        if any(setup.losses[step] != loss for step, loss in tiny.losses(out).items()):
            wrong.append("a replayed step has another loss")
        if code is None:
            done += 1
            inside += bool(tiny.leftovers(out / "checkpoints"))
            fresh = False
            wrong += _what_is_wrong(out)
        else:
            if code or not tiny.is_same(setup, out):
                tail = log.read_text(errors="replace").splitlines()[-1:]
                wrong.append(f"ended with {code}, or another digest: {tail}")
            wrong += [f"{name} was left" for name in tiny.leftovers(out)]
            finished += 1
            out, fresh = root / f"run-{finished}", True
        faults += [f"kill {done}: {each}" for each in wrong]
        if wrong and not fresh:
            out, fresh = root / f"run-{finished}-{len(faults)}", True
    return Storm(done, inside, finished, faults)


def _what_is_wrong(out: Path) -> list[str]:
    """Wrong states after a kill: a manifest without its data, or more than an epoch lost."""
    wrong = [
        f"{path.name} is there without its data"
        for path in tiny.manifests(out).values()
        if not tiny.is_whole(path)
    ]
    lost = max(tiny.losses(out), default=0) - tiny.newest_whole(out)
    return wrong + ([f"{lost} steps are lost"] if lost > EPOCH else [])


def _kill_after(pid: int, seconds: float) -> int | None:
    """Kill after `seconds`; return the exit code if the run ended first."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if (code := tiny.ended(pid)) is not None:
            return code
        time.sleep(0.002)
    tiny.kill(pid)
    return None


def _kill_in_a_save(pid: int, out: Path, rng: random.Random) -> int | None:
    """Kill 0 to 50 ms after one of the next saves begins; the exit code if the run ended first."""
    skip, folder = rng.randrange(3), out / "checkpoints"
    known = _data(folder)
    while (code := tiny.ended(pid)) is None:
        now = _data(folder)
        if now - known:
            if not skip:
                time.sleep(rng.uniform(0.0, AIM_S))
                tiny.kill(pid)
                return None
            skip -= 1
        known |= now
        time.sleep(0.0005)
    return code


def _data(folder: Path) -> set[str]:
    """Names of the steps with a checkpoint file, complete or not."""
    names = os.listdir(folder) if folder.is_dir() else []
    return {name.lstrip(".").partition(".")[0] for name in names if ".ckpt" in name}


# ---- bad savers


def _in_place() -> None:
    def save(folder: Path, name: str, state: dict[str, Any], facts: dict[str, Any]) -> Path:
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.ckpt"
        for old in [*folder.glob("step-*.ckpt"), *folder.glob("step-*.json")]:
            old.rename(path.with_suffix(old.suffix))
        with open(path, "wb") as file:
            torch.save(state, file)
        data = path.read_bytes()
        manifest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), **facts}
        path.with_suffix(".json").write_text(json.dumps(manifest))
        return path

    checkpoint.save = save


def _manifest_first() -> None:
    def save(folder: Path, name: str, state: dict[str, Any], facts: dict[str, Any]) -> Path:
        folder.mkdir(exist_ok=True)
        path, memory = folder / f"{name}.ckpt", io.BytesIO()
        torch.save(state, memory)
        data = memory.getvalue()
        manifest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), **facts}
        files.write_text(path.with_suffix(".json"), json.dumps(manifest))
        files.write_atomic(path, lambda file: file.write(data))
        return path

    checkpoint.save = save


def _without(part: str) -> Callable[[], None]:
    """Resume without the state of `part`, as if it had not been saved."""

    def mutate() -> None:
        resume = State.resume

        def forgetful(self: State) -> list[str]:
            method, optimizer = self.method, copy.deepcopy(self.optimizer.state_dict())
            own = {key: value.clone() for key, value in method.state_dict().items() if part in key}
            notes = resume(self)
            if part == "optimizer":
                self.optimizer.load_state_dict(optimizer)
            elif part == "step":
                self.step = 0
            else:
                assert own
                method.load_state_dict(own, strict=False)
            return notes

        State.resume = forgetful

    return mutate


MUTANTS: dict[str, Callable[[], None]] = {
    "in place": _in_place,
    "manifest before data": _manifest_first,
    "without the queue": _without("queue"),
    "without the key network": _without("key_network"),
    "without the optimizer": _without("optimizer"),
    "without the step": _without("step"),
}

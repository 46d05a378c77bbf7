"""Check 6: deleting old checkpoints never removes the last good one and never ends a run."""

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from clsa.runs import checkpoint
from tests.fault import tiny
from tests.fault.damage import Tally, flip
from tests.fault.machine import has
from tests.fault.tiny import EPOCH, Setup

MOST = checkpoint.NUM_KEPT + 2  # kept, resumed from, being written


def watch_deletions(out: Path, noted: Path, most: int = MOST) -> None:
    """In an attempt: record a wrong deletion: it leaves no good checkpoint or comes too late."""
    resumed = tiny.newest_whole(out)

    def hook(name: str, args: tuple[Any, ...]) -> None:
        path = str(args[0]) if name == "os.remove" else ""
        if not path.endswith((".ckpt", ".json")) or not Path(path).match("checkpoints/step-*"):
            return
        step = int(Path(path).stem[5:])
        others = [p for s, p in tiny.manifests(out).items() if s != step and tiny.is_whole(p)]
        whole = tiny.is_whole(Path(path).with_suffix(".json"))
        held = step == resumed and whole
        count = len(list((out / "checkpoints").glob("*.ckpt")))
        if not others or held or count > most:
            with open(noted, "a") as file:
                file.write(f"{step}: {len(others)} others, held {held}, {count} files\n")

    sys.addaudithook(hook)


def kills(setup: Setup, root: Path, count: int, seed: int) -> Tally:
    """Kill between publishing a checkpoint and the end of the pruning that follows."""
    rng, tally, out, noted = random.Random(seed), Tally(), root / "run", root / "noted"
    runs = 0
    while tally.tries < count:
        out = root / f"run-{runs}"

        def body(out: Path = out) -> int:
            watch_deletions(out, noted)
            return tiny.pretrain(tiny.options(setup.pictures, out))

        pid, known, skip = (
            tiny.start(body, root / "log"),
            set(tiny.manifests(out)),
            rng.randrange(4),
        )
        while (code := tiny.ended(pid)) is None:
            new = set(tiny.manifests(out)) - known
            known |= new
            skip -= bool(new)
            if skip < 0:
                time.sleep(rng.uniform(0.0, 0.005))
                tiny.kill(pid)
                break
            time.sleep(0.0005)
        if code is not None:
            runs += 1
            tally.note(code == 0 and tiny.is_same(setup, out), f"ended with {code}")
        wrong = noted.read_text() if noted.exists() else ""
        good = tiny.newest_whole(out) > 0 or code is not None
        tally.note(good and not wrong, wrong or "no good checkpoint is left")
        noted.unlink(missing_ok=True)
    return tally


def damaged(setup: Setup, root: Path) -> Tally:
    """With the newest two damaged, the run resumes from the third, with stops and new saves.

    The third stays until the end, and the damaged ones do not count among the newest.
    """
    tally, out, noted = Tally(), root / "run", root / "noted"
    over = {"max_steps": 3 * EPOCH, "save_minutes": 15, "keep_every": 1}
    code, said = tiny.attempt(
        lambda: tiny.pretrain(tiny.options(setup.pictures, out, **over)), root / "log"
    )
    for step in (12, 18):
        flip(out / f"checkpoints/step-{step:06d}.ckpt")

    def body(steps: int | None) -> int:
        watch_deletions(out, noted, most=3 + MOST)  # three are marked to keep
        return tiny.pretrain(tiny.options(setup.pictures, out, max_steps=steps, save_minutes=15))

    for steps, left in ((8, 8), (10, 10), (None, 120)):
        code, said = tiny.attempt(lambda steps=steps: body(steps), root / "log")
        wrong = noted.read_text() if noted.exists() else ""
        right = code == 0 and not wrong and tiny.newest_whole(out) == left
        tally.note(right, f"up to {steps}: {code}, {wrong}: {said.splitlines()[-2:]}")
    tally.note(tiny.is_same(setup, out), "another result")
    return tally


def refused(setup: Setup, root: Path) -> Tally:
    """A checkpoint that cannot be deleted is reported, and the run finishes."""
    tally, out = Tally(), root / "run"

    def body() -> int:
        save = checkpoint.save

        def spied(folder: Path, name: str, *rest: Any) -> Path:
            path = save(folder, name, *rest)
            if name == f"step-{EPOCH:06d}":
                for each in (path, path.with_suffix(".json")):
                    os.system(f"chattr +i {each}")
            return path

        checkpoint.save = spied
        try:
            return tiny.pretrain(tiny.options(setup.pictures, out, save_minutes=15))
        finally:
            os.system(f"chattr -i {out}/checkpoints/*")

    if has("chattr"):
        code, said = tiny.attempt(body, root / "log")
        right = code == 0 and tiny.is_same(setup, out) and "warning: cannot delete" in said
        tally.note(right and "Traceback" not in said, f"{code}: {said.splitlines()[-2:]}")
    return tally

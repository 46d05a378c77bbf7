"""Check 20: no resource grows over thousands of steps or stays after many starts and stops."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from clsa.system.errors import Exit
from clsa.training import fit
from tests.fault import preempt, tiny
from tests.fault.crew import left_of
from tests.fault.damage import Tally
from tests.fault.tiny import EPOCH, Setup

STEPS, WARM = 3000, 500
SLOPE_MB = 1.0  # per 1,000 steps
CYCLES = 20


def _note_resources(path: Path) -> None:
    """In an attempt: record resident kB, open files, threads, /dev/shm entries every 50 steps."""
    take, own = fit.train_step, os.getpid()

    def noted(model: Any, state: Any, *rest: Any) -> Any:
        if state.step % 50 == 0 and os.getpid() == own:
            facts = Path("/proc/self/status").read_text().split()
            kb, threads = (int(facts[facts.index(key) + 1]) for key in ("VmRSS:", "Threads:"))
            files, shared = len(os.listdir("/proc/self/fd")), len(os.listdir("/dev/shm"))
            with open(path, "a") as file:
                file.write(f"{state.step} {kb} {files} {threads} {shared}\n")
        return take(model, state, *rest)

    fit.train_step = noted


def long_run(setup: Setup, root: Path) -> tuple[Tally, str]:
    """3,000 steps with a save every six, and a probe of the whole set after each epoch."""
    tally, out, notes = Tally(), root / "run", root / "notes"
    over = {"epochs": STEPS // EPOCH, "data": {"workers": 2}, "probe_every": 1, "log_every": 10}

    def body() -> int:
        preempt.probe_everything(lambda: None, times=1)
        _note_resources(notes)
        return tiny.pretrain(tiny.options(setup.pictures, out, **over))

    pid = tiny.start(body, root / "log")
    code = tiny.wait(pid, 1200.0)
    table = np.loadtxt(notes)
    steps, kb, files, threads, shared = table[table[:, 0] >= WARM].T
    slope = np.polyfit(steps, kb, 1)[0] * 1000 / 1024
    tally.note(code == 0 and not left_of(pid), f"ended with {code}")
    tally.note(slope <= SLOPE_MB, f"grows by {slope:.2f} MB in 1,000 steps")
    for name, values in (("files", files), ("threads", threads), ("/dev/shm", shared)):
        half = len(values) // 2
        grown = np.median(values[half:]) - np.median(values[:half])
        tally.note(grown <= 0, f"{name}: {grown} more")
    return tally, f"{slope:+.2f} MB in 1,000 steps"


def cycles(setup: Setup, root: Path, count: int, seed: int) -> Tally:
    """One run, stopped many times, every fourth time by kill -9 of the main process only."""
    tally, rng, out = Tally(), random.Random(seed), root / "run"
    before = set(os.listdir("/dev/shm"))
    for number in range(count):
        run = tiny.options(setup.pictures, out, data={"workers": 2})
        aim, moment = rng.randrange(3, 9), root / f"moment-{number}"

        def body(run: Any = run, aim: int = aim, moment: Path = moment) -> int:
            preempt.mark(fit, "train_step", aim)(moment)
            return tiny.pretrain(run)

        pid = tiny.start(body, root / f"log-{number}")
        give_up = time.monotonic() + tiny.PATIENCE_S
        while not moment.exists() and time.monotonic() < give_up:
            time.sleep(0.001)
        hard = number % 4 == 3
        os.kill(pid, signal.SIGKILL if hard else signal.SIGTERM)
        code = tiny.wait(pid)
        give_up = time.monotonic() + 2
        while left_of(pid) and time.monotonic() < give_up:
            time.sleep(0.01)
        expected = -signal.SIGKILL if hard else Exit.PREEMPTED
        tally.note(
            code == expected and not left_of(pid) and set(os.listdir("/dev/shm")) <= before,
            f"cycle {number}: {code}, left {left_of(pid)}, {set(os.listdir('/dev/shm')) - before}",
        )
        with suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
    code, said = tiny.attempt(
        lambda: tiny.pretrain(tiny.options(setup.pictures, out)), root / "log"
    )
    tally.note(code == 0 and tiny.is_same(setup, out), f"final start: {code}, {said[-300:]}")
    return tally

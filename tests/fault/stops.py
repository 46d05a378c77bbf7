"""Checks 14 and 15 with two processes: a signal to one of them or to both."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clsa.methods.moco import MoCo
from clsa.runs import checkpoint
from clsa.system import dist, signals, slurm
from clsa.system.errors import Exit
from clsa.training import fit, start
from tests.fault import preempt, ranks, tiny
from tests.fault.damage import Tally
from tests.fault.tiny import EPOCH, Setup

WORLD = 2
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
HEARERS = ((1,), (0, 1), (0,))


def _at_begin(_: random.Random) -> Callable[[Callable[[], object]], None]:
    def patch(here: Callable[[], object]) -> None:
        assemble = start.assemble

        def watched(*given: Any) -> Any:
            here()
            return assemble(*given)

        start.assemble = watched

    return patch


def _in_step(rng: random.Random) -> Callable[[Callable[[], object]], None]:
    nth = rng.randrange(2, ranks.LAST - 4)

    def patch(here: Callable[[], object]) -> None:
        take = fit.train_step

        def watched(model: Any, state: Any, *rest: Any) -> Any:
            if state.step == nth:
                here()
            return take(model, state, *rest)

        fit.train_step = watched

    return patch


def _in_preparation(rng: random.Random) -> Callable[[Callable[[], object]], None]:
    nth = rng.randrange(ranks.LAST // EPOCH)

    def patch(here: Callable[[], object]) -> None:
        def prepare(self: MoCo, epoch: int, embed: Any) -> dict[str, float]:
            if epoch == nth:
                here()
                embed(self.network)
            return {}

        MoCo.before_epoch = prepare  # pyright: ignore

    return patch


def _in_save(rng: random.Random) -> Callable[[Callable[[], object]], None]:
    nth = rng.randrange(1, ranks.LAST // EPOCH)

    def patch(here: Callable[[], object]) -> None:
        save = fit.Saver.save

        def watched(self: Any, *rest: Any, **named: Any) -> None:
            if self.state.step == nth * EPOCH:
                here()
            save(self, *rest, **named)

        fit.Saver.save = watched  # pyright: ignore

    return patch


MOMENTS = {"begin": _at_begin, "step": _in_step, "preparation": _in_preparation, "save": _in_save}


def cases(count: int) -> list[tuple[int, tuple[int, ...], str]]:
    """`count` cases (signal, ranks that get it, moment), those that differ most first."""
    every = list(itertools.product(SIGNALS, HEARERS, MOMENTS))
    first: list[Any] = [
        (signal.SIGUSR1, (1,), "preparation"),
        (signal.SIGUSR1, (1,), "step"),
        (signal.SIGTERM, (0, 1), "save"),
    ]
    rest = [case for case in every if case not in first]
    return list(itertools.islice(itertools.cycle([*first, *rest]), count))


def stops(setup: Setup, root: Path, count: int, seed: int) -> Tally:
    """Each case with a fake scontrol that takes a second; then a new start."""
    tally, rng, expected = Tally(), random.Random(seed), ranks.whole(setup, root, WORLD)
    for number, (signum, hearers, place) in enumerate(cases(count)):
        out, log, at = root / f"run-{number}", root / f"log-{number}", root / f"at-{number}"
        at.mkdir()
        scontrol = at / "scontrol"
        scontrol.write_text(preempt.SCONTROL + "sleep 1")
        scontrol.chmod(0o755)
        run, patch = ranks.options(setup.pictures, out), MOMENTS[place](rng)

        def before(
            patch: Any = patch, hearers: Any = hearers, signum: int = signum, at: Path = at
        ) -> None:
            signal.signal(signum, signal.SIG_DFL)
            signals.leave_at_once()
            os.environ.update({**preempt.JOB, "PATH": f"{at}:/usr/bin:/bin"})
            slurm.TIMEOUT_S = 5.0
            patch(lambda: dist.rank() in hearers and os.kill(os.getpid(), signum))

        began = time.monotonic()
        pids = ranks.start(run, WORLD, log, before)
        left: dict[int, float] = {}
        codes: dict[int, int] = {}
        while len(codes) < WORLD and time.monotonic() - began < tiny.PATIENCE_S:
            for rank, pid in enumerate(pids):
                if rank not in codes and (code := tiny.ended(pid)) is not None:
                    codes[rank], left[rank] = code, time.monotonic()
            time.sleep(0.005)
        for rank in set(range(WORLD)) - set(codes):
            tiny.kill(pids[rank])
        said = [log.with_name(f"{log.name}.{rank}").read_text() for rank in range(WORLD)]
        wrong = [] if set(codes.values()) == {Exit.PREEMPTED} else [f"codes {codes}"]
        wrong += [text for text in said if text.count("error: ") != 1 or "Traceback" in text]
        path = out / "status.json"
        status = json.loads(path.read_text()) if path.exists() else {}
        if place == "begin":
            wrong += ["the run folder was left"] if out.exists() else []
        elif (status.get("code"), status.get("resumable")) != (Exit.PREEMPTED, True):
            wrong.append(f"status {status}")
        if status.get("step", 0) != tiny.newest_whole(out):
            wrong.append(f"saved {tiny.newest_whole(out)}, status {status}")
        calls = scontrol.with_suffix(".calls")
        heard = calls.read_text() if calls.exists() else ""
        if heard != ("requeue\n777\n--\n" if signum == signal.SIGUSR1 else ""):
            wrong.append(f"scontrol got {heard!r}")
        if len(left) == WORLD and left[0] - left[1] > 1:
            wrong.append(f"rank 1 left {left[0] - left[1]:.1f} s before rank 0")
        again = [tiny.wait(pid) for pid in ranks.start(run, WORLD, log, lambda: None)]
        if any(again) or (checkpoint.run_digest(out), tiny.losses(out)) != expected:
            wrong.append(f"then {again}, or another run")
        name = signal.Signals(signum).name
        tally.note(not wrong, f"{name} to {hearers} in a {place} {number}: {wrong}")
    return tally


def launched(setup: Setup, root: Path, count: int) -> Tally:
    """USR1 to torchrun itself, with the options from README, during a run of two processes."""
    tally, readme = Tally(), (ranks.ROOT / "README.md").read_text("utf-8")
    told = re.findall(r"`(--(?:signals-to-handle|shutdown-timeout) \S+?)`", readme)
    for number in range(count):
        out, at = root / f"run-{number}", root / f"at-{number}"
        at.mkdir()
        scontrol = at / "scontrol"
        scontrol.write_text(preempt.SCONTROL)
        scontrol.chmod(0o755)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            *" ".join(told).split(), "-m", "clsa", "pretrain", "--data", str(setup.pictures),
            "--out", str(out), "--recipe", "moco-v2-small", "--batch-size", "16",
            "--epochs", "4000", "--views.size", "16", "--log-every", "1", "--device", "cpu",
        ]  # fmt: skip
        env = {**os.environ, **preempt.JOB, "PATH": f"{at}:/usr/bin:/bin",
               "PYTHONPATH": str(ranks.ROOT)}  # fmt: skip
        with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as launcher:
            give_up = time.monotonic() + tiny.PATIENCE_S
            while not tiny.losses(out) and time.monotonic() < give_up:
                time.sleep(0.05)
            launcher.send_signal(signal.SIGUSR1)
            _, said = launcher.communicate(timeout=tiny.PATIENCE_S)
        path, calls = out / "status.json", scontrol.with_suffix(".calls")
        status = json.loads(path.read_text()) if path.exists() else {}
        heard = calls.read_text() if calls.exists() else ""
        saved = status.get("step", 0) == tiny.newest_whole(out) > 0
        is_right = saved and (status["code"], status["resumable"]) == (Exit.PREEMPTED, True)
        is_right = is_right and heard == "requeue\n777\n--\n" and len(told) == 2
        tally.note(is_right, f"{told}: {status}, scontrol got {heard!r}, {said[-300:]}")
    return tally

"""Checks 14 and 15: signals at any moment, requeueing by SLURM, a second Ctrl-C."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from clsa.evaluate.features.extract import extract, frozen
from clsa.evaluate.features.split import Split
from clsa.loading import streaming
from clsa.methods.moco import MoCo
from clsa.runs import checkpoint, saver
from clsa.runs.state import State
from clsa.system import signals, slurm
from clsa.system.errors import ClsaError, Exit
from clsa.training import fit, online_probe, start
from tests.fault import tiny
from tests.fault.damage import Tally
from tests.fault.tiny import EPOCH, STEPS, Setup

LIMIT_S = 10.0
AHEAD_S = 0.05

Body = Callable[[Path], object]
"""In an attempt: patch the code so that a file appears when a certain moment is reached."""


def mark(owner: Any, name: str, nth: int = 1, after: bool = False) -> Body:
    """The moment of the n-th call of a function, or of its return."""

    def patch(path: Path) -> None:
        call, calls = getattr(owner, name), 0

        def marked(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth and not after:
                path.touch()
            found = call(*args, **named)
            if calls == nth and after:
                path.touch()
            return found

        setattr(owner, name, marked)

    return patch


def _slow_pictures(path: Path) -> None:
    """The first batch never arrives."""

    def stuck(*_: Any) -> None:
        path.touch()
        time.sleep(600)

    streaming._Steps._open_first = stuck  # pyright: ignore


def _long_preparation(path: Path) -> None:
    """The preparation of the third epoch takes long: it embeds the whole set again and again."""

    def prepare(self: MoCo, epoch: int, embed: Any) -> dict[str, float]:
        if epoch == 2:
            path.touch()
            for _ in range(10_000):
                embed(self.network)
        return {}

    MoCo.before_epoch = prepare  # pyright: ignore


def _refused_save(path: Path) -> None:
    """A long preparation, after a failed save at the end of the previous epoch."""
    save = State.save

    def refused(self: State, keep: bool, best: bool) -> None:
        if self.step == 2 * EPOCH and not path.exists():
            raise ClsaError("save", "no room", "make room", Exit.IO) from OSError(28, "no room")
        save(self, keep, best)

    State.save = refused
    _long_preparation(path)


def _long_probe(path: Path) -> None:
    """The online probe takes long."""
    probe_everything(path.touch, times=10_000)


def probe_everything(begun: Callable[[], object], times: int) -> None:
    """In an attempt: the online probe embeds the whole set `times` times and needs no labels."""
    init = online_probe.OnlineProbe.__init__

    def begin(self: online_probe.OnlineProbe, state: Any, source: Any, *rest: Any) -> None:
        init(self, state, source, *rest)
        self.every, self.parts, self.data_digest = 1, Split(source, source, "itself"), ""

    def probe(encoder: Any, parts: Split, *rest: Any) -> float:
        begun()
        with frozen(encoder):
            for _ in range(times):
                extract(encoder, parts.bank, np.arange(len(parts.bank)), *rest)
        return 0.0

    online_probe.OnlineProbe.__init__ = begin  # pyright: ignore
    online_probe.probe = probe


def phases(rng: random.Random) -> dict[str, tuple[Body, dict[str, Any]]]:
    """Moments of a run and the options they need; steps and saves are random."""
    step = rng.randrange(2, STEPS - 1)
    return {
        "refused save": (_refused_save, {}),
        "first batch": (_slow_pictures, {"data": {"workers": 2}}),
        "step": (mark(fit, "train_step", step), {"data": {"workers": rng.randrange(3)}}),
        "begin": (mark(start, "assemble"), {}),
        "preparation": (_long_preparation, {}),
        "probe": (_long_probe, {"probe_every": 1}),
        "save": (mark(checkpoint, "save", rng.randrange(1, STEPS // EPOCH)), {}),
        "end": (mark(fit, "append_records"), {}),
    }


def send(
    run: Callable[[], int], body: Body, root: Path, numbers: list[int], delay: float
) -> tuple[int, float, str]:
    """Start a run and send signals to its process group at the moment that `body` marks.

    Returns:
        Exit code, seconds from the first signal to the end, output.
    """
    moment, log = root / "moment", root / "log"
    moment.unlink(missing_ok=True)
    log.unlink(missing_ok=True)

    def attempt() -> int:
        for number in numbers:
            signal.signal(
                number, signal.SIG_DFL
            )  # a shell makes background jobs ignore some signals
        signals.leave_at_once()
        body(moment)
        return run()

    pid = tiny.start(attempt, log)
    give_up = time.monotonic() + tiny.PATIENCE_S
    while not moment.exists() and time.monotonic() < give_up:
        time.sleep(0.0005)
    time.sleep(delay)
    began = time.monotonic()
    for number in numbers:
        with suppress(ProcessLookupError):
            os.killpg(pid, number)
        time.sleep(0.005)
    code = tiny.wait(pid)
    return code, time.monotonic() - began, log.read_text(errors="replace")


def is_left_in_order(out: Path, code: int, said: str) -> str:
    """What is wrong after a signal ended the run; empty if nothing is."""
    wrong = [] if code == Exit.PREEMPTED else [f"code {code}"]
    status = json.loads((out / "status.json").read_text()) if out.exists() else None
    if status and (status["code"], status["resumable"]) != (Exit.PREEMPTED, True):
        wrong.append(f"status {status}")
    if status and status["step"] != tiny.newest_whole(out):
        wrong.append(f"saved {tiny.newest_whole(out)}, status {status}")
    if said.count("error: ") - said.count("error: cannot save") != 1 or "Traceback" in said:
        wrong.append("not one line")
    wrong += tiny.leftovers(out) if status else []
    return ", ".join(wrong)


def terms(setup: Setup, root: Path, count: int, seed: int) -> Tally:
    """SIGTERM at every kind of moment, half of them twice, 5 ms apart; then a new start."""
    tally, rng = Tally(), random.Random(seed)
    for number in range(count):
        kinds = phases(rng)
        kind = list(kinds)[number % len(kinds)]
        body, over = kinds[kind]
        out, place = root / f"run-{number}", root / f"at-{number}"
        place.mkdir()
        options = tiny.options(setup.pictures, out, **over)
        numbers = [int(signal.SIGTERM)] * rng.choice((1, 2))
        code, seconds, said = send(
            lambda options=options: tiny.pretrain(options),
            body, place, numbers, rng.uniform(0, AHEAD_S),
        )  # fmt: skip
        wrong = "" if code == 0 and kind in ("end", "save") else is_left_in_order(out, code, said)
        if seconds > LIMIT_S:
            wrong += f", {seconds:.0f} s"
        wrong += _resumed(setup, out, place)
        tally.note(not wrong, f"{kind} {number}: {wrong}; {said.splitlines()[-1:]}")
    return tally


def _resumed(setup: Setup, out: Path, place: Path) -> str:
    run = tiny.options(setup.pictures, out)
    code, said = tiny.attempt(lambda: tiny.pretrain(run), place / "again")
    if code or not tiny.is_same(setup, out):
        return f", then {code}, or another run: {said.splitlines()[-1:]}"
    return ""


def imports(setup: Setup, root: Path, count: int, seed: int) -> Tally:
    """SIGTERM to the real command during its imports, any time after its first line of Python."""
    tally, rng = Tally(), random.Random(seed)
    command = [sys.executable, "-m", "clsa", "pretrain", "--data", str(setup.pictures)]
    for number in range(count):
        out = root / f"run-{number}"
        process = subprocess.Popen(
            [*command, "--out", str(out), "--device", "cpu"],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        while not _catches(process.pid, signal.SIGTERM) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 2.0))
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=tiny.PATIENCE_S)
        seconds, wrong = time.monotonic() - began, []
        if process.returncode != Exit.PREEMPTED or said.count("error: ") != 1:
            wrong.append(f"code {process.returncode}: {said[-300:]}")
        if out.exists() or seconds > LIMIT_S:
            wrong.append(f"left {out.exists()}, {seconds:.1f} s")
        tally.note(not wrong, f"import {number}: {wrong}")
    return tally


def _catches(pid: int, number: int) -> bool:
    """Whether a process has installed a handler for a signal (Linux)."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


# ---- SLURM, Ctrl-C, a closed terminal

SCONTROL = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >> "$0.calls"
echo -- >> "$0.calls"
"""
JOB = {"SLURM_JOB_ID": "777"}
ARRAY = {"SLURM_JOB_ID": "778", "SLURM_ARRAY_JOB_ID": "12345", "SLURM_ARRAY_TASK_ID": "2"}
KINDS: dict[str, tuple[list[int], dict[str, str], str, str, str]] = {
    "a job": ([signal.SIGUSR1], JOB, "exit 0", "777", "job 777 is queued again"),
    "an array": ([signal.SIGUSR1], ARRAY, "exit 0", "12345_2", "job 12345_2 is queued again"),
    "refused": ([signal.SIGUSR1], JOB, "echo no >&2; exit 1", "777", "(no): type scontrol requeue"),
    "hangs": ([signal.SIGUSR1], JOB, "exec sleep 60", "777", "no answer in 1 s): type scontrol"),
    "none": ([signal.SIGUSR1], JOB, "", "", "(No such file or directory): type scontrol requeue"),
    "USR1 alone": ([signal.SIGUSR1], {}, "exit 0", "", "SIGUSR1; the state is saved"),
    "TERM in a job": ([signal.SIGTERM], JOB, "exit 0", "", "SIGTERM; the state is saved"),
    "INT": ([signal.SIGINT], {}, "exit 0", "", "SIGINT; the state is saved"),
    "INT twice": ([signal.SIGINT] * 2, {}, "exit 0", "", ""),
    "HUP": ([signal.SIGHUP], {}, "exit 0", "", "SIGHUP; the state is saved"),
}


def others(setup: Setup, root: Path, kinds: list[str], seed: int) -> Tally:
    """Each of `kinds` at a random step or save, with a fake scontrol; then a new start."""
    tally, rng = Tally(), random.Random(seed)
    for number, kind in enumerate(kinds):
        numbers, env, answer, asked, told = KINDS[kind]
        out, place = root / f"run-{number}", root / f"at-{number}"
        place.mkdir()
        scontrol = place / "scontrol"
        if answer:
            scontrol.write_text(SCONTROL + answer)
            scontrol.chmod(0o755)
        options = tiny.options(setup.pictures, out)

        def run(options: Any = options, env: dict[str, str] = env, place: Path = place) -> int:
            os.environ.update({**env, "PATH": f"{place}:/usr/bin:/bin"})
            slurm.TIMEOUT_S = 1.0
            return tiny.pretrain(options)

        aim = rng.randrange(3)
        body = [
            mark(fit, "train_step", rng.randrange(2, 100)),
            mark(checkpoint, "save", rng.randrange(2, 10)),
            mark(saver.Saver, "save", rng.randrange(2, 10), after=True),
        ][aim]
        code, seconds, said = send(run, body, place, numbers, rng.uniform(0, AHEAD_S))
        wrong = "" if kind == "INT twice" else is_left_in_order(out, code, said)
        if kind == "INT twice" and (code != Exit.PREEMPTED or tiny.leftovers(out)):
            wrong = f"code {code}, {tiny.leftovers(out)}, {said[-900:]}"
        calls = scontrol.with_suffix(".calls")
        heard = calls.read_text() if calls.exists() else ""
        if heard != (f"requeue\n{asked}\n--\n" if asked and answer else ""):
            wrong += f", scontrol got {heard!r}"
        if told not in said or seconds > LIMIT_S:
            wrong += f", {seconds:.1f} s, said {said[-200:]}"
        wrong += _resumed(setup, out, place)
        tally.note(not wrong, f"{kind} {number}: {wrong}")
    return tally

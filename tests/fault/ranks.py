"""Checks 16 and 17: one of several processes is lost; torchrun restarts them in place."""

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

from clsa.runs import checkpoint
from clsa.system import dist
from clsa.system.errors import Exit
from clsa.training import fit
from tests.fault import tiny
from tests.fault.crew import left_of
from tests.fault.damage import Tally
from tests.fault.tiny import Setup

WAIT_S = 6.0
SHUTDOWN_S = 15.0
LAST = 40  # steps
ROOT = Path(__file__).parents[2]


def _skip() -> None:
    """Skip one collective call, as a bug might."""
    all_max = dist.all_max

    def skipped(value: Any) -> Any:
        dist.all_max = all_max
        return value

    dist.all_max = skipped


def _raise() -> None:
    raise ValueError("a bug on one rank")


ENDS: dict[str, Callable[[], object]] = {
    "kill -9": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raises": _raise,
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "skips a collective": _skip,
    "exits 0": lambda: os._exit(0),
}
LOST = {
    "kill -9": "lost rank {victim}",
    "raises": "lost rank {victim}.*ValueError: a bug on one rank",
    "SIGSTOP": "lost rank {victim}",
    "skips a collective": "(lost rank|processes diverged at step)",
    "exits 0": "lost rank {victim}",
}


def come_to_grief(rank: int, step: int, kind: str) -> None:
    """In an attempt: make `rank` fail in the way `kind` before `step`."""
    take = fit.train_step

    def watched(model: Any, state: Any, *rest: Any) -> Any:
        if state.step == step and dist.rank() == rank:
            ENDS[kind]()
        return take(model, state, *rest)

    fit.train_step = watched


def options(pictures: Path, out: Path, **over: Any) -> Any:
    """Options of a shorter run in which a process waits for others only a few seconds."""
    return tiny.options(pictures, out, max_steps=LAST, wait_minutes=WAIT_S / 60, **over)


def start(run: Any, world: int, log: Path, before: Callable[[], object]) -> list[int]:
    """Start the ranks of a run, each calling `before` first; return their pids."""

    def body() -> int:
        before()
        return tiny.pretrain(run)

    return tiny.start_ranks(world, body, log)


def whole(setup: Setup, root: Path, world: int) -> tuple[str, dict[int, float]]:
    """Digest and losses of an uninterrupted run of `world` ranks."""
    out = root / f"whole-{world}"
    pids = start(options(setup.pictures, out), world, root / f"whole-{world}", lambda: None)
    codes = [tiny.wait(pid) for pid in pids]
    if any(codes):
        raise RuntimeError(f"{world} ranks ended with {codes}")
    return checkpoint.run_digest(out), tiny.losses(out)


def losses(setup: Setup, root: Path, kinds: list[str], seed: int) -> Tally:
    """Each of `kinds` on a random rank of two or four, at a random step; then a new start."""
    tally, rng = Tally(), random.Random(seed)
    expected = dict[int, tuple[str, dict[int, float]]]()
    for number, kind in enumerate(kinds):
        world = rng.choice((2, 4)) if len(kinds) > len(ENDS) else 2
        if world not in expected:
            expected[world] = whole(setup, root, world)
        victim, step = rng.randrange(world), rng.randrange(1, LAST - 2)
        out, log = root / f"run-{number}", root / f"log-{number}"
        run = options(setup.pictures, out, data={"workers": number % 2})

        def before(victim: int = victim, step: int = step, kind: str = kind) -> None:
            come_to_grief(victim, step, kind)

        began = time.monotonic()
        pids = start(run, world, log, before)
        codes = {
            rank: tiny.wait(pid, 60.0)
            for rank, pid in enumerate(pids)
            if not (kind == "SIGSTOP" and rank == victim)
        }
        seconds = time.monotonic() - began
        if kind == "SIGSTOP":
            tiny.kill(pids[victim])  # as torchrun does in this case
        said = [
            log.with_name(f"{log.name}.{rank}").read_text(errors="replace") for rank in range(world)
        ]
        wrong = _wrong(out, kind, victim, codes, said)
        if seconds > WAIT_S + SHUTDOWN_S + 2 * setup.seconds or any(map(left_of, pids)):
            wrong.append(f"{seconds:.0f} s, left {[left_of(pid) for pid in pids]}")
        again = [tiny.wait(pid) for pid in start(run, world, log, lambda: None)]
        if any(again) or (checkpoint.run_digest(out), tiny.losses(out)) != expected[world]:
            wrong.append(f"then {again}, or another run")
        tally.note(not wrong, f"{kind}, rank {victim} of {world} at {step}: {wrong}")
    return tally


def _wrong(out: Path, kind: str, victim: int, codes: dict[int, int], said: list[str]) -> list[str]:
    """What is wrong with the ends of the ranks and with status.json."""
    wrong, told = [], LOST[kind].format(victim=victim)
    for rank, code in codes.items():
        if rank == victim and kind != "skips a collective":
            continue
        last = next((x for x in reversed(said[rank].splitlines()) if x.startswith("error: ")), "")
        if code != Exit.IO or not re.search(told, last):
            wrong.append(f"rank {rank}: {code}, {last or said[rank][-300:]}")
    path = out / "status.json"
    if victim != 0 or kind == "skips a collective":
        status = json.loads(path.read_text()) if path.exists() else {}
        if (status.get("code"), status.get("resumable")) != (Exit.IO, True):
            wrong.append(f"status {status}")
    return wrong


# ---- torchrun


def torchrun(pictures: Path, out: Path, once: Path, kind: str, restarts: int) -> tuple[int, str]:
    """Run the real launcher; one of two ranks fails unless the file `once` exists."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        f"--max-restarts={restarts}", "--shutdown-timeout", "10", "-m", "tests.fault.ranks",
        str(pictures), str(out), str(once), kind,
    ]  # fmt: skip
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def launched(setup: Setup, root: Path, kinds: list[str]) -> Tally:
    """A whole job under torchrun: it ends in time, non-zero, and reports rank and cause."""
    tally = Tally()
    for number, kind in enumerate(kinds):
        out, once = root / f"run-{number}", root / f"once-{number}"
        began = time.monotonic()
        code, said = torchrun(setup.pictures, out, once, kind, 0)
        seconds, told = time.monotonic() - began, LOST[kind].format(victim=1)
        status = json.loads((out / "status.json").read_text())
        right = code != 0 and re.search(f"error: .*{told}", said) and status["code"] == Exit.IO
        tally.note(
            bool(right) and seconds < WAIT_S + SHUTDOWN_S + 60,
            f"torchrun, {kind}: {code}, {seconds:.0f} s, {status}, {said[-500:]}",
        )
    return tally


def restarts(setup: Setup, root: Path, count: int) -> Tally:
    """`torchrun --max-restarts`: after kill -9 of a rank the first restart finishes the run."""
    tally, expected = Tally(), whole(setup, root, 2)
    for number in range(count):
        out, once = root / f"run-{number}", root / f"once-{number}"
        code, said = torchrun(setup.pictures, out, once, "kill -9", 3)
        same = not code and (checkpoint.run_digest(out), tiny.losses(out)) == expected
        starts = said.count("attempt 1 of the ranks")
        tally.note(same and starts == 2, f"restart {number}: {code}, {starts}, {said[-500:]}")
    return tally


def main(pictures: str, out: str, once: str, kind: str) -> int:
    """Run one rank, started by torchrun."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    print(f"attempt {attempt} of the ranks", flush=True)
    if not Path(once).exists():
        take = fit.train_step

        def noted(model: Any, state: Any, *rest: Any) -> Any:
            if state.step == LAST // 2 + 1 and dist.rank() == 1:
                Path(once).touch()
                ENDS[kind]()
            return take(model, state, *rest)

        fit.train_step = noted
    return tiny.pretrain(options(Path(pictures), Path(out)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Check 7: a folder has one run at a time; what a killed run left is taken over."""

import errno
import fcntl
import re
import time
from pathlib import Path

from clsa.system import lock
from clsa.system.errors import Exit
from tests.fault import tiny
from tests.fault.damage import Tally
from tests.fault.tiny import Setup

IN_USE = re.compile(r"error: \S+ in use by pid (\d+) on host \S+ since \d\d:\d\d - ")
TAKEN = "is taken over from pid"


def without_locks() -> None:
    """In an attempt: simulate a file system without locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = refuse


def _start(setup: Setup, out: Path, log: Path, locks: bool, workers: int = 0) -> int:
    run = tiny.options(setup.pictures, out, max_steps=20, data={"workers": workers})

    def body() -> int:
        if not locks:
            without_locks()
        return tiny.pretrain(run)

    log.unlink(missing_ok=True)
    return tiny.start(body, log)


def race(setup: Setup, root: Path, count: int, locks: bool) -> Tally:
    """Two starts at once on one folder: one finishes, the other names the pid of the first."""
    tally = Tally()
    for number in range(count):
        out, logs = root / f"run-{number}", [root / f"log-{number}-{i}" for i in (0, 1)]
        pids = [_start(setup, out, log, locks) for log in logs]
        codes = [tiny.wait(pid) for pid in pids]
        right = sorted(codes) == [Exit.OK, Exit.USAGE]
        if right:
            told = IN_USE.search(logs[codes.index(Exit.USAGE)].read_text())
            right = bool(told) and int(told[1]) == pids[codes.index(Exit.OK)]
        right = right and tiny.newest_whole(out) == 20 and not tiny.leftovers(out)
        ends = [log.read_text(errors="replace").splitlines()[-1:] for log in logs]
        tally.note(right, f"race {number}, locks {locks}: {codes}, {ends}")
    return tally


def stale(setup: Setup, root: Path, count: int, locks: bool) -> Tally:
    """After kill -9 of a run, the next start takes over its lock and says so."""
    tally = Tally()
    for number in range(count):
        out, log = root / f"run-{number}", root / f"log-{number}"
        pid = _start(setup, out, log, locks, workers=number % 2)
        give_up = time.monotonic() + tiny.PATIENCE_S
        while not tiny.manifests(out) and time.monotonic() < give_up:
            time.sleep(0.005)
        left = (out / lock.NAME).read_text() if (out / lock.NAME).exists() else ""
        tiny.kill(pid)
        code = tiny.wait(_start(setup, out, log, locks))
        said = log.read_text(errors="replace")
        right = code == 0 and left.startswith(f"{pid} ") and said.count(f"{TAKEN} {pid} ") == 1
        right = right and tiny.newest_whole(out) == 20 and not tiny.leftovers(out)
        tally.note(right, f"stale {number}, locks {locks}: {code}, {said.splitlines()[-2:]}")
    return tally

"""Check 18: loader workers that are killed or stopped, raise an error, or exit."""

import ctypes
import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from clsa.system import workers
from clsa.system.errors import Exit
from tests.fault import tiny
from tests.fault.damage import Tally
from tests.fault.tiny import Setup

TIMEOUT_S = 2


def _raise() -> None:
    raise ValueError("a broken decoder")


ENDS: dict[str, tuple[Callable[[], object], str]] = {
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
    "SIGSTOP": (lambda: os.kill(os.getpid(), signal.SIGSTOP), f"no answer in {TIMEOUT_S} s"),
    "a segmentation fault": (lambda: ctypes.string_at(0), "killed by SIGSEGV"),
    "an exception": (_raise, "- a broken decoder -"),
    "os._exit(0)": (lambda: os._exit(0), "exit 0"),
}


def _break_once(nth: int, end: Callable[[], object], note: Path) -> None:
    """In an attempt: the first worker to read its n-th picture records that and runs `end`.

    A worker that finds the file of this record continues unharmed.
    """
    at, seen = workers.at, 0

    def watched(picture: int) -> None:
        nonlocal seen
        at(picture)
        seen += 1
        if seen == nth:
            with suppress(FileExistsError):
                handle = os.open(note, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                os.write(handle, f"{os.getpid()} {picture}".encode())
                os.close(handle)
                end()

    workers.at = watched


def left_of(group: int) -> list[int]:
    """Processes of a process group that are still alive."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            fields = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(name))
    return found


def ends(setup: Setup, root: Path, kinds: list[str], seed: int) -> Tally:
    """Each of `kinds` at a random picture, with one to three workers; then a new start."""
    tally, rng = Tally(), random.Random(seed)
    for number, kind in enumerate(kinds):
        end, told = ENDS[kind]
        out, note, log = root / f"run-{number}", root / f"note-{number}", root / f"log-{number}"
        run: Any = tiny.options(setup.pictures, out, data={"workers": rng.randrange(1, 4)})
        nth = rng.randrange(1, 600)

        def body(
            run: Any = run, nth: int = nth, end: Callable[[], object] = end, note: Path = note
        ) -> int:
            workers.TIMEOUT_S = TIMEOUT_S
            _break_once(nth, end, note)
            return tiny.pretrain(run)

        pid = tiny.start(body, log)
        while not note.exists() and _lives(pid):
            time.sleep(0.001)
        began = time.monotonic()
        code, wrong = tiny.wait(pid), []
        seconds, said = time.monotonic() - began, log.read_text(errors="replace").splitlines()
        last = next((line for line in reversed(said) if "error: " in line), "")
        worker, picture = note.read_text().split() if note.exists() else ("?", "0")
        name = sorted((setup.pictures / "all").iterdir())[int(picture)].name
        if code != Exit.IO or told not in last or f"pid {worker}" not in last or name not in last:
            wrong.append(f"code {code}, {name} not in: {last or said[-3:]}")
        path = out / "status.json"
        status = json.loads(path.read_text()) if path.exists() else {}
        if (status.get("code"), status.get("resumable")) != (Exit.IO, True):
            wrong.append(f"status {status}")
        if seconds > TIMEOUT_S + 8 or left_of(pid):
            wrong.append(f"{seconds:.1f} s, left {left_of(pid)}")
        wrong += tiny.leftovers(out)
        again, said = tiny.attempt(
            lambda out=out: tiny.pretrain(tiny.options(setup.pictures, out)), log
        )
        if again or not tiny.is_same(setup, out):
            wrong.append(f"then {again}, or another run: {said[-200:]}")
        tally.note(not wrong, f"{kind} {number}: {wrong}")
    return tally


def _lives(pid: int) -> bool:
    """Whether a child process is still running; this does not reap it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

"""Check 19: a small /dev/shm, few open files, little address space, one core."""

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clsa.system.errors import Exit
from tests.fault import disk, tiny
from tests.fault.damage import Tally
from tests.fault.tiny import Setup


def _try(setup: Setup, out: Path, limit: Callable[[], object], **over: Any) -> tuple[int, str]:
    run = tiny.options(setup.pictures, out, **over)

    def body() -> int:
        limit()
        return tiny.pretrain(run)

    return tiny.attempt(body, out.with_suffix(".log"))


def small_shm(setup: Setup, root: Path, count: int) -> Tally:
    """/dev/shm of 1 MB: one line refuses the run if the processes of the machine need more."""
    tally = Tally()

    def small() -> None:
        disk.own_mounts()
        disk._sh("mount -t tmpfs -o size=1m tmpfs /dev/shm")

    def shared() -> None:
        small()
        os.environ["LOCAL_WORLD_SIZE"] = "8"

    for number in range(count):
        workers = {"workers": 1 + number % 3}
        # A batch of 2 views takes 24 kB at 16 pixels, 393 kB at 64 pixels.
        large = {"views": {"size": 64, "weak": {"sizes": (64,)}}, "data": workers}
        for name, limit, over, enough in (
            ("large", small, large, False),
            ("shared", shared, {"data": {"workers": 3}}, False),
            ("small", small, {"data": workers}, True),
        ):
            out = root / f"{name}-{number}"
            code, said = _try(setup, out, limit, **over)
            error = [line for line in said.splitlines() if line.startswith("error: ")]
            if enough:
                right = code == 0 and tiny.is_same(setup, out)
            else:
                right = code == Exit.USAGE and len(error) == 1 and "/dev/shm has 1 MB" in error[0]
                right = right and tiny.newest_whole(out) == 0
            tally.note(right, f"shm {name} {number}: {code}, {said[-300:]}")
    return tally


def few_files(setup: Setup, root: Path, count: int) -> Tally:
    """`ulimit -n`: the run finishes, or one line says what is missing."""
    tally = Tally()
    for number in range(count):
        most, out = (64, 48, 32, 24, 20)[number % 5], root / f"files-{number}"

        def limit(most: int = most) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

        code, said = _try(setup, out, limit, data={"workers": 1 + number % 4})
        ended = code == 0 and tiny.is_same(setup, out)
        tally.note(
            ended or (code in (Exit.USAGE, Exit.IO) and _is_one_line(said)),
            f"{most} files: {code}, {said[-300:]}",
        )
    return tally


def little_memory(setup: Setup, root: Path, count: int, seed: int) -> Tally:
    """`ulimit -v` on the real command: it ends with one line, whenever memory runs out."""
    tally, rng = Tally(), random.Random(seed)
    for number in range(count):
        kilobytes = rng.randrange(300_000, 3_000_000)
        out = root / f"memory-{number}"
        command = f"ulimit -v {kilobytes}; exec {sys.executable} -m clsa pretrain --data "
        command += f"{setup.pictures} --out {out} --device cpu --epochs 1 --max-steps 1"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
        right = done.returncode == 0 or (done.returncode == Exit.IO and _is_one_line(done.stderr))
        tally.note(right, f"{kilobytes} kB: {done.returncode}, {done.stderr[-400:]}")
    return tally


def one_core(setup: Setup, root: Path, count: int) -> Tally:
    """One core and the default number of workers: the run is the same."""
    tally = Tally()
    for number in range(count):
        out = root / f"core-{number}"
        core = sorted(os.sched_getaffinity(0))[number % len(os.sched_getaffinity(0))]

        def limit(core: int = core) -> None:
            os.sched_setaffinity(0, {core})

        code, said = _try(setup, out, limit, data={"workers": None})
        right = code == 0 and tiny.is_same(setup, out)
        tally.note(right, f"core {core}: {code}, {said[-300:]}")
    return tally


def _is_one_line(said: str) -> bool:
    return said.count("error: ") == 1 and "Traceback" not in said

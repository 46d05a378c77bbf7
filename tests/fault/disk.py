"""Check 5: full disks, read-only folders, missing permissions, before and during the run."""

import ctypes
import errno
import json
import os
import re
import resource
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from clsa.runs import checkpoint
from clsa.system import files
from clsa.system.errors import Exit
from tests.fault import tiny
from tests.fault.damage import Tally
from tests.fault.machine import has
from tests.fault.tiny import EPOCH, Setup

CLONE_NEWNS = 0x20000
NOBODY = 65534
SEVERAL_EPOCHS = 6 * EPOCH
# the full message of a failed save
MISSED = re.compile(
    r"error: cannot save step \d+ \(.*/checkpoints\) - .+ - "
    r"(previous step (\d+) is intact|no step is saved yet)"
)
ROOM = re.compile(r"cannot (save|write) .* - \d+\.\d MB free, \d+\.\d MB needed - ")


class Fault(NamedTuple):
    """A way to make writes fail: what the machine needs for it, how to make and undo it."""

    need: str
    make: Callable[[Path], object]
    undo: Callable[[Path], object]


def _sh(command: str) -> None:
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)


def _limit(size: int) -> Callable[[Path], object]:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    return lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def _refuse(number: int) -> Callable[[Path], object]:
    """A failure of quota or disk, simulated by an error of os.fsync, for lack of such a disk."""
    fsync = os.fsync

    def refused(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    def patch(_: Path) -> None:
        os.fsync = refused if number else fsync

    return patch


def _no(_: Path) -> None:
    pass


FAULTS: dict[str, Fault] = {
    "read-only": Fault(
        "mount",
        lambda path: _sh(f"mount --bind {path} {path} && mount -o remount,bind,ro {path}"),
        lambda path: _sh(f"umount {path}"),
    ),
    "file size limit": Fault("", _limit(3_000_000), _limit(resource.RLIM_INFINITY)),
    "immutable folder": Fault(
        "chattr", lambda path: _sh(f"chattr +i {path}"), lambda path: _sh(f"chattr -i {path}")
    ),
    "no permission": Fault(
        "nobody", lambda path: path.chmod(0o555), lambda path: path.chmod(0o755)
    ),
    "quota": Fault("", _refuse(errno.EDQUOT), _refuse(0)),
    "broken disk": Fault("", _refuse(errno.EIO), _refuse(0)),
}


def own_mounts() -> None:
    """In an attempt: later mounts are private to this process and end with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    _sh("mount --make-rprivate /")


def be_nobody() -> None:
    """In an attempt: give up all rights of root."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def state_of(out: Path) -> str:
    """What is wrong with a run folder after a failed write; empty if the run can be resumed."""
    damaged = [path.name for path in tiny.manifests(out).values() if not tiny.is_whole(path)]
    newest = tiny.newest_whole(out)
    loaded = checkpoint.load_newest(out / "checkpoints") if newest else None
    if loaded and loaded.state["step"] != newest:
        damaged.append(f"loads {loaded.state['step']}, not {newest}")
    return ", ".join(damaged + tiny.leftovers(out))


def on_small_disk(setup: Setup, root: Path, size: int) -> tuple[int, str, str]:
    """A whole run on its own disk of `size` bytes: exit code, output, what is wrong afterwards."""
    root.mkdir()
    disk, verdict = root / "disk", root / "verdict"
    disk.mkdir()

    def body() -> int:
        own_mounts()
        _sh(f"mount -t tmpfs -o size={size} tmpfs {disk}")
        out = disk / "run"
        code = tiny.pretrain(_options(setup, out))
        wrong = state_of(out) if out.exists() else ""
        if code == Exit.CANNOT_WRITE and tiny.losses(out):
            wrong += "; refused after the first step"
        if code == 0 and checkpoint.run_digest(out) != _digest(setup):
            wrong += "; another digest"
        verdict.write_text(wrong)
        return code

    code, said = tiny.attempt(body, root / "log")
    return code, said, verdict.read_text() if verdict.exists() else "no verdict"


def _options(setup: Setup, out: Path) -> Any:
    return tiny.options(setup.pictures, out, save_minutes=15, max_steps=SEVERAL_EPOCHS)


def _digest(setup: Setup) -> str:
    """Digest of a run that stopped after several epochs; computed once."""
    noted = setup.root / "several.json"
    if not noted.exists():
        out = setup.root / "several"
        code, said = tiny.attempt(lambda: tiny.pretrain(_options(setup, out)), setup.root / "log")
        assert code == 0, said
        noted.write_text(json.dumps(checkpoint.run_digest(out)))
    return json.loads(noted.read_text())


def full_disks(setup: Setup, root: Path, sizes: list[float]) -> Tally:
    """Disks with room for `sizes` checkpoints: 73 below one, 74 if it fills up, else 0."""
    tally, one = Tally(), setup.save_bytes
    _digest(setup)
    for size in sizes:
        code, said, wrong = on_small_disk(setup, root / f"{size}", int(size * one))
        allowed = {Exit.CANNOT_WRITE} if size < 1 else {Exit.IO} if size < 3 else {Exit.OK}
        right = code in allowed and not wrong and "Traceback" not in said
        right = right and (code == Exit.OK or bool(ROOM.search(said)))
        if code == Exit.IO and size > 2.1:  # an earlier checkpoint exists
            right = right and "is intact" in said
        tally.note(right, f"{size} checkpoints: {code}, {wrong}: {said.splitlines()[-2:]}")
    return tally


def fault_at(
    setup: Setup, root: Path, name: str, saves: int, refusals: int
) -> tuple[int, str, str, Path]:
    """A run whose folder of checkpoints fails after `saves` saves.

    Args:
        saves: how many saves succeed; 0 means that the run folder fails before the run begins.
        refusals: how many saves fail before the fault is undone.
    """
    root.mkdir()
    out, fault, verdict = root / "run", FAULTS[name], root / "verdict"
    if fault.need == "nobody":
        root.chmod(0o777)

    def body() -> int:
        if fault.need == "mount":
            own_mounts()
        elif fault.need == "nobody":
            be_nobody()
        counted, save = [0], checkpoint.save

        def spied(folder: Path, *rest: Any) -> Path:
            counted[0] += 1
            if counted[0] == saves + 1:
                fault.make(folder)
            if counted[0] == saves + 1 + refusals:
                fault.undo(folder)
            return save(folder, *rest)

        checkpoint.save = spied
        if not saves:
            out.mkdir()
            fault.make(out)
        code = tiny.pretrain(_options(setup, out))
        if not saves or counted[0] < saves + 1 + refusals:
            fault.undo(out if not saves else out / "checkpoints")
        verdict.write_text(state_of(out))
        return code

    code, said = tiny.attempt(body, root / "log")
    return code, said, verdict.read_text() if verdict.exists() else "no verdict", out


def kinds(setup: Setup, root: Path, cases: list[tuple[int, int]]) -> tuple[Tally, list[str]]:
    """Every kind of fault: before the run, for some saves, for good. Also returns missing needs."""
    tally, left_out = Tally(), []
    for name, fault in FAULTS.items():
        if fault.need and not has(fault.need):
            left_out.append(fault.need)
            continue
        for saves, refusals in cases:
            if not saves and name in ("quota", "broken disk"):
                continue  # these only appear at a flush
            place = root / f"{name}-{saves}-{refusals}".replace(" ", "-")
            code, said, wrong, out = fault_at(setup, place, name, saves, refusals)
            missed = MISSED.findall(said)
            if not saves:
                right = code == Exit.CANNOT_WRITE and not tiny.losses(out)
            elif refusals < 3:
                right = code == 0 and len(missed) == refusals
                right = right and checkpoint.run_digest(out) == _digest(setup)
            else:
                right = code == Exit.IO and len(missed) == 3
            intact = saves * EPOCH
            right = right and all(int(step or 0) == intact for _, step in missed) and not wrong
            tally.note(right, f"{place.name}: {code}, {wrong}: {said.splitlines()[-2:]}")
    return tally, left_out


def writers(setup: Setup, root: Path, parts: int) -> Tally:
    """The disk fills up within a file: no half a file stays, and the run resumes with more room.

    Args:
        parts: how many lengths to try for each of the two large files; the small files have two.
    """
    tally = Tally()
    lengths = {"step-*.ckpt": setup.save_bytes, "encoder.safetensors": 5_000}
    cases = [(name, i * size // parts) for name, size in lengths.items() for i in range(parts)]
    cases += [(name, size) for name in ("step-*.json", "results.json") for size in (0, 1)]
    for pattern, room in cases:
        out = root / f"{pattern.replace('*', 'N')}-{room}"

        def body(pattern: str = pattern, room: int = room, out: Path = out) -> int:
            write, begun = files.write_atomic, list[Path]()

            def patched(path: Path, fill: Callable[[IO[bytes]], object]) -> tuple[str, int]:
                begun.extend(tiny.manifests(out).values())
                if not path.match(pattern) or not begun:
                    return write(path, fill)
                return write(path, lambda file: fill(Full(file, room)))  # pyright: ignore

            files.write_atomic = patched
            return tiny.pretrain(_options(setup, out))

        code, said = tiny.attempt(body, root / "log")
        first = code == Exit.IO and not state_of(out) and "Traceback" not in said
        code, _ = tiny.attempt(lambda out=out: tiny.pretrain(_options(setup, out)), root / "log")
        right = first and code == 0 and checkpoint.run_digest(out) == _digest(setup)
        with suppress(Exception):
            right = right and len((out / "encoder.safetensors").read_bytes()) > 100
        tally.note(right, f"{out.name}: {said.splitlines()[-2:]}, then {code}")
    return tally


class Full:
    """A file on a disk with room for only `room` more bytes."""

    def __init__(self, file: IO[bytes], room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        """Write the part of `data` that fits; raise if that is not all."""
        self.file.write(memoryview(data).cast("B")[: self.room])
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if hasattr(self.file, "refusal"):
                self.file.refusal = error  # pyright: ignore
            raise error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()

"""A run that takes seconds, its expected result, and processes ("attempts") that run it."""

import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.tensorboard  # before attempts are forked
from PIL import Image

from clsa.options.config import merge
from clsa.options.run import RunOptions
from clsa.recipes import resolve
from clsa.runs import checkpoint
from clsa.runs.state import State
from clsa.system import lock
from clsa.system.errors import ClsaError, Exit
from clsa.training import stages
from tests.support.small_encoder import shrink_encoder

EPOCH, STEPS = 6, 120
SAVE_EVERY_FEW_STEPS = 0.0006  # minutes
PATIENCE_S = 180.0
_SCANDIR, _LISTDIR = os.scandir, os.listdir


class Setup(NamedTuple):
    """The folder and pictures of a check, and the results of an uninterrupted run."""

    root: Path
    pictures: Path
    digest: str
    losses: dict[int, float]
    seconds: float
    """Duration of the uninterrupted run."""
    save_bytes: int
    """Size of one checkpoint."""

    def at(self, name: str) -> Path:
        """A new folder for a check."""
        root = self.root / name
        root.mkdir(parents=True)
        return root


def make_pictures(root: Path) -> Path:
    """100 PNGs of 16 to 64 pixels."""
    (root / "all").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(rng.integers(16, 65, (100, 2)).tolist()):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "all" / f"{i:03d}.png")
    return root


def options(pictures: Path, out: Path, **over: Any) -> RunOptions:
    """Options of 120 steps of 16 pictures, saved every few steps and at every sixth."""
    tiny = {
        "recipe": "moco-v2-small",
        "data": {"data": str(pictures), "workers": 0, "resident_limit": 1e-6},
        "out": str(out),
        "batch_size": 16,
        "epochs": STEPS // EPOCH,
        "probe_every": 0,
        "log_every": 1,
        "save_minutes": SAVE_EVERY_FEW_STEPS,
        "device": "cpu",
        "views": {"size": 16, "weak": {"sizes": (16,)}},
        "model": {
            "projector_layers": 3,
            "projector_hidden": 1024,
            "projector_dim": 16,
            "norm_groups": 2,
        },
        "method": {"queue_size": 256},
    }
    return resolve(merge(tiny, over))


class _Shuffled:
    """The result of os.scandir, in another order."""

    def __init__(self, path: Any):
        with _SCANDIR(path) as found:
            self.found = list(found)
        random.Random(1).shuffle(self.found)

    def __enter__(self) -> Any:
        return iter(self.found)

    def __iter__(self) -> Any:
        return iter(self.found)

    def __exit__(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def shuffle_listings() -> None:
    """From now on, list folders in another order."""
    os.scandir = _Shuffled  # pyright: ignore[reportAttributeAccessIssue]
    os.listdir = lambda path=".": _LISTDIR(path)[::-1]  # pyright: ignore


def restore_listings() -> None:
    """List folders in the usual order again."""
    os.scandir, os.listdir = _SCANDIR, _LISTDIR


def other(value: Any) -> Any:
    """A different value of the same kind, for an option."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, value[-1]) if value else ("classes:2",)
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}-other" if value is not None else 7


def pretrain(run: RunOptions, channels: tuple[int, ...] = (3, 8, 16)) -> int:
    """Do what the command line does: print an error on one line and return the exit code."""
    shrink_encoder(channels)
    try:
        stages.pretrain(run)
    except ClsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        return Exit.PREEMPTED
    return 0


# ---- attempts


def start(body: Callable[[], int], log: Path) -> int:
    """Fork an attempt into its own process group, with output to `log`; return its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with suppress(OSError):  # the child has already done this, or has ended
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        torch.set_num_threads(1)
        code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def start_ranks(world: int, body: Callable[[], int], log: Path) -> list[int]:
    """Fork the processes of one attempt as torchrun would start them; return their pids.

    Args:
        log: rank N writes its output to this path plus `.N`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> Callable[[], int]:
        def attempt() -> int:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                GLOO_SOCKET_IFNAME="lo",
            )  # fmt: skip
            return body()

        return attempt

    return [start(one(rank), log.with_name(f"{log.name}.{rank}")) for rank in range(world)]


def ended(pid: int) -> int | None:
    """Exit code of an attempt (negative for a signal); None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def kill(pid: int) -> None:
    """Send SIGKILL to an attempt's whole group, including loader workers."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def wait(pid: int, seconds: float = PATIENCE_S) -> int:
    """Wait for an attempt and return its exit code; after `seconds`, kill it and return -9."""
    give_up = time.monotonic() + seconds
    while (code := ended(pid)) is None:
        if time.monotonic() > give_up:
            kill(pid)
            return -signal.SIGKILL
        time.sleep(0.005)
    return code


def attempt(body: Callable[[], int], log: Path, seconds: float = PATIENCE_S) -> tuple[int, str]:
    """Run an attempt to its end; return its exit code and output."""
    log.unlink(missing_ok=True)
    code = wait(start(body, log), seconds)
    return code, log.read_text(errors="replace")


# ---- the contents of the disk, read without the code under test


def is_whole(manifest: Path) -> bool:
    """Whether a manifest's checkpoint exists and has the hash in the manifest."""
    try:
        facts = json.loads(manifest.read_bytes())
        data = manifest.with_suffix(".ckpt").read_bytes()
        return facts["sha256"] == hashlib.sha256(data).hexdigest()
    except (OSError, ValueError, LookupError, TypeError):
        return False


def manifests(out: Path) -> dict[int, Path]:
    """Manifests of a run folder's checkpoints, by step."""
    found = (out / "checkpoints").glob("step-*.json")
    return {int(path.stem[5:]): path for path in sorted(found)}


def newest_whole(out: Path) -> int:
    """Step of the newest checkpoint that matches its manifest; 0 if there is none."""
    return max((step for step, path in manifests(out).items() if is_whole(path)), default=0)


def leftovers(out: Path) -> list[str]:
    """Temporary and lock files, and data without a manifest."""
    found = [
        path.name for path in out.rglob(".*") if ".tmp-" in path.name or path.name == lock.NAME
    ]
    data = (out / "checkpoints").glob("*.ckpt")
    return found + [path.name for path in data if not path.with_suffix(".json").exists()]


def losses(out: Path) -> dict[int, float]:
    """Loss after each logged step; whole lines only."""
    found = {}
    with suppress(FileNotFoundError):
        for line in (out / "metrics.jsonl").read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n") and b"\0" not in line:
                values = json.loads(line)
                if "loss" in values:  # a skipped step has none
                    found[values["step"]] = values["loss"]
    return found


def note_resumed(path: Path) -> None:
    """In an attempt: write the step from which it resumes to `path`."""
    resume = State.resume

    def noted(self: State) -> list[str]:
        notes = resume(self)
        path.write_text(str(self.step))
        return notes

    State.resume = noted


def set_up(root: Path) -> Setup:
    """Make the pictures and run on them without interruption."""
    pictures, out = make_pictures(root / "pictures"), root / "whole"
    begun = time.monotonic()
    code, said = attempt(lambda: pretrain(options(pictures, out)), root / "whole.log")
    if code:
        raise RuntimeError(f"the uninterrupted run ended with {code}:\n{said}")
    seconds = time.monotonic() - begun
    size = max(path.stat().st_size for path in (out / "checkpoints").glob("*.ckpt"))
    return Setup(root, pictures, checkpoint.run_digest(out), losses(out), seconds, size)


def is_same(setup: Setup, out: Path) -> bool:
    """Whether a finished run equals the uninterrupted one, to the bit and in every loss."""
    return checkpoint.run_digest(out) == setup.digest and losses(out) == setup.losses

"""Check 4: damaged checkpoints are noticed, reported and skipped; with no good one the run ends."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from clsa.runs import checkpoint
from clsa.system.errors import Exit
from tests.fault import tiny
from tests.fault.tiny import EPOCH, Setup


class Tally:
    """Counts tries and collects what went wrong."""

    def __init__(self) -> None:
        self.tries, self.faults = 0, list[str]()

    def note(self, is_right: bool, told: str) -> None:
        """Record one try; `told` describes it if it went wrong."""
        self.tries += 1
        if not is_right:
            self.faults.append(told)


def three_checkpoints(setup: Setup, root: Path) -> Path:
    """A run that stopped at step 18 and kept steps 6, 12 and 18."""
    out = root / "run"
    over = {"max_steps": 3 * EPOCH, "save_minutes": 15, "keep_every": 1}
    run = tiny.options(setup.pictures, out, **over)
    code, said = tiny.attempt(lambda: tiny.pretrain(run), root / "log")
    if code or sorted(tiny.manifests(out)) != [6, 12, 18]:
        raise RuntimeError(said)
    return out


def bits(out: Path, flips: int, cuts: int, seed: int) -> Tally:
    """Flip single bits of the newest checkpoint, cut its end off, and flip bits of its manifest."""
    rng, tally = random.Random(seed), Tally()
    folder = out / "checkpoints"
    path = folder / "step-000018.ckpt"
    whole, manifest = path.read_bytes(), path.with_suffix(".json")
    facts = manifest.read_bytes()

    def is_noticed(told: str) -> None:
        saved = checkpoint.load_newest(folder)
        right = saved is not None and saved.state["step"] == 12 and len(saved.skipped) == 1
        right = right and saved is not None and saved.skipped[0].startswith("step-000018: ")
        tally.note(right, told)

    for _ in range(flips):
        place = rng.randrange(8 * len(whole))
        flip(path, place)
        is_noticed(f"bit {place} flipped")
        flip(path, place)
    for _ in range(cuts):
        length = rng.randrange(len(whole))
        path.write_bytes(whole[:length])
        is_noticed(f"cut to {length} bytes")
    path.write_bytes(b"")
    is_noticed("emptied")
    path.write_bytes(whole)
    hashed = 8 * facts.index(b",")  # bits of the line with the hash
    for place in range(0, hashed, max(4 * hashed // max(flips, 1), 1)):
        flip(manifest, place)
        saved = checkpoint.load_newest(folder)
        # A flipped bit in white space may be harmless; whatever is loaded must be correct.
        tally.note(saved is not None and saved.state["step"] in (12, 18), f"manifest bit {place}")
        flip(manifest, place)
    return tally


def flip(path: Path, bit: int = 80_002) -> None:
    """Flip one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _misplace(folder: Path) -> None:
    for suffix in (".ckpt", ".json"):
        _swap(folder / f"step-000018{suffix}", folder / f"step-000012{suffix}")


CASES: dict[str, tuple[Callable[[Path], object], dict[int, str], int]] = {
    "a bit of the newest": (
        lambda folder: flip(folder / "step-000018.ckpt"), {18: "sha256 mismatch"}, 12,
    ),
    "the newest emptied": (
        lambda folder: (folder / "step-000018.ckpt").write_bytes(b""), {18: "sha256 mismatch"}, 12,
    ),
    "the newest lost": (
        lambda folder: (folder / "step-000018.ckpt").unlink(), {18: "No such file"}, 12,
    ),
    "its manifest emptied": (
        lambda folder: (folder / "step-000018.json").write_bytes(b""), {18: "sha256 mismatch"}, 12,
    ),
    "manifests swapped": (
        lambda folder: _swap(folder / "step-000018.json", folder / "step-000012.json"),
        {18: "sha256 mismatch", 12: "sha256 mismatch"}, 6,
    ),
    "checkpoints swapped whole": (_misplace, {18: "holds step 12", 12: "holds step 18"}, 6),
    "all of them": (
        lambda folder: [flip(path) for path in folder.glob("*.ckpt")],
        {18: "sha256 mismatch", 12: "sha256 mismatch", 6: "sha256 mismatch"}, 0,
    ),
}  # fmt: skip


def runs(setup: Setup, root: Path, out: Path, names: list[str]) -> Tally:
    """Start a damaged run again: one line per skipped checkpoint, and the same final result."""
    tally = Tally()
    for number, name in enumerate(names):
        damage, notes, used = CASES[name]
        copy = root / f"copy-{number}"
        shutil.copytree(out, copy)
        damage(copy / "checkpoints")
        run = tiny.options(setup.pictures, copy)
        code, said = tiny.attempt(lambda run=run: tiny.pretrain(run), root / "log")
        lines = said.splitlines()
        if used:
            right = code == 0 and tiny.is_same(setup, copy) and not tiny.leftovers(copy)
            for step, why in notes.items():
                start, end = f"note: step-{step:06d}: ", f", using step-{used:06d}"
                told = [x for x in lines if x.startswith(start) and why in x and x.endswith(end)]
                right = right and len(told) == 1
        else:
            errors = [line for line in lines if line.startswith("error: ")]
            right = code == Exit.NO_INPUT and len(errors) == 1
            right = right and all(f"step-{s:06d}: {why}" in errors[0] for s, why in notes.items())
        tally.note(right, f"{name}: ended with {code}: {lines[-1:]}")
    return tally

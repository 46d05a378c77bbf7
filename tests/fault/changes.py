"""Checks 12 and 13: other pictures or options are refused with a message that names the change."""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clsa.cli import main
from clsa.options.config import flatten
from clsa.options.run import RunOptions
from clsa.runs import checkpoint, digests
from clsa.runs.folder import FREE, RunFolder
from clsa.runs.state import State
from clsa.system.errors import Exit
from tests.fault import tiny
from tests.fault.damage import Tally
from tests.fault.resumes import LAST, options
from tests.fault.tiny import EPOCH

# ---- pictures


def _add(root: Path) -> None:
    for number in range(16):
        shutil.copy(root / "a" / f"{number:03d}.png", root / "b" / f"new-{number:02d}.png")


def _change(root: Path) -> None:
    with open(root / "a" / "009.png", "ab") as file:
        file.write(b"x")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "16 added": (_add, "+16 -0 ~0"),
    "one gone": (lambda root: (root / "a" / "007.png").unlink(), "+0 -1 ~0"),
    "one renamed": (
        lambda root: (root / "a" / "008.png").rename(root / "a" / "new.png"), "+1 -1 ~0",
    ),
    "one with other bytes": (_change, "+0 -0 ~1"),
    "another order of listing": (lambda _: None, ""),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pinned(out: Path) -> set[str]:
    """Digests of the weights of kept checkpoints, and of all that were moved to other folders."""
    found = set()
    for manifest in (out / "checkpoints").rglob("*.json"):
        if json.loads(manifest.read_text())["keep"] or manifest.parent.name != "checkpoints":
            state, _ = checkpoint.load_one(manifest.with_suffix(".ckpt"))
            found.add(digests.digest(state["method"]))
    return found


def pictures(sources: Path, root: Path, stops: list[int]) -> tuple[Tally, Tally]:
    """Each change at each stop: refused with its counts; if accepted, the epoch starts again."""
    refused, accepted = Tally(), Tally()
    whole = root / "whole"
    code, said = tiny.attempt(lambda: tiny.pretrain(options(sources, whole)), root / "log")
    if code:
        raise RuntimeError(said)
    for stop in stops:
        base = root / f"stop-{stop}"
        first = options(sources, base, max_steps=stop, keep_every=1, probe_every=1)
        code, said = tiny.attempt(lambda run=first: tiny.pretrain(run), root / "log")
        for name, (change, counts) in CHANGES.items():
            place = root / f"{stop}-{name}".replace(" ", "-")
            data, out = place / "pictures", place / "run"
            shutil.copytree(sources, data)
            shutil.copytree(base, out)
            change(data)

            def body(run: RunOptions, name: str = name) -> int:
                if "listing" in name:
                    tiny.shuffle_listings()
                return tiny.pretrain(run)

            kept, run = contents(out / "checkpoints"), options(data, out, keep_every=1)
            code, said = tiny.attempt(lambda body=body, run=run: body(run), place / "log")
            if not counts:
                same = checkpoint.run_digest(out) == checkpoint.run_digest(whole)
                refused.note(code == 0 and same, f"{place.name}: {code}, {said[-200:]}")
                continue
            told = (
                rf"error: {out} - data changed: {re.escape(counts)} \(digest \w{{4}} -> \w{{4}}\)"
            )
            right = code == Exit.USAGE and bool(re.search(told, said)) and "--accept" in said
            right = right and contents(out / "checkpoints") == kept
            refused.note(right, f"{place.name}: {code}, {said[-200:]}")
            accepted.note(*_accept(run, place, stop, counts))
    return refused, accepted


def _accept(run: RunOptions, place: Path, stop: int, counts: str) -> tuple[bool, str]:
    """Continue with the changed pictures: once without a kill, and with kills during the change."""
    per_epoch = 7 if "+16" in counts else EPOCH
    begin, last = stop // EPOCH * per_epoch, LAST // EPOCH * per_epoch
    given = run.model_copy(update={"accept_data_change": True})
    kept, encoder = pinned(run.out), _bytes_of(run.out / "encoder-best.safetensors")
    best = {path.name for path in (run.out / "checkpoints").glob("best-*")}
    moves = ["move"] if best else []  # best checkpoints exist after the first epoch
    cuts = {name: place / name for name in ["save", *moves, "set_aside", "note"]}
    for cut in cuts.values():
        shutil.copytree(run.out, cut)
    code, said = tiny.attempt(lambda: tiny.pretrain(given), place / "log")
    wrong = [] if code == 0 and f"at step {begin}, epoch" in said else [f"{code}: {said[-200:]}"]
    missing = set(range(stop + 1, begin + 1))  # no step has these numbers
    if set(tiny.losses(run.out)) != set(range(1, last + 1)) - missing:
        wrong.append("steps are missing, or too many")
    noted = RunFolder(run.out).read_history()
    if len(noted) != 1 or not noted[0]["data_changed"].startswith(counts):
        wrong.append(f"history: {noted}")

    for name, cut in cuts.items():
        again = given.model_copy(update={"out": cut})

        def killed(name: str = name, again: RunOptions = again) -> int:
            _die_before(name)
            return tiny.pretrain(again)

        first, _ = tiny.attempt(killed, place / "log")
        code, said = tiny.attempt(lambda again=again: tiny.pretrain(again), place / "log")
        same = code == 0 and checkpoint.run_digest(cut) == checkpoint.run_digest(run.out)
        if first != 9 or not same or RunFolder(cut).read_history() != noted:
            wrong.append(f"killed before {name}: {first}, {code}, {said[-200:]}")
    for out in (run.out, *cuts.values()):
        aside = out / "checkpoints" / "before-change-1"
        if not pinned(out) >= kept or {path.name for path in aside.glob("best-*")} != best:
            wrong.append(f"{out.name}: a kept or best checkpoint is lost")
        if _bytes_of(out / "encoder-best-before-change-1.safetensors") != encoder:
            wrong.append(f"{out.name}: the best encoder is lost")
    code, said = tiny.attempt(lambda: tiny.pretrain(run), place / "log")  # stays accepted
    if code or "data changed" in said:
        wrong.append(f"the change was not accepted for good: {code}, {said[-200:]}")
    return not wrong, f"{place.name} accepted: {wrong}"


def _bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _die_before(name: str) -> None:
    """End the process before a stage of the change: save, first move, `set_aside` or `note`."""

    def die(*_: Any, **__: Any) -> None:
        os._exit(9)

    holder = {"save": State, "note": RunFolder}.get(name, checkpoint)
    setattr(holder, name, die)


# ---- options


def _with(options: Any, key: str, value: Any) -> Any:
    """`options` with another value for a dotted name, without validation."""
    name, _, rest = key.partition(".")
    inner = _with(getattr(options, name), rest, value) if rest else value
    return options.model_copy(update={name: inner})


def drift(sources: Path, root: Path) -> tuple[Tally, Tally, Tally]:
    """Change every option of a run in turn, fixed and free; then try typos and unknown keys."""
    fixed, free, names = Tally(), Tally(), Tally()
    out = root / "run"
    run = options(sources, out, max_steps=EPOCH)
    code, said = tiny.attempt(lambda: tiny.pretrain(run), root / "log")
    if code:
        raise RuntimeError(said)
    kept, moved = contents(out), root / "moved"
    shutil.copytree(sources, moved)
    others = {
        "out": root / "elsewhere", "data.data": str(moved), "data.val": str(moved),
        "config": root / "any.yaml", "device": "auto", "max_minutes": 5.0, "data.workers": 1,
        "max_steps": EPOCH + 1, "recipe": "moco-v2-small", "data.max_unreadable": "5%",
    }  # fmt: skip
    for key, value in flatten(run).items():
        place = root / "copy"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(out, place)
        if key == "out":
            place = place.rename(others[key])
        other = others.get(key, tiny.other(value))
        changed = _with(
            run.model_copy(update={"out": place}), key, place if key == "out" else other
        )
        before = contents(place)
        code, said = tiny.attempt(lambda changed=changed: tiny.pretrain(changed), root / "log")
        if key in FREE:
            free.note(code == 0 and "error" not in said, f"{key}: {code}, {said[-200:]}")
        else:
            told = f"holds another run ({key}: {value} -> {other})"
            right = code == Exit.USAGE and told in said and contents(place) == before
            fixed.note(right, f"{key}: {code}, {said[-200:]}")
    fixed.note(contents(out) == kept, "the run itself has changed")
    if free.tries != len(FREE):
        free.note(False, f"{free.tries} of {len(FREE)} free options were tried")
    _names(run, names)
    return fixed, free, names


def _names(run: RunOptions, tally: Tally) -> None:
    """Unknown names of options on the command line, in a given file, in a run's config.yaml."""
    config = run.out / "config.yaml"
    text = config.read_text()

    def command(*args: str) -> tuple[int, str]:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                code = main.main(["pretrain", *args])
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, said.getvalue()

    for typed, meant in (("--optim.lrr", "--optim.lr"), ("--epoch", "--epochs")):
        code, said = command("--out", str(run.out), typed, "1")
        tally.note(code == Exit.USAGE and meant in said, f"{typed}: {code}, {said[-200:]}")
    given = run.out.parent / "given.yaml"
    given.write_text("optim:\n  momentun: 0.5\n")
    code, said = command("--config", str(given), "--out", str(run.out))
    tally.note(code == Exit.USAGE and "mean optim.momentum?" in said, f"a file: {code}, {said}")
    for line, expected in (("ema: 1\n", Exit.USAGE), ("", Exit.OK)):
        config.write_text(text.replace("keep_every: 0\n", "") + line)
        code, said = tiny.attempt(lambda: tiny.pretrain(run), run.out.parent / "log")
        right = code == expected and (not line or "config.yaml: ema - no such setting" in said)
        tally.note(right, f"config.yaml of another version: {code}, {said[-200:]}")
        config.write_text(text)

"""Checkpoints: an atomic training state, committed by a manifest; safe loading; the run digest."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clsa import __version__
from clsa.runs import digests
from clsa.runs.digests import leaves
from clsa.system import files
from clsa.system.errors import ClsaError, Exit

NUM_KEPT = 2
STEP, BEST = "step", "best"
KEYS = "keys"


class Saved(NamedTuple):
    """A verified checkpoint on disk."""

    state: dict[str, Any]
    path: Path
    skipped: list[str]
    """Why newer checkpoints were skipped, one line each."""
    facts: dict[str, Any]
    """Its manifest."""


def save(folder: Path, name: str, state: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Write `NAME.ckpt`, then its manifest `NAME.json`, which commits it.

    The manifest holds sha256 and length of the checkpoint, the version of clsa, and `facts`.
    """
    path = folder / f"{name}.ckpt"
    files.make_folder(folder)
    sha256, size = files.write_atomic(path, lambda file: torch.save(state, file))
    manifest = {"sha256": sha256, "bytes": size, "clsa": __version__, **facts}
    try:
        files.write_text(path.with_suffix(".json"), json.dumps(manifest, indent=1) + "\n")
    except ClsaError:
        _remove_uncommitted(folder)
        raise
    return path


def name_of(kind: str, step: int) -> str:
    """Name of a checkpoint of `step`; `kind` is STEP or BEST."""
    return f"{kind}-{step:06d}"


def prune(folder: Path, held: str = "", unsound: Collection[str] = ()) -> list[str]:
    """Delete all checkpoints but the newest two, `held`, those marked `keep`, and the newest best.

    Args:
        held: name of the checkpoint that the run was resumed from.
        unsound: names of damaged checkpoints; they do not count as the newest.

    Returns:
        What could not be deleted, one line each.
    """
    steps, best = _numbered(folder, STEP), _numbered(folder, BEST)
    kept = {held, *[path.stem for path in steps if path.stem not in unsound][:NUM_KEPT]}
    pinned = {path for path in steps if path.stem in kept or _facts(path).get("keep")}
    doomed = [path for path in steps if path not in pinned] + best[1:]
    refused = []
    for manifest in doomed:
        try:
            manifest.unlink()
        except OSError as error:
            refused.append(f"cannot delete {manifest}: {error.strerror}")
    return refused + _remove_uncommitted(folder)


def set_aside(folder: Path, step: int, aside: Path) -> None:
    """Make the checkpoint of `step` the newest, and none the best.

    Checkpoints of later steps are deleted, the newest last, so that a start killed in between
    leaves either that one or `step` as the newest. Later checkpoints marked `keep` and all best
    ones move to the folder `aside`.

    Raises:
        ClsaError: 73 when the folder cannot be written.
    """
    with files.output_errors(folder):
        for manifest in reversed(_numbered(folder, STEP)):
            if _step_of(manifest) > step:
                move(manifest, aside) if is_kept(manifest) else manifest.unlink()
        for manifest in reversed(_numbered(folder, BEST)):
            move(manifest, aside)
    _remove_uncommitted(folder)


def is_kept(manifest: Path) -> bool:
    """Whether this checkpoint exists and is marked `keep`."""
    return manifest.exists() and bool(_facts(manifest).get("keep"))


def move(manifest: Path, aside: Path) -> None:
    """Move a checkpoint to the folder `aside`; raises 73 or 74.

    The manifest moves last: without it the `.ckpt` would count as an interrupted save.
    """
    files.make_folder(aside)
    with files.output_errors(aside):
        for path in (manifest.with_suffix(".ckpt"), manifest):
            with suppress(FileNotFoundError):  # a killed start has moved it already
                path.replace(aside / path.name)
            files.sync_folder(aside)


def _remove_uncommitted(folder: Path) -> list[str]:
    """Delete checkpoints without a manifest: half pruned, or interrupted before the commit."""
    refused = []
    for path in folder.glob("*.ckpt"):
        if re.fullmatch(rf"({STEP}|{BEST})-\d+", path.stem):
            try:
                if not path.with_suffix(".json").exists():
                    path.unlink()
            except OSError as error:
                refused.append(f"cannot delete {path}: {error.strerror}")
    return refused


def _numbered(folder: Path, kind: str) -> list[Path]:
    """Manifests of the checkpoints of one kind, newest first."""
    name = re.compile(rf"{kind}-(\d+)")
    found = {path: name.fullmatch(path.stem) for path in folder.glob(f"{kind}-*.json")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def _step_of(manifest: Path) -> int:
    return int(manifest.stem.partition("-")[2])


def _facts(manifest: Path) -> dict[str, Any]:
    """The contents of a manifest; empty if it is damaged."""
    try:
        facts = json.loads(manifest.read_bytes())
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def load_newest(folder: Path) -> Saved | None:
    """The newest checkpoint whose sha256 matches its manifest; None when there is none.

    Raises:
        ClsaError: 66 when there are checkpoints and none is whole; 77 when one is whole and holds
            more than tensors and plain values.
    """
    skipped: list[str] = []
    for manifest in _numbered(folder, STEP):
        try:
            path, facts = manifest.with_suffix(".ckpt"), _facts(manifest)
            return Saved(_load_verified(manifest), path, skipped, facts)
        except (OSError, ValueError) as error:
            skipped.append(f"{manifest.stem}: {error}")
    if skipped:
        why = "; ".join(skipped)
        raise ClsaError(
            f"{folder}", f"no whole checkpoint ({why})", "start a new run", Exit.NO_INPUT
        )
    return None


def load_each(folder: Path) -> Iterator[Saved]:
    """Every whole checkpoint except copies of the best, oldest first, one at a time."""
    for manifest in reversed(_numbered(folder, STEP)):
        try:
            path, facts = manifest.with_suffix(".ckpt"), _facts(manifest)
            yield Saved(_load_verified(manifest), path, [], facts)
        except (OSError, ValueError):
            continue


def load_one(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and manifest of a single checkpoint.

    Raises:
        ClsaError: 66 when it is missing or not whole; 77 as in `load_newest`.
    """
    manifest = path.with_suffix(".json")
    try:
        return _load_verified(manifest), _facts(manifest)
    except (OSError, ValueError) as error:
        why = f"no whole checkpoint ({error})"
        hint = "give a .ckpt file that has its .json next to it"
        raise ClsaError(str(path), why, hint, Exit.NO_INPUT) from None


def _load_verified(manifest: Path) -> dict[str, Any]:
    path, facts = manifest.with_suffix(".ckpt"), _facts(manifest)
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != facts.get("sha256"):
            raise ValueError("sha256 mismatch")
    if path.stat().st_size != facts.get("bytes"):
        raise ValueError("size mismatch")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a hostile file may raise anything
        why = "holds more than tensors and plain values"
        raise ClsaError(str(path), why, "remove it", Exit.UNTRUSTED) from error
    if name_of(manifest.stem.split("-")[0], state.get("step", -1)) != manifest.stem:
        raise ValueError(f"holds step {state.get('step')}")  # whole, but under the wrong name
    return state


def with_keys(state: dict[str, Any]) -> dict[str, Any]:
    """`state` plus the names of all its leaves under KEYS, so that a missing leaf is noticed."""
    return {**state, KEYS: "\n".join(name for name, _ in leaves(state))}


def require_same_keys(saved: Saved, own: dict[str, Any]) -> None:
    """Check that a checkpoint holds all that was saved, and exactly the keys of `own`.

    Args:
        own: what the run would save now. Keys of its optimiser are not compared: before the first
            step it has no moments, and its fields differ between versions of torch.

    Raises:
        ClsaError: 66 with the first key that is missing or unexpected.
    """
    found = {name for name, _ in leaves(saved.state)}
    written = set(str(saved.state.get(KEYS, "")).split("\n")) - {""} or found
    needed = {name for name, _ in leaves(own) if not name.startswith("/optimizer/")}
    known = needed | {name for name in written if name.startswith("/optimizer/")}
    for problem, keys in (
        ("missing", (needed | written) - found),
        ("unexpected", found - (known & (written | {f"/{KEYS}"}))),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            version = saved.facts.get("clsa", "unknown")
            why = f"{problem} key {min(keys)[1:]}{more} (written by clsa {version})"
            hint = "start a new run, or use the version of clsa that wrote it"
            raise ClsaError(str(saved.path), why, hint, Exit.NO_INPUT)


def run_digest(run: Path) -> str:
    """`digest` of what decides a run's future in the newest whole checkpoint of its folder."""
    saved = load_newest(run / "checkpoints")
    if saved is None:
        hint = "give a run folder; for a run in stages, one of its stage-N folders"
        raise ClsaError(str(run), "holds no checkpoint", hint, Exit.NO_INPUT)
    return digests.digest({key: saved.state[key] for key in ("method", "optimizer", "step")})

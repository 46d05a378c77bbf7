"""Check 9: a missing key of a checkpoint is named; a changed value changes the digest."""

import contextlib
import copy
import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import torch

from clsa.runs import digests
from clsa.system.errors import Exit
from tests.fault import tiny
from tests.fault.damage import Tally
from tests.fault.resumes import options


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every leaf of nested dicts and lists."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key], (*path, key))]
    if isinstance(value, list):
        return [leaf for place, item in enumerate(value) for leaf in leaves(item, (*path, place))]
    return [path]


def perturbed(value: Any) -> Any:
    """A leaf with the smallest change: one number of a tensor, or one letter more."""
    if isinstance(value, torch.Tensor):
        changed, first = value.clone(), (0,) * value.ndim
        changed[first] = not value[first] if value.dtype == torch.bool else value[first] + 1
        return changed
    return not value if isinstance(value, bool) else f"{value}x"


def publish(path: Path, state: Any) -> None:
    """Replace a checkpoint by `state`, with a matching manifest."""
    torch.save(state, path)
    manifest, data = path.with_suffix(".json"), path.read_bytes()
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **facts}))


def keys(pictures: Path, root: Path, limit: int | None) -> tuple[Tally, Tally, Tally]:
    """For each leaf of a checkpoint: leave it out, change it, and add a key next to it.

    Args:
        limit: number of leaves to try, drawn with a fixed seed; None: all.
    """
    out, dropped, changed, added = root / "run", Tally(), Tally(), Tally()
    run = options(pictures, out, max_steps=2)
    code, said = tiny.attempt(lambda: tiny.pretrain(run), root / "log")
    if code:
        raise RuntimeError(said)
    path = out / "checkpoints" / "step-000002.ckpt"
    whole = torch.load(path, weights_only=True)
    digest, paths = digests.digest(whole), leaves(whole)
    if limit is not None:
        paths = random.Random(0).sample(paths, limit)

    def refused() -> tuple[int, str]:
        """In this process: the result of a new start, which ends before its first step."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = tiny.pretrain(run)
        return code, said.getvalue().strip()

    for leaf in paths:
        values = copy.deepcopy(whole)
        holder: Any = values
        for key in leaf[:-1]:
            holder = holder[key]
        holder[leaf[-1]] = perturbed(holder[leaf[-1]])
        changed.note(digests.digest(values) != digest, f"{leaf} changed, same digest")
        del holder[leaf[-1]]
        publish(path, values)
        code, told = refused()
        name = str(leaf[-1]) if isinstance(leaf[-1], str) else "/".join(map(str, leaf[:-1]))
        missing = "no whole checkpoint" if leaf == ("step",) else "missing key "  # in the name too
        right = code == Exit.NO_INPUT and missing in told and name in told and "\n" not in told
        dropped.note(right, f"{leaf} left out: {code}, {told}")
        if isinstance(holder, dict) and leaf[-1] != "step":
            values = copy.deepcopy(whole)
            holder = values
            for key in leaf[:-1]:
                holder = holder[key]
            holder[f"{leaf[-1]}.new"] = torch.zeros(2)
            publish(path, values)
            code, told = refused()
            right = (
                code == Exit.NO_INPUT and "unexpected key " in told and f"{leaf[-1]}.new" in told
            )
            added.note(right, f"added next to {leaf}: {code}, {told}")
    publish(path, whole)
    code, told = tiny.attempt(lambda: tiny.pretrain(run), root / "log")
    dropped.note(code == 0, f"the unchanged checkpoint: {code}, {told}")
    return dropped, changed, added

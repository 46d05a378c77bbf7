"""How a run computes: what its last bits depend on, decided once when it begins and then kept.

`begin` decides for a new run on this machine. `as_before` says how runs computed that began
without a record: a run without one goes on like that. `take` chooses between the record, the two,
and a number of threads that the user gives; its answer is in `Run.computing` for every step, and
`RunFolder.claim` writes it to computing.json.

A new setting is a field of `Computing` whose default is how runs computed before the field was
there (so an old record goes on too), a word in `begin`, and a reader of `run.computing`.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import torch

from clsa.learning.models import has_bf16
from clsa.options.run import RunOptions
from clsa.system import dist, files
from clsa.system.errors import ClsaError, Exit
from clsa.system.machine import share_of_cores

NAME = "computing.json"
_MOST_BYTES = 1 << 16


class Computing(pydantic.BaseModel):
    """How every step of a run is computed; the same for all its processes."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    threads: Annotated[int, pydantic.Field(ge=1)]
    """Threads of each process, besides its workers."""
    precision: Literal["bf16", "fp32"]
    """Type in which matrix products and convolutions run."""

    def apply(self) -> None:
        """Set what holds for the whole process."""
        torch.set_num_threads(self.threads)

    def describe(self, other: "Computing") -> str:
        """The settings in which `other` differs, in words; empty if it does not."""
        mine, others = self.model_dump(), other.model_dump()
        changed = [name for name in mine if mine[name] != others[name]]
        return ", ".join(f"{name} {mine[name]} -> {others[name]}" for name in changed)

    def write(self, folder: Path) -> None:
        """Write the record of the run in `folder`."""
        files.write_text(folder / NAME, self.model_dump_json(indent=2) + "\n")


def as_before(options: RunOptions, device: torch.device) -> Computing:
    """How a run computes that began before there was a record: with as many threads as torch."""
    fast = options.precision == "bf16" or (options.precision == "auto" and has_bf16(device))
    return Computing(threads=torch.get_num_threads(), precision="bf16" if fast else "fp32")


def begin(options: RunOptions, device: torch.device) -> Computing:
    """How a run computes that begins now: no more threads than this process has cores."""
    before = as_before(options, device)
    threads = min(before.threads, share_of_cores())
    return before.model_copy(update={"threads": threads})


def read(folder: Path) -> Computing | None:
    """The record of the run in `folder`; None if it has none.

    Raises:
        ClsaError: 66 when the record cannot be read.
    """
    try:
        return Computing.model_validate(json.loads((folder / NAME).read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        why = f"does not say how the run computes ({type(error).__name__})"
        hint = "restore the file, or start a new run in another --out"
        raise ClsaError(str(folder / NAME), why, hint, Exit.NO_INPUT) from None


def has_begun(folder: Path) -> bool:
    """Whether the run in `folder`, or a stage of it, has saved a step."""
    return any(next(folder.glob(f"{part}checkpoints/*.json"), None) for part in ("", "stage-*/"))


def take(options: RunOptions, device: torch.device) -> tuple[Computing, str]:
    """How the run in `options.out` computes, on every rank as rank 0 finds it, and a note.

    Returns:
        What is taken, and a sentence if the run goes on otherwise than a new one would begin.

    Raises:
        ClsaError: as `read`.
    """
    new = begin(options, device)
    kept = new
    if has_begun(options.out):
        kept = read(options.out) or as_before(options, device)
    if options.threads is not None:
        new, kept = (each.model_copy(update={"threads": options.threads}) for each in (new, kept))
    kept = _from_first(kept, device)
    changed = kept.describe(new)
    note = f"the run computes as it began; a new run on this machine would not: {changed}"
    return kept, note if changed else ""


def _from_first(computing: Computing, device: torch.device) -> Computing:
    text = torch.zeros(_MOST_BYTES, dtype=torch.uint8)
    own = torch.frombuffer(bytearray(computing.model_dump_json().encode()), dtype=torch.uint8)
    text[: len(own)] = own
    told = bytes(dist.from_first(text.to(device)).cpu().numpy()).rstrip(b"\0")
    return Computing.model_validate_json(told)

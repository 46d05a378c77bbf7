"""How a run computes: what its last bits depend on, decided once when it begins and then kept.

`begin` decides for a new run on this machine. `as_before` says how runs computed that began
without a record: a run without one goes on like that. `take` chooses between the record, the two,
and a number of threads that the user gives; its answer is in `Run.computing` for every step, and
`RunFolder.claim` writes it to computing.json.

A new setting is a field of `Computing` whose default is how runs computed before the field was
there (so an old record goes on too), a word in `begin`, and a reader of `run.computing`.
"""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import torch
from torch import nn

from clsa.learning.memory_format import Layout, lay_out, layout_of
from clsa.learning.models import Network, build_encoder, has_bf16
from clsa.learning.precision import compute_in_float32, float32_layers
from clsa.options.run import RunOptions
from clsa.system import dist, files
from clsa.system.errors import ClsaError, Exit
from clsa.system.machine import share_of_cores
from clsa.views.specs import view_sizes

NAME = "computing.json"
_MOST_BYTES = 1 << 16


class Computing(pydantic.BaseModel):
    """How every step of a run is computed; the same for all its processes."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    threads: Annotated[int, pydantic.Field(ge=1)]
    """Threads of each process, besides its workers."""
    precision: Literal["bf16", "fp32"]
    """Type in which matrix products and convolutions run."""
    memory_format: Layout = "channels_last"
    """Order of the numbers of encoders and their pictures."""
    float32_layers: tuple[str, ...] = ()
    """Layers of the encoder that bf16 gets wrong on a CPU: they are computed in float32."""

    def apply(self) -> None:
        """Set what holds for the whole process."""
        torch.set_num_threads(self.threads)

    def apply_to(self, method: nn.Module) -> None:
        """Set what holds for the networks of a method."""
        for network in method.modules():
            if isinstance(network, Network):
                lay_out(network.encoder, self.memory_format)
                if self.precision == "bf16":
                    compute_in_float32(network.encoder, self.float32_layers)

    def notes(self) -> list[str]:
        """What it does otherwise than with most encoders, a sentence each."""
        told = []
        if self.float32_layers:
            names = ", ".join(self.float32_layers)
            told.append(f"computed in float32, because bf16 loses gradients there: {names}")
        if self.memory_format == "contiguous":
            told.append(
                "the encoder runs in the plain memory format: channels_last is unsafe for it"
            )
        return told

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
    """How a run computes that begins now on this machine.

    No more threads than this process has cores; on CPUs, what `suited_layout` and
    `float32_layers` find in the encoder.
    """
    before = as_before(options, device)
    changed: dict[str, object] = {"threads": min(before.threads, share_of_cores())}
    if device.type == "cpu":
        encoder = build_encoder(options.model, options.seed)
        changed["memory_format"] = layout_of(encoder)
        if before.precision == "bf16":
            changed["float32_layers"] = float32_layers(encoder, view_sizes(options))
    return before.model_copy(update=changed)


def read(folder: Path) -> Computing | None:
    """The record of the run in `folder`; None if it has none.

    Raises:
        ClsaError: 66 when the record cannot be read.
    """
    try:
        return Computing.model_validate_json((folder / NAME).read_text("utf-8"))
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

"""The training state of a run: what a checkpoint holds, saved in one piece, resumed to the bit."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clsa.learning.norm_statistics import Statistics
from clsa.methods.method import Method
from clsa.pictures import fingerprints
from clsa.runs import checkpoint
from clsa.runs.data_change import Change, Given, num_changes
from clsa.runs.folder import RunFolder
from clsa.system import dist, environment
from clsa.system.errors import ClsaError, Exit

TENSOR_BYTES = 512  # about what a checkpoint's zip file adds to each tensor


@dataclass
class State:
    """Everything that changes during a run. There is no random state: draws come from a counter.

    Attributes:
        method: model, key network and bank.
        optimizer: over the method's trainable parameters.
        data_digest: digest of the pictures; a run resumes only on these or on an accepted change.
        folder: where checkpoints go.
        step: optimiser steps done.
        best: highest accuracy of the online probe so far, percent.
        resumed: name of the checkpoint that this start resumed from.
        unsound: names of the damaged checkpoints that it passed over.
        bad_in_row: how many of the latest steps, in a row, were skipped for a bad number.
        skipped: steps skipped so far.
        given: the pictures that have the digest `data_digest`.
        statistics: batch norm's statistics before the step.
    """

    method: Method
    optimizer: torch.optim.Optimizer
    data_digest: str
    folder: RunFolder
    step: int = 0
    best: float = -1.0
    resumed: str = ""
    unsound: set[str] = field(default_factory=set)
    bad_in_row: int = 0
    skipped: int = 0
    given: Given = field(default_factory=Given)

    def __post_init__(self) -> None:
        self.statistics = Statistics(self.method)

    def done(self, bad: bool) -> None:
        """Count a step; a bad one has changed nothing else."""
        self.step += 1
        self.bad_in_row = self.bad_in_row + 1 if bad else 0
        self.skipped += bad

    def as_dict(self) -> dict[str, Any]:
        """Nested dict of tensors, numbers and strings, with the names of all of them."""
        values = {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "data_digest": self.data_digest,
            "steps_per_epoch": self.given.steps_per_epoch,
            "skips": {"in_row": self.bad_in_row, "total": self.skipped},
        }
        return checkpoint.with_keys(values)

    def environment(self) -> dict[str, str | int]:
        """What the last bits of the run depend on, in this start."""
        return environment.environment(next(self.method.parameters()).device)

    def num_bytes(self) -> int:
        """Approximate size of a checkpoint on the disk."""
        held = [value for value in self.method.state_dict().values() if isinstance(value, Tensor)]
        moments = 2 if isinstance(self.optimizer, torch.optim.AdamW) else 1
        trained = [param for group in self.optimizer.param_groups for param in group["params"]]
        return sum(tensor.nbytes + TENSOR_BYTES for tensor in [*held, *trained * moments])

    def save(self, keep: bool, best: bool, **more: Any) -> None:
        """Write the checkpoint of this step on rank 0.

        Args:
            keep: never prune it.
            best: write it as the best one too.
            more: further entries of its manifest.
        """
        if dist.rank() == 0:
            facts = {"step": self.step, "keep": keep, "environment": self.environment(), **more}
            kinds = (checkpoint.BEST, checkpoint.STEP) if best else (checkpoint.STEP,)
            for kind in kinds:
                name = checkpoint.name_of(kind, self.step)
                checkpoint.save(self.folder.checkpoints, name, self.as_dict(), facts)
            self.unsound.discard(checkpoint.name_of(checkpoint.STEP, self.step))

    def prune(self) -> list[str]:
        """Delete older checkpoints on rank 0; returns what could not be deleted, one line each.

        Damaged checkpoints count among the newest until this start has saved a step.
        """
        if dist.rank():
            return []
        has_saved = checkpoint.name_of(checkpoint.STEP, self.step) != self.resumed
        unsound = self.unsound if has_saved else set()
        return checkpoint.prune(self.folder.checkpoints, self.resumed, unsound)

    def resume(self) -> list[str]:
        """Load the newest whole checkpoint; change nothing if there is none.

        If the pictures have changed and that is accepted, go back to the beginning of the epoch.

        Returns:
            Notes, one line each: why newer checkpoints were passed over, and what has changed in
            the pictures and the environment.

        Raises:
            ClsaError: 2 when the pictures have changed and that is not accepted, 66 when the
                checkpoint does not fit this run.
        """
        saved = checkpoint.load_newest(self.folder.checkpoints)
        if saved is None:
            return []
        checkpoint.require_same_keys(saved, self.as_dict())
        notes = [f"{why}, using {saved.path.stem}" for why in saved.skipped]
        before = saved.state["data_digest"]
        self.given.compare(before, self.data_digest, self.folder, self.method)
        try:
            self.take(saved.state)
        except (RuntimeError, ValueError) as error:  # torch names the tensor in the last line
            why = str(error).strip().splitlines()[-1].strip()
            raise ClsaError(str(saved.path), why, "start a new run", Exit.NO_INPUT) from None
        self.resumed = saved.path.stem
        self.unsound = {why.partition(":")[0] for why in saved.skipped}
        self.given.begun = Change.begun_by(saved.facts)
        if self.given.changed:
            epoch = self.step // saved.state["steps_per_epoch"]
            # The best accuracy so far was measured with other pictures.
            self.step, self.best = epoch * self.given.steps_per_epoch, -1.0
            self.bad_in_row = 0
            begin = f"with the weights of {self.resumed} at step {self.step}, epoch {epoch + 1}"
            notes.append(f"data changed: {self.given.changed}; continues {begin}")
        moved = environment.describe_change(saved.facts.get("environment"), self.environment())
        return notes + ([moved] if moved else [])

    def take(self, saved: dict[str, Any]) -> None:
        """Take over a state that `as_dict` has returned."""
        self.method.load_state_dict(saved["method"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.best = saved["step"], saved["best"]
        skips = saved["skips"]
        self.bad_in_row, self.skipped = skips["in_row"], skips["total"]

    def keep_pictures(self) -> None:
        """Record the pictures on rank 0; if they have changed, save this state as the newest first.

        The manifest of that checkpoint says what has changed. If the process is killed or the disk
        refuses before the end, the next start finds either the earlier run (as long as a later
        checkpoint of it exists) or the changed run, and finishes the work.
        """
        given, folder = self.given, self.folder
        if given.source is None or dist.rank():
            return
        if given.begun:
            given.begun.finish(folder)
        if given.changed:
            change = Change(num_changes(folder) + 1, self.step, given.changed)
            keep = change.free_name(folder, self.resumed)
            self.save(keep, best=False, **change.manifest())
            self.resumed = checkpoint.name_of(checkpoint.STEP, self.step)
            change.finish(folder)
        fingerprints.keep(folder.pictures, given.source, self.data_digest)

"""The training state of a run: what a checkpoint holds, saved whole and resumed to the bit."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clsa import checkpoint, dist
from clsa.bad_steps import Statistics
from clsa.errors import ClsaError
from clsa.folder import RunFolder
from clsa.methods.method import Method

TENSOR_BYTES = 512  # about what a checkpoint's zip file adds to each tensor


@dataclass
class State:
    """Everything that changes during a run. There is no random state: draws come from a counter.

    Attributes:
        method: model, key network and bank.
        optimizer: over the method's trainable parameters.
        data_digest: of the pictures; a run resumes on the same ones only.
        folder: where checkpoints go.
        step: optimiser steps done.
        best: highest accuracy of the online probe so far, percent.
        resumed: name of the checkpoint that this start went on from.
        unsound: names of those that it passed over.
        bad_in_row: how many steps, the last ones, were skipped for a bad number.
        skipped: steps skipped so far.
        statistics: what batch norm's were before the step.
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

    def __post_init__(self) -> None:
        self.statistics = Statistics(self.method)

    def done(self, bad: bool) -> None:
        """A step is done; a bad one has moved nothing else."""
        self.step += 1
        self.bad_in_row = self.bad_in_row + 1 if bad else 0
        self.skipped += bad

    def as_dict(self) -> dict[str, Any]:
        """Nested dict of tensors, numbers and strings."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "data_digest": self.data_digest,
            "skips": {"in_row": self.bad_in_row, "total": self.skipped},
        }

    def num_bytes(self) -> int:
        """About what a checkpoint takes on the disk."""
        held = [value for value in self.method.state_dict().values() if isinstance(value, Tensor)]
        moments = 2 if isinstance(self.optimizer, torch.optim.AdamW) else 1
        trained = [param for group in self.optimizer.param_groups for param in group["params"]]
        return sum(tensor.nbytes + TENSOR_BYTES for tensor in [*held, *trained * moments])

    def save(self, keep: bool, best: bool) -> None:
        """Write the checkpoint of this step on rank 0.

        Args:
            keep: never prune it.
            best: write it as the best one too.
        """
        if dist.rank() == 0:
            facts = {"step": self.step, "keep": keep}
            kinds = (checkpoint.BEST, checkpoint.STEP) if best else (checkpoint.STEP,)
            for kind in kinds:
                name = checkpoint.name_of(kind, self.step)
                checkpoint.save(self.folder.checkpoints, name, self.as_dict(), facts)
            self.unsound.discard(checkpoint.name_of(checkpoint.STEP, self.step))

    def prune(self) -> list[str]:
        """Delete older checkpoints on rank 0; returns what could not be, a line each.

        Damaged ones count among the newest until this start has saved a step.
        """
        if dist.rank():
            return []
        has_saved = checkpoint.name_of(checkpoint.STEP, self.step) != self.resumed
        unsound = self.unsound if has_saved else set()
        return checkpoint.prune(self.folder.checkpoints, self.resumed, unsound)

    def resume(self) -> list[str]:
        """Take up the newest whole checkpoint; stays as it is when there is none.

        Returns:
            Why newer checkpoints were passed over, a line each.

        Raises:
            ClsaError: 2 when the pictures are not those that the run began with.
        """
        saved = checkpoint.load_newest(self.folder.checkpoints)
        if saved is None:
            return []
        if saved.state["data_digest"] != self.data_digest:
            why = "the pictures are not those that the run began with"
            raise ClsaError(str(self.folder.path), why, "restore them, or choose another --out")
        self.take(saved.state)
        self.resumed = saved.path.stem
        self.unsound = {why.partition(":")[0] for why in saved.skipped}
        return [f"{why}, using {self.resumed}" for why in saved.skipped]

    def take(self, saved: dict[str, Any]) -> None:
        """Become what `as_dict` has told."""
        self.method.load_state_dict(saved["method"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.best = saved["step"], saved["best"]
        skips = saved.get("skips", {"in_row": 0, "total": 0})  # older runs have none
        self.bad_in_row, self.skipped = skips["in_row"], skips["total"]

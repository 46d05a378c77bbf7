"""Other pictures in the midst of a run: refused with what has changed, or gone on with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clsa.methods.method import Method
from clsa.pictures import fingerprints
from clsa.pictures.sources import Source
from clsa.runs import checkpoint
from clsa.runs.folder import RunFolder
from clsa.system.errors import ClsaError

CHANGE = "change"  # in the manifest of the checkpoint with which a run goes on with others


class Change(NamedTuple):
    """Other pictures that a run has gone on with."""

    number: int
    """Among the changes of the run, from 1."""
    step: int
    told: str
    """What has changed."""

    @classmethod
    def begun_by(cls, manifest: dict[str, Any]) -> "Change | None":
        """The change that a checkpoint began; None where it is of any other step."""
        return cls(**manifest[CHANGE]) if CHANGE in manifest else None

    def manifest(self) -> dict[str, Any]:
        """What the manifest of its checkpoint says of it."""
        return {CHANGE: self._asdict()}

    def aside(self, folder: RunFolder) -> Path:
        """Where checkpoints go that it would cost."""
        return folder.checkpoints / f"before-change-{self.number}"

    def free_name(self, folder: RunFolder, resumed: str) -> bool:
        """Have its checkpoint overwrite none to be kept; whether to keep it in the place of one.

        Args:
            resumed: name of the checkpoint that the run goes on from, which may stand there.

        Raises:
            ClsaError: 73 or 74 when the disk refuses.
        """
        manifest = folder.checkpoints / f"{checkpoint.name_of(checkpoint.STEP, self.step)}.json"
        is_kept, has_same_weights = checkpoint.is_kept(manifest), manifest.stem == resumed
        if is_kept and not has_same_weights:
            checkpoint.move(manifest, self.aside(folder))
        return is_kept and has_same_weights

    def finish(self, folder: RunFolder) -> None:
        """Take what came of the pictures of before out of the way; `history.jsonl` says so, last.

        Raises:
            ClsaError: 73 or 74 when the disk refuses; the next start does what is left.
        """
        if num_changes(folder) < self.number:
            aside = self.aside(folder)
            checkpoint.set_aside(folder.checkpoints, self.step, aside)
            folder.rename_best_encoder(aside.name)
            folder.note(self.step, data_changed=self.told)


def num_changes(folder: RunFolder) -> int:
    """How many changes of the pictures are behind a run."""
    return sum("data_changed" in line for line in folder.read_history())


@dataclass
class Given:
    """The pictures that a start of a run is given.

    Attributes:
        source: the pictures, to tell what has changed among them.
        steps_per_epoch: with these.
        accepts_change: whether to go on with others than before.
        changed: what has changed among them.
        begun: the change that the checkpoint began which this start went on from.
    """

    source: Source | None = None
    steps_per_epoch: int = 1
    accepts_change: bool = False
    changed: str = ""
    begun: Change | None = None

    def compare(self, before: str, now: str, folder: RunFolder, method: Method) -> None:
        """Tell what has changed, in `changed`, since the run's pictures had the digest `before`.

        Raises:
            ClsaError: 2 when something has, and the run may not go on with that.
        """
        if before == now:
            return
        what, told = str(folder.path), "other pictures"
        if self.source is not None:
            told = fingerprints.describe_change(folder.pictures, self.source, before, now)
        hint = "restore the pictures, or choose another --out"
        parts = method.modules()  # what goes around a method may hold them, as CLIM does
        if any(getattr(part, "holds_pictures", False) for part in parts):
            why = f"data changed: {told}, and the method keeps a row for each picture"
            raise ClsaError(what, why, hint)
        if not self.accepts_change:
            hint += ", or begin the epoch anew with these: --accept-data-change"
            raise ClsaError(what, f"data changed: {told}", hint)
        self.changed = told

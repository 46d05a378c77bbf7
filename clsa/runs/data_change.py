"""Pictures that change during a run: refused, with what has changed, or accepted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clsa.methods.method import Method
from clsa.pictures import fingerprints
from clsa.pictures.sources import Source
from clsa.runs import checkpoint
from clsa.runs.folder import RunFolder
from clsa.system.errors import ClsaError

CHANGE = "change"  # entry in the manifest of the first checkpoint with changed pictures


class Change(NamedTuple):
    """A change of the pictures with which a run has continued."""

    number: int
    """Place among the changes of the run, from 1."""
    step: int
    told: str
    """What has changed, in words."""

    @classmethod
    def begun_by(cls, manifest: dict[str, Any]) -> "Change | None":
        """The change that begins with this manifest's checkpoint; None if no change does."""
        return cls(**manifest[CHANGE]) if CHANGE in manifest else None

    def manifest(self) -> dict[str, Any]:
        """The entry for this change in the manifest of its first checkpoint."""
        return {CHANGE: self._asdict()}

    def aside(self, folder: RunFolder) -> Path:
        """The folder for checkpoints that this change would otherwise overwrite or delete."""
        return folder.checkpoints / f"before-change-{self.number}"

    def free_name(self, folder: RunFolder, resumed: str) -> bool:
        """Move a checkpoint marked `keep` out of the way of this change's first checkpoint.

        Args:
            resumed: name of the checkpoint that the run is resumed from. If the new checkpoint
                takes its name, both hold the same weights, and the old one is not moved.

        Returns:
            Whether the new checkpoint replaces one marked `keep`, and so must be kept too.

        Raises:
            ClsaError: 73 or 74 when the disk refuses.
        """
        manifest = folder.checkpoints / f"{checkpoint.name_of(checkpoint.STEP, self.step)}.json"
        is_kept, has_same_weights = checkpoint.is_kept(manifest), manifest.stem == resumed
        if is_kept and not has_same_weights:
            checkpoint.move(manifest, self.aside(folder))
        return is_kept and has_same_weights

    def finish(self, folder: RunFolder) -> None:
        """Set aside what the earlier pictures led to, then note the change in `history.jsonl`.

        Raises:
            ClsaError: 73 or 74 when the disk refuses; the next start finishes the work.
        """
        if num_changes(folder) < self.number:
            aside = self.aside(folder)
            checkpoint.set_aside(folder.checkpoints, self.step, aside)
            folder.rename_best_encoder(aside.name)
            folder.note(self.step, data_changed=self.told)


def num_changes(folder: RunFolder) -> int:
    """How many times the pictures of a run have changed so far."""
    return sum("data_changed" in line for line in folder.read_history())


@dataclass
class Given:
    """The pictures that are given when a run starts or resumes.

    Attributes:
        source: the pictures, needed to say what has changed.
        steps_per_epoch: steps per epoch with these pictures.
        accepts_change: whether to continue if the pictures have changed.
        changed: what has changed, in words; empty if nothing has.
        begun: the change that begins with the checkpoint that this start has resumed from.
    """

    source: Source | None = None
    steps_per_epoch: int = 1
    accepts_change: bool = False
    changed: str = ""
    begun: Change | None = None

    def compare(self, before: str, now: str, folder: RunFolder, method: Method) -> None:
        """Set `changed` to what has changed since the run's pictures had the digest `before`.

        Raises:
            ClsaError: 2 when something has changed and the run may not continue with it.
        """
        if before == now:
            return
        what, change = str(folder.path), "other pictures"
        if self.source is not None:
            change = fingerprints.describe_change(folder.pictures, self.source, before, now)
        hint = "restore the pictures, or choose another --out"
        parts = method.modules()  # a wrapper may hold pictures too, as CLIM does
        if any(getattr(part, "holds_pictures", False) for part in parts):
            why = f"data changed: {change}, and the method keeps a row for each picture"
            raise ClsaError(what, why, hint)
        if not self.accepts_change:
            hint += ", or restart the epoch with the pictures as they are: --accept-data-change"
            raise ClsaError(what, f"data changed: {change}", hint)
        self.changed = change

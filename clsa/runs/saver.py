"""When a run is saved, and what happens when the disk refuses."""

import shutil
import time
from pathlib import Path

from clsa.options.run import RunOptions
from clsa.runs import checkpoint, saved_encoder
from clsa.runs.journal import Journal
from clsa.runs.state import State
from clsa.system import dist, files
from clsa.system.errors import ClsaError, Exit

MISSES = 3
BUNDLES = 3


class Saver:
    """Saves a run in time; lets it continue until the disk refuses three saves in a row.

    Args:
        state: the present state of the run.
        options: the options of the run.
        journal: where refused saves are reported.
    """

    def __init__(self, state: State, options: RunOptions, journal: Journal):
        self.state, self.options, self.journal = state, options, journal
        self.intact, self.missed, self.since = state.step, 0, time.monotonic()
        self._prune()  # what a killed start left undone
        if not state.step and dist.rank() == 0:
            shutil.rmtree(state.folder.bad, ignore_errors=True)  # from a start with other options

    def is_due(self) -> bool:
        """Whether the last save, or the last attempt, is too long ago."""
        return time.monotonic() - self.since > 60 * self.options.save_minutes

    def save(self, keep: bool, best: bool, last: bool) -> None:
        """Write the checkpoint of this step; if it is the `best` so far, its encoder too.

        Args:
            keep: never prune it.
            best: write it as the best one too.
            last: the run ends here.

        Raises:
            ClsaError: 74 when the disk refuses the last save, or the third in a row.
        """
        try:
            if best:
                write_encoder(self.state, self.options, self.state.folder.best_encoder)
            self.state.save(keep, best)
        except ClsaError as error:
            self._miss(error, last)
        else:
            self.intact, self.missed = self.state.step, 0
            self._prune()
        self.journal.restart_clock()
        self.since = time.monotonic()

    def keep_bad(self, reason: str) -> str:
        """Write what `clsa replay` needs: the state before the first of several bad steps in a row.

        Bad steps change nothing, so this is the present state except for the step number. A run
        keeps the states of its first `BUNDLES` such rows, if the disk has room for one more
        checkpoint besides. A run in stages keeps none, because each stage gathers its pictures
        again.

        Returns:
            The file for this row of bad steps, or an empty string.
        """
        state, folder = self.state, self.state.folder.bad
        first = state.step - state.bad_in_row
        name = checkpoint.name_of(checkpoint.STEP, first)
        path = folder / f"{name}.ckpt"
        if state.bad_in_row == 1 and dist.rank() == 0 and not self.options.stages:
            bad = {"reason": reason, "options": self.options.to_yaml(), "world": dist.world_size()}
            try:
                if len(list(folder.glob("*.json"))) < BUNDLES:
                    files.require_room(state.folder.path, 2 * state.num_bytes())
                    kept = {**state.as_dict(), "step": first, "bad": bad}
                    checkpoint.save(folder, name, kept, {"step": first})
            except ClsaError as error:
                self.journal.say(f"warning: step {first} cannot be replayed later: {error}")
        return str(path) if path.exists() else ""

    def _prune(self) -> None:
        for refused in self.state.prune():
            self.journal.say(f"warning: {refused}")

    def _miss(self, error: ClsaError, last: bool) -> None:
        """Report a failed save; raise if it was the last save or one failure too many."""
        if not isinstance(error.__cause__, OSError):
            raise error
        self.missed += 1
        folder = self.state.folder.checkpoints
        where = folder if folder.is_dir() else folder.parent
        what = f"cannot save step {self.state.step} ({folder})"
        why = files.describe_room(where, self.state.num_bytes(), error.__cause__)
        before = f"previous step {self.intact} is intact" if self.intact else "no step is saved yet"
        if last or self.missed == MISSES:
            raise ClsaError(what, why, before, Exit.IO) from error
        self.journal.say(f"error: {what} - {why} - {before}")


def write_encoder(state: State, options: RunOptions, path: Path) -> None:
    """Write the query encoder as safetensors, with what is needed to use and judge it."""
    facts = saved_encoder.EncoderFacts.of(options, state.step, state.data_digest)
    saved_encoder.save_encoder(path, state.method.network.encoder, facts)

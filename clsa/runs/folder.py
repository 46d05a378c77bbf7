"""The run folder: its files, the run that it belongs to, and the status that the run left."""

import json
import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clsa.options.config import flatten, read_yaml
from clsa.options.run import RunOptions
from clsa.runs.computing import Computing
from clsa.system import dist, files, lock
from clsa.system.errors import ClsaError

# Options that may differ when a run is resumed: where it runs and how long, never what it computes
# (pictures may have moved: their digest is compared instead).
FREE = {
    "recipe", "config", "out", "data.data", "data.val", "data.workers", "max_steps", "max_minutes",
    "wait_minutes", "save_minutes", "keep_every", "probe_every", "log_every", "device",
    "accept_data_change", "stop_on_collapse", "tensorboard", "threads",
    "data.max_unreadable",
}  # fmt: skip


class RunFolder:
    """Paths inside `out`; nothing is created before `claim`.

    Args:
        free: names of options in which a run may differ from what the folder holds.
    """

    def __init__(self, out: Path, free: Collection[str] = frozenset(FREE)):
        self.path, self.free = out, free
        self.checkpoints = out / "checkpoints"
        self.bad = out / "bad"
        self.metrics = out / "metrics.jsonl"
        self.encoder = out / "encoder.safetensors"
        self.best_encoder = out / "encoder-best.safetensors"
        self.results = out / "results.json"
        self.views = out / "views.png"
        self.neighbours = out / "neighbours.png"
        self.embeddings = out / "embeddings"
        self.tensorboard = out / "tensorboard"
        self.status_file = out / "status.json"
        self.config = out / "config.yaml"
        self.pictures = out / "pictures.npz"
        self.history = out / "history.jsonl"

    def check(self, options: RunOptions) -> None:
        """Check that `out` is free, or holds the run that `options` describe.

        Raises:
            ClsaError: 2 when it holds something else, naming what differs; 73 when it cannot be a
                folder.
        """
        with files.output_errors(self.path):
            found = self.path.iterdir() if self.path.exists() else ()
            if all(path.name == lock.NAME or files.is_leftover(path) for path in found):
                return
        if not self.config.exists():
            why = "neither empty nor a run's folder"
            raise ClsaError(str(self.path), why, "choose another --out")
        try:
            before = flatten(self.read_options())
        except ClsaError as error:
            why = f"its config.yaml does not describe a run ({error})"
            raise ClsaError(str(self.path), why, "choose another --out", error.code) from None
        results = (self.encoder, self.results, *self.checkpoints.glob("*.json"))
        if not any(path.exists() for path in results):
            return  # it stopped before its first checkpoint: nothing to lose
        now = flatten(options)
        # Options of another method are in only one of the two.
        changed = [key for key in now if key not in self.free and now[key] != before.get(key)]
        if changed:
            changed.sort(key=lambda key: key != "method.name")  # the most telling difference first
            differences = ", ".join(
                f"{key}: {before.get(key)} -> {now[key]}" for key in changed[:4]
            )
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            why = f"holds another run ({differences}{more})"
            hint = "choose another --out, or the run's own options"
            if changed == ["epochs"] and now["epochs"] > before["epochs"] and not options.stages:
                name = shlex.quote(str(self.path))
                hint += f", or train for longer: clsa extend {name} --epochs {options.epochs}"
            raise ClsaError(str(self.path), why, hint)

    def read_options(self) -> RunOptions:
        """The options in its config.yaml.

        Raises:
            ClsaError: 66 when there is no config.yaml, 2 when it does not describe a run; the error
                names what is not an option.
        """
        return RunOptions.parse(read_yaml(self.config), str(self.config))

    @contextmanager
    def held(self, options: RunOptions) -> Iterator[None]:
        """Keep other runs out of the folder while inside; rank 0 does it for all ranks.

        Raises:
            ClsaError: 2 when another process writes the folder; also as `check`, which runs again.
        """
        if dist.rank():
            yield
            return
        with lock.only_writer(self.path):
            self.check(options)
            yield

    def require_room(self, num_bytes: int) -> None:
        """Check that a checkpoint of this size fits; raises 73 before any work is lost."""
        files.make_folder(self.path)
        exists = self.checkpoints.is_dir()  # it may be on a disk of its own
        files.require_room(self.checkpoints if exists else self.path, num_bytes)

    def claim(self, options: RunOptions, computing: Computing, step: int = 0) -> str:
        """Create the folder, write `config.yaml` and `computing.json`, remove old leftovers.

        A new number of epochs goes to `history.jsonl` before `config.yaml`. A start killed in
        between leaves a line about an extension that did not begin; in the other order the line
        would be lost.

        Args:
            computing: how the run computes from here on.
            step: steps that the run has done.

        Returns:
            A sentence that the run is now longer than it was started (`history.jsonl` says so too),
            or an empty string.
        """
        files.make_folder(self.path)
        for folder in (self.path, self.checkpoints):
            files.remove_leftovers(folder)
        before = self.read_options().epochs if step and self.config.exists() else options.epochs
        if before != options.epochs:
            self.note(step, epochs=[before, options.epochs])
        once = options.model_copy(update={"accept_data_change": False})  # for this start only
        files.write_text(self.config, once.to_yaml())
        computing.write(self.path)
        since = f"epochs {before} -> {options.epochs} at step {step}"
        text = f"{since}: rates follow the longer schedule from here on, not from the start"
        return text if before != options.epochs else ""

    def note(self, step: int, **told: Any) -> None:
        """Add a line to `history.jsonl`: what changed during the run.

        Raises:
            ClsaError: 73 or 74 when the file cannot be read or written; it then stays as it was.
        """
        line = {"step": step, **told}
        if self.read_history()[-1:] != [line]:  # a start killed just afterwards has noted it
            text = self._read_text(self.history)
            torn = "\n" if text and not text.endswith("\n") else ""
            files.write_text(self.history, f"{text}{torn}{json.dumps(line)}\n")

    def read_history(self) -> list[dict[str, Any]]:
        """The lines of `history.jsonl`; a line that cannot be read is left out.

        Raises:
            ClsaError: 73 or 74 when the file exists but the system refuses to read it.
        """
        found = []
        for line in self._read_text(self.history).split("\n"):
            with suppress(ValueError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def _read_text(self, path: Path) -> str:
        """The text of a file of the run, damaged bytes included; empty if there is no file."""
        with files.output_errors(path):
            try:
                return path.read_bytes().decode("utf-8", "surrogateescape")
            except FileNotFoundError:
                return ""

    def rename_best_encoder(self, since: str) -> None:
        """Rename `encoder-best.safetensors`, if there is one, to `encoder-best-SINCE`."""
        with files.output_errors(self.path), suppress(FileNotFoundError):
            best = self.best_encoder
            best.replace(best.with_stem(f"{best.stem}-{since}"))

    def write_status(self, code: int, reason: str, step: int, resumable: bool) -> None:
        """`status.json`: how the last start of the run ended."""
        status = {"code": int(code), "reason": reason, "step": step, "resumable": resumable}
        files.write_text(self.status_file, json.dumps(status) + "\n")

    def write_quarantine(self, reasons: dict[str, str]) -> None:
        """`quarantine.jsonl`: pictures that could not be read, by path, and why."""
        lines = [json.dumps({"path": path, "reason": why}) for path, why in reasons.items()]
        files.write_text(self.path / "quarantine.jsonl", "\n".join(lines) + "\n")

    def read_quarantine(self) -> dict[str, str]:
        """What an earlier start of the run wrote to `quarantine.jsonl`."""
        path = self.path / "quarantine.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            return {str(line["path"]): str(line["reason"]) for line in lines}
        except (OSError, ValueError, LookupError, TypeError):
            return {}  # missing or damaged: bad pictures are found again

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of `metrics.jsonl` after `step`, where a resumed run starts."""
        if self.metrics.exists():
            with files.output_errors(self.metrics):
                lines = self.metrics.read_text("utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            files.write_text(self.metrics, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        values: dict[str, Any] = json.loads(line)
        return float(values["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a torn last line

"""What a run reports while it runs: a progress bar, metrics.jsonl, TensorBoard."""

import json
import math
import threading
import time
from contextlib import suppress
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from clsa.methods.method import Landmarks
from clsa.options.run import Tensorboard
from clsa.runs.alarms import Alarm
from clsa.runs.folder import RunFolder
from clsa.system import extras, files


def summary_writer(tensorboard: Tensorboard) -> Any:
    """The class that writes tensorboard/; None if the option is off, or auto without the library.

    Raises:
        ClsaError: 2 when TensorBoard is asked for and not installed.
    """
    if tensorboard == "off":
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import
    except ImportError as error:  # also when another folder has the library's name
        if tensorboard == "on":
            raise extras.missing("tensorboard", "tensorboard", "TensorBoard files") from error
        return None
    return SummaryWriter


class _Message(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("message", "")))


class Journal:
    """Logs one run. Only the journal of rank 0 speaks; on other ranks every call does nothing.

    Args:
        folder: where metrics.jsonl and tensorboard/ go.
        first_step, last_step: range of steps of this start of the run.
        steps_per_epoch: used to count epochs.
        landmarks: name of the loss to print, its chance and its floor.
        speaks: whether this process logs.
        tensorboard: whether it writes tensorboard/ too.

    Raises:
        ClsaError: 2 when TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        folder: RunFolder,
        first_step: int,
        last_step: int,
        steps_per_epoch: int,
        landmarks: Landmarks,
        speaks: bool,
        tensorboard: Tensorboard = "auto",
    ):
        self.console = Console(stderr=True, quiet=not speaks)
        self.speaks, self.landmarks, self.steps_per_epoch = speaks, landmarks, steps_per_epoch
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            _Message(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not (speaks and self.console.is_terminal),
        )
        self.task = self.progress.add_task("", total=last_step, completed=first_step, epoch=1)
        self.folder, self.last_step, self.unwritten = folder, last_step, b""
        self.writer = summary_writer(tensorboard) if speaks else None
        self.restart_clock()

    def __enter__(self) -> Self:
        if self.speaks:
            start = int(self.progress.tasks[0].completed)
            with files.output_errors(self.folder.path):
                self.file = open(self.folder.metrics, "ab", buffering=0)
                place = str(self.folder.tensorboard)
                self.board = self.writer(place, purge_step=start + 1) if self.writer else None
            self.excepthook, threading.excepthook = threading.excepthook, self._thread_failed
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()
        if self.speaks:
            threading.excepthook = self.excepthook
            self._append("")
            self.file.close()
            if self.board is not None:
                with suppress(OSError):  # a full disk: already reported, or harmless
                    self.board.close()

    def restart_clock(self) -> None:
        """Count images/s from now on, so that probing and saving do not show as slow steps."""
        self.since, self.images, self.waited = time.monotonic(), 0, 0.0

    def count(self, images: int, waited_s: float) -> None:
        """One step is done: `images` of the global batch, after waiting `waited_s` for data."""
        self.images += images
        self.waited += waited_s
        self.progress.advance(self.task)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a line of metrics for `step` (steps done) with the rates since the last line."""
        if not self.speaks:
            return
        elapsed = max(time.monotonic() - self.since, 1e-9)
        rate, share = self.images / elapsed, self.waited / elapsed
        self.restart_clock()
        epoch = step / self.steps_per_epoch
        self.write({"step": step, "epoch": round(epoch, 4), **values,
                    "images_per_s": round(rate, 2), "data_wait": round(share, 4)})  # fmt: skip
        name, chance, floor = self.landmarks
        text = f"{name} {values[name]:.2f} (chance {chance:.2f}, floor {floor:.2f})"
        if "kl" in values:
            text += f" · KL {values['kl']:.3f}"
        text += f" · {rate:,.0f} images/s · waiting {share:.0%}"
        self.progress.update(self.task, message=text, epoch=math.ceil(epoch))
        if not self.console.is_terminal and step % self.steps_per_epoch == 0:
            self.say(f"epoch {math.ceil(epoch)} step {step}/{self.last_step} {text}")

    def refreshed(self, step: int, values: dict[str, float]) -> None:
        """Write and print what was prepared before an epoch, and how long it took."""
        # Under the step that follows: a resumed run prepares again, and so drops the line.
        self.write({"step": step + 1, "epoch": step / self.steps_per_epoch, **values})
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"before epoch {step // self.steps_per_epoch + 1}: {text}")

    def skipped(self, step: int, total: int, reason: str) -> None:
        """Write and print that the last of `step` steps was skipped, `total` of them so far."""
        self.write({"step": step, "epoch": round(step / self.steps_per_epoch, 4), "skipped": total})
        self.say(f"warning: step {step - 1} was skipped and has changed nothing - {reason}")

    def alarm(self, step: int, alarm: Alarm) -> None:
        """Write and print an alarm that began at `step` (steps done)."""
        epoch = round(step / self.steps_per_epoch, 4)
        if self.speaks:
            line = {"step": step, "epoch": epoch, "alarm": alarm.name, "looks": alarm.looks}
            self._append(json.dumps(line) + "\n")
        self.say(f"warning: at step {step}, {alarm}")

    def write(self, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and its numbers to TensorBoard."""
        if not self.speaks:
            return
        self._append(json.dumps(values) + "\n")
        try:
            for name, value in values.items():
                if name != "step" and self.board is not None:
                    self.board.add_scalar(name, value, int(values["step"]))
        except OSError as error:
            self.board = None  # its writer thread has ended
            self.say(
                f"warning: tensorboard/ gets nothing more until the next start - {error.strerror}"
            )

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """Ignore disk errors of TensorBoard's thread: `write` meets them again and reports them."""
        if not (
            issubclass(args.exc_type, OSError) and "tensorboard" in type(args.thread).__module__
        ):
            self.excepthook(args)

    def _append(self, line: str) -> None:
        """Add a line to metrics.jsonl; if the disk refuses, keep it for the next call."""
        refused_before = bool(self.unwritten)
        self.unwritten += line.encode()
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not refused_before:
                self.say(
                    f"warning: cannot write metrics.jsonl yet, lines are kept - {error.strerror}"
                )

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

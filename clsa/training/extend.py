"""A run made longer than it was begun: the rates follow the longer schedule from there on."""

import os
import sys
from pathlib import Path

from clsa.options.commands import ExtendOptions
from clsa.options.run import RunOptions
from clsa.runs.folder import FREE, RunFolder
from clsa.system.errors import ClsaError, Exit
from clsa.training import start


def extend(options: ExtendOptions) -> Path:
    """Train the run of a folder, finished or not, up to so many epochs; returns the folder.

    What is computed is as its config.yaml has it, which then says the new epochs; `history.jsonl`
    says since which step. The same call resumes it.

    Raises:
        ClsaError: 66 for what is no run's folder, 2 for a run in stages, or one of more epochs; as
            `start.pretrain`.
    """
    folder = RunFolder(options.run, FREE | {"epochs"})
    if not folder.config.exists():
        why = "holds no run (no config.yaml)"
        raise ClsaError(str(options.run), why, "give the folder of a run", Exit.NO_INPUT)
    before = folder.read_options()
    if before.stages:
        why = "it learns in stages, each of so many epochs"
        raise ClsaError(str(options.run), why, "begin a run of more epochs: --out ANOTHER")
    if options.epochs < before.epochs:
        why = f"the run has {before.epochs} already"
        raise ClsaError(f"{options.run}: --epochs {options.epochs}", why, "give a larger total")
    if options.epochs == before.epochs and os.environ.get("RANK", "0") == "0":
        told = f"note: the run has {before.epochs} epochs already: what is left of them is done"
        print(told, file=sys.stderr)
    return start.pretrain(longer(before, options), folder.free)


def longer(before: RunOptions, options: ExtendOptions) -> RunOptions:
    """The options of the run with the new epochs, where it and its pictures lie now.

    Limits of steps and minutes are not taken over: it may have stopped at one.
    """
    data = {"data": options.data, "workers": options.workers}
    given = {name: value for name, value in data.items() if value is not None}
    over = {
        "out": options.run,
        "epochs": options.epochs,
        "max_steps": None,
        "max_minutes": options.max_minutes,
        "accept_data_change": options.accept_data_change,
        "device": options.device or before.device,
        "data": before.data.model_copy(update=given),
    }
    return before.model_copy(update=over)

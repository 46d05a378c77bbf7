"""Train a run for more epochs: from there on, the rates follow the longer schedule."""

import os
import sys
from pathlib import Path

from clsa.options.commands import ExtendOptions
from clsa.options.run import RunOptions
from clsa.runs.folder import FREE, RunFolder
from clsa.system.errors import ClsaError, Exit
from clsa.training import start


def extend(options: ExtendOptions) -> Path:
    """Train the run in a folder, finished or not, up to a larger number of epochs.

    The options in its config.yaml stay in force; the new number of epochs is written there, and
    `history.jsonl` records the step of the change. The same call resumes the extended run.

    Returns:
        The folder.

    Raises:
        ClsaError: 66 for a folder that holds no run; 2 for a run in stages, or a run that has more
            epochs already; others as `start.pretrain`.
    """
    folder = RunFolder(options.run, FREE | {"epochs"})
    if not folder.config.exists():
        why = "holds no run (no config.yaml)"
        raise ClsaError(str(options.run), why, "give the folder of a run", Exit.NO_INPUT)
    before = folder.read_options()
    if before.stages:
        why = "a run in stages cannot be extended: its epochs are per stage"
        raise ClsaError(str(options.run), why, "start a run with more epochs in another --out")
    if options.epochs < before.epochs:
        why = f"the run already has {before.epochs} epochs"
        raise ClsaError(f"{options.run}: --epochs {options.epochs}", why, "give a larger total")
    if options.epochs == before.epochs and os.environ.get("RANK", "0") == "0":
        note = f"note: the run already has {before.epochs} epochs; it trains those that are left"
        print(note, file=sys.stderr)
    return start.pretrain(longer(before, options), folder.free)


def longer(before: RunOptions, options: ExtendOptions) -> RunOptions:
    """The options of the run with the new epochs and the present paths of folder and pictures.

    The old limits of steps and minutes are dropped: the run may have stopped at one of them.
    """
    data = {"data": options.data, "workers": options.workers}
    changed = {name: value for name, value in data.items() if value is not None}
    changes = {
        "out": options.run,
        "epochs": options.epochs,
        "max_steps": None,
        "max_minutes": options.max_minutes,
        "accept_data_change": options.accept_data_change,
        "device": options.device or before.device,
        "data": before.data.model_copy(update=changed),
    }
    return before.model_copy(update=changes)

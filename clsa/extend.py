"""A run made longer than it was begun: the rates follow the longer schedule from there on."""

from pathlib import Path

from clsa import start
from clsa.command_options import ExtendOptions
from clsa.errors import ClsaError
from clsa.folder import FREE, RunFolder
from clsa.options import RunOptions


def extend(options: ExtendOptions) -> Path:
    """Train the run of a folder, finished or not, up to so many epochs; returns the folder.

    All else is as its config.yaml has it, which then says the new epochs; `history.jsonl` says
    since which step. The same call resumes it.

    Raises:
        ClsaError: 2 for a run in stages, or one that has as many epochs; as `start.pretrain`.
    """
    folder = RunFolder(options.run, FREE | {"epochs"})
    before = folder.read_options()
    if before.stages:
        why = "it learns in stages, each of so many epochs"
        raise ClsaError(str(options.run), why, "begin a run of more epochs: --out ANOTHER")
    extensions = [line["epochs"] for line in folder.read_history() if "epochs" in line]
    is_begun = bool(extensions) and extensions[-1][1] == options.epochs == before.epochs
    if options.epochs <= before.epochs and not is_begun:
        why = f"the run has {before.epochs} already"
        hint = "give a larger total; clsa pretrain resumes a run as it is"
        raise ClsaError(f"{options.run}: --epochs {options.epochs}", why, hint)
    return start.pretrain(longer(before, options), folder.free)


def longer(before: RunOptions, options: ExtendOptions) -> RunOptions:
    """The options of the run with the new epochs, in the folder where it lies now."""
    over = {
        "out": options.run,
        "epochs": options.epochs,
        "max_steps": None,  # it may have stopped at one
        "max_minutes": options.max_minutes,
    }
    return before.model_copy(update=over)

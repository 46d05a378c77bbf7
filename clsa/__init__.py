"""clsa: learning to see from pictures without labels.

    run = clsa.pretrain(data="my/pictures", out="runs/mine", recipe="clsa-small")
    encoder = clsa.load_encoder(run)

`clsa.losses` holds the losses, to be used alone. Names are resolved when they are first used, so
that `import clsa` does not import torch. The code stands in wings, in the order in which a run
flows; a file imports only from files above it:

    system/     the machine, other processes, files that survive a crash; errors and exit codes
    options/    everything a user may set, typed, without torch
    recipes/    named runs: what each sets apart from the defaults
    pictures/   what is on the disk -> uint8 pictures with names and labels
    views/      draws from a counter, and the pixel operations that they decide
    loading/    pictures -> batches of crops, in an exact order
    learning/   networks, banks, losses, optimisers
    methods/    one learning method a file
    runs/       a run folder and its state on the disk
    exchange/   weights for other libraries
    evaluate/   protocols: how good an encoder is
    diagnose/   what a run has learned, in numbers and figures
    training/   the step, the loop, the start and the stages of a run
    sweeps/     grids of runs with seeds
    cli/        one command a file
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clsa import losses, methods
    from clsa.learning.losses import bank_statistics, distribution_divergence, info_nce
    from clsa.runs.saved_encoder import load_encoder
    from clsa.system.errors import ClsaError

__version__ = "0.1.0"
__all__ = [
    "ClsaError",
    "bank_statistics",
    "distribution_divergence",
    "info_nce",
    "load_encoder",
    "losses",
    "methods",
    "pretrain",
]

_HOMES = {
    "ClsaError": "clsa.system.errors",
    "bank_statistics": "clsa.losses",
    "distribution_divergence": "clsa.losses",
    "info_nce": "clsa.losses",
    "load_encoder": "clsa.runs.saved_encoder",
}
_MODULES = ("losses", "methods")


def pretrain(data: str | Path, out: str | Path, **options: Any) -> Path:
    """Pretrain an encoder on pictures, or resume the run that `out` holds.

    Args:
        data: a folder, a list file, an .npz or a named set (see `clsa pretrain --help`).
        out: folder of the run.
        **options: the same options as on the command line, with groups as dicts:
            `recipe="clsa-small", epochs=10, optim={"lr": 0.1}, strong={"rounds": 3}`.

    Returns:
        The run folder.

    Raises:
        ClsaError: for anything the caller can fix; its `code` is the exit code of the command.
    """
    from clsa.options.run import DataOptions
    from clsa.recipes import resolve
    from clsa.training.stages import pretrain as run

    names = set(DataOptions.model_fields)
    chosen = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    given = {"data": {"data": str(data), **chosen}, "out": str(out), **rest}
    return run(resolve(given, "clsa.pretrain"))


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"clsa.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'clsa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

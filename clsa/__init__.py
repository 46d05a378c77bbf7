"""clsa: learning to see from pictures without labels.

    run = clsa.pretrain(data="my/pictures", out="runs/mine", recipe="clsa-small")
    encoder = clsa.load_encoder(run)

Names are resolved when first used, so that `import clsa` does not import torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clsa.checkpoint import load_encoder
    from clsa.errors import ClsaError
    from clsa.losses import bank_statistics, distribution_divergence, info_nce

__version__ = "0.1.0"
__all__ = [
    "ClsaError",
    "bank_statistics",
    "distribution_divergence",
    "info_nce",
    "load_encoder",
    "pretrain",
]

_HOMES = {
    "ClsaError": "clsa.errors",
    "bank_statistics": "clsa.losses",
    "distribution_divergence": "clsa.losses",
    "info_nce": "clsa.losses",
    "load_encoder": "clsa.checkpoint",
}


def pretrain(data: str | Path, out: str | Path, **options: Any) -> Path:
    """Pretrain an encoder on pictures, or resume the run that `out` holds.

    Args:
        data: a folder, a list file, an .npz or a named set (see `clsa pretrain --help`).
        out: folder of the run.
        **options: as on the command line, groups as dicts: `recipe="clsa-small", epochs=10,
            optim={"lr": 0.1}, strong={"rounds": 3}`.

    Returns:
        The run folder.

    Raises:
        ClsaError: for anything the caller can mend; its `code` is the command's exit code.
    """
    from clsa.options import DataOptions
    from clsa.recipes import resolve
    from clsa.stages import pretrain as run

    names = set(DataOptions.model_fields)
    chosen = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    given = {"data": {"data": str(data), **chosen}, "out": str(out), **rest}
    return run(resolve(given, "clsa.pretrain"))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'clsa' has no attribute {name!r}")

"""Libraries that only some commands need: found where they are used, or named with their extra."""

import importlib
from typing import Any

from clsa.system.errors import ClsaError


def require(module: str, extra: str, purpose: str) -> Any:
    """The module of an optional library.

    Args:
        module: its dotted name.
        extra: of this package, which installs it.
        purpose: what cannot be done without it, for the user.

    Raises:
        ClsaError: when it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        why = f"{module.partition('.')[0]} is not installed"
        raise ClsaError(f"no {purpose}", why, f'pip install "clsa[{extra}]"') from None

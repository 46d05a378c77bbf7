"""Optional libraries: imported when used; if one is missing, the error names its extra."""

import importlib
from typing import Any

from clsa.system.errors import ClsaError


def require(module: str, extra: str, purpose: str) -> Any:
    """The module of an optional library.

    Args:
        module: dotted name of the module.
        extra: the extra of this package that installs it.
        purpose: what the user cannot do without it.

    Raises:
        ClsaError: when the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing(module, extra, purpose) from None


def missing(module: str, extra: str, purpose: str) -> ClsaError:
    """The error that names the extra; arguments as in `require`."""
    why = f"{module.partition('.')[0]} is not installed"
    return ClsaError(f"no {purpose}", why, f'pip install "clsa[{extra}]"')

"""What every command shares: parsing its options, and printing errors."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from clsa.options.config import Config

Options = TypeVar("Options", bound=Config)
Command = Callable[[list[str]], None]
"""A function of the arguments after its name; its docstring is its line in `clsa --help`."""


def parse(command: Command, kind: type[Options], args: list[str], default: Any = None) -> Options:
    """The options of a command, from its arguments.

    Args:
        command: its name and docstring appear at the top of the help.
        kind: class of the options.
        default: options that the arguments change; if None, the defaults of `kind`.

    Raises:
        SystemExit: after --help, and with code 2 for wrong arguments.
    """
    given = {} if default is None else {"default": default}
    return tyro.cli(
        kind, prog=f"clsa {command.__name__}", description=command.__doc__, args=args,
        config=(tyro.conf.AvoidSubcommands,), **given,
    )  # fmt: skip


def value_of(flag: str, args: list[str]) -> str | None:
    """The last value of `flag` in `args`, for a flag that decides how the rest is parsed."""
    value = None
    for arg, after in zip(args, [*args[1:], None], strict=False):
        name, equals, given = arg.partition("=")
        if name == flag:
            value = given if equals else after
    return value


def is_first() -> bool:
    """Whether this is the one process, of those that torchrun started, that prints."""
    return int(os.environ.get("RANK", 0)) == 0


def printable(text: str) -> str:
    """`text` with its control characters escaped, so that it stays on one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def complain(text: str) -> None:
    """Print an error as one line on stderr."""
    print(f"error: {printable(text)}", file=sys.stderr)

"""`clsa recipes`."""

from typing import Annotated

import tyro

from clsa.cli.command import parse
from clsa.options.config import Config, to_yaml
from clsa.recipes import RECIPES, described, overrides_of


class _Options(Config):
    name: Annotated[str, tyro.conf.Positional] = ""
    """Recipe to show."""


def recipes(args: list[str]) -> None:
    """List the named runs with source, cost and status; with a NAME, what that one sets."""
    name = parse(recipes, _Options, args).name
    if name:
        values = {key: value for key, value in overrides_of(name).items() if key != "recipe"}
        print(described(name), end="\n\n")
        print(to_yaml(values), end="")
        return
    for each in RECIPES:
        print(described(each))

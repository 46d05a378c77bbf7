"""`clsa recipes`."""

from typing import Annotated

import tyro

from clsa.cli.command import parse
from clsa.options.config import Config, to_yaml
from clsa.recipes import RECIPES, describe_recipe, overrides_of


class _Options(Config):
    name: Annotated[str, tyro.conf.Positional] = ""
    """Recipe to show in full (default: list all recipes)."""


def recipes(args: list[str]) -> None:
    """List the recipes with their source, cost and results; with a NAME, the options it sets."""
    name = parse(recipes, _Options, args).name
    if name:
        values = {key: value for key, value in overrides_of(name).items() if key != "recipe"}
        print(describe_recipe(name), end="\n\n")
        print(to_yaml(values), end="")
        return
    for each in RECIPES:
        print(describe_recipe(each))

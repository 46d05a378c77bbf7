"""What a recipe is."""

from typing import Any, NamedTuple

Overrides = dict[str, Any]


class Recipe(NamedTuple):
    """A named run: the options it changes, the source of their values, and what to expect."""

    text: str
    """What it trains, in one line."""
    source: str
    """Paper or code that the values come from."""
    published: str
    """Published accuracy and cost: unless stated otherwise, ImageNet top-1 of a linear
    classifier."""
    values: Overrides
    """The options that it changes."""
    measured: str = ""
    """What was measured with this code, and where to read about it."""

"""What a recipe is."""

from typing import Any, NamedTuple

Overrides = dict[str, Any]


class Recipe(NamedTuple):
    """A named run: what departs from the defaults, whose values they are, what to expect."""

    text: str
    """What it trains, in a line."""
    source: str
    """Whose values these are."""
    published: str
    """Accuracy and cost: ImageNet top-1 of a linear classifier, if it says nothing else."""
    values: Overrides
    measured: str = ""
    """What was measured with this code, and where to read of it."""

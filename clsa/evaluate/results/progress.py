"""How far a long protocol is: a line on the terminal that goes away."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from clsa.system import dist

Item = TypeVar("Item")


def watched(items: Iterable[Item], total: int, doing: str) -> Iterator[Item]:
    """The items, counted on the terminal of rank 0, if there is one.

    Args:
        total: how many there will be.
        doing: what is done with them, in a word or two.
    """
    quiet = dist.rank() > 0 or not sys.stderr.isatty()
    yield from track(
        items, doing, total=total, console=Console(stderr=True), transient=True, disable=quiet
    )

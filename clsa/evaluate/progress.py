"""Show the progress of a long protocol: a line on the terminal that disappears at the end."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from clsa.system import dist

Item = TypeVar("Item")


def watched(items: Iterable[Item], total: int, doing: str) -> Iterator[Item]:
    """Yield the items, and count them on the terminal of rank 0, if it has one.

    Args:
        total: number of items.
        doing: name of the work, in a word or two.
    """
    quiet = dist.rank() > 0 or not sys.stderr.isatty()
    yield from track(
        items, doing, total=total, console=Console(stderr=True), transient=True, disable=quiet
    )

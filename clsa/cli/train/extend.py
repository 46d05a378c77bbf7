"""`clsa extend`."""

from clsa.cli.command import parse
from clsa.cli.train.next_steps import say_next
from clsa.options.commands import ExtendOptions


def extend(args: list[str]) -> None:
    """Train a run for more epochs, finished or not; the same command resumes it."""
    options = parse(extend, ExtendOptions, args)
    from clsa.training.extend import extend as run

    say_next(run(options))

"""`clsa sweep`."""

from clsa.cli.command import parse
from clsa.options.commands import SweepOptions


def sweep(args: list[str]) -> None:
    """Run a grid of options with seeds, resumable; write a table of means and deviations."""
    options = parse(sweep, SweepOptions, args)
    from clsa.sweeps.sweep import sweep as run

    run(options)

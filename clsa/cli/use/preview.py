"""`clsa preview`."""

from clsa.cli.command import parse
from clsa.options.commands import PreviewOptions


def preview(args: list[str]) -> None:
    """Draw what a run learns from: with --neighbours, pictures and their positives (CLIM)."""
    options = parse(preview, PreviewOptions, args)
    from clsa.diagnose.neighbour_sheet import preview as run

    print(f"{run(options)}: look at it")

"""`clsa scenes`."""

from clsa.cli.command import parse
from clsa.options.commands import ScenesOptions


def scenes(args: list[str]) -> None:
    """Make pictures with known objects from the embedded drawings, to try detection."""
    options = parse(scenes, ScenesOptions, args)
    from clsa.evaluate.detect.scenes import scenes as run

    found = run(options)
    print(f"{options.out}: {found.scenes} scenes, {found.things} objects", end="")
    print(f", {found.hidden} of them hidden by more than half")

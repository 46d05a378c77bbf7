"""`clsa scenes`."""

from clsa.cli.command import parse
from clsa.options.commands import ScenesOptions


def scenes(args: list[str]) -> None:
    """Compose scenes with known objects from the embedded drawings, to try detection on."""
    options = parse(scenes, ScenesOptions, args)
    from clsa.evaluate.detect.scenes import scenes as run

    found = run(options)
    print(f"{options.out}: {found.scenes} scenes, {found.things} objects", end="")
    print(f", {found.hidden} of them hidden by more than half")

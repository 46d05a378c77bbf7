"""`clsa replay`."""

from clsa.cli.command import parse
from clsa.options.commands import ReplayOptions


def replay(args: list[str]) -> None:
    """Compute a step that was not finite again, and show where the bad number comes from."""
    options = parse(replay, ReplayOptions, args)
    from clsa.training.replay import describe
    from clsa.training.replay import replay as run

    print(describe(run(options)), flush=True)

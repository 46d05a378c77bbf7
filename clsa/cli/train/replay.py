"""`clsa replay`."""

from clsa.cli.command import parse
from clsa.options.commands import ReplayOptions


def replay(args: list[str]) -> None:
    """Take a step that was not finite again, and tell where the bad number comes from."""
    options = parse(replay, ReplayOptions, args)
    from clsa.training.replay import describe
    from clsa.training.replay import replay as run

    print(describe(run(options)), flush=True)

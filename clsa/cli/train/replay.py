"""`clsa replay`."""

from clsa.cli.command import parse
from clsa.options.commands import ReplayOptions


def replay(args: list[str]) -> None:
    """Take a step that was not finite again, and tell where the bad number comes from."""
    options = parse(replay, ReplayOptions, args)
    from clsa.training.replay import replay as run
    from clsa.training.replay import told

    print(told(run(options)), flush=True)

"""`clsa digest`."""

from pathlib import Path

import tyro

from clsa.cli.command import parse
from clsa.options.config import Config


class _Options(Config):
    run: tyro.conf.Positional[Path]
    """Run folder."""


def digest(args: list[str]) -> None:
    """Print one sha256 over a run's networks, bank, optimiser and step, to compare runs."""
    options = parse(digest, _Options, args)
    from clsa.runs.checkpoint import run_digest

    print(run_digest(options.run))

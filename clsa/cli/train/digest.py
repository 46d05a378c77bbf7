"""`clsa digest`."""

from pathlib import Path

import tyro

from clsa.cli.command import parse
from clsa.options.config import Config


class _Options(Config):
    run: tyro.conf.Positional[Path]
    """Run folder."""


def digest(args: list[str]) -> None:
    """One sha256 over model, key network, bank, optimiser and step of a run."""
    options = parse(digest, _Options, args)
    from clsa.runs.checkpoint import run_digest

    print(run_digest(options.run))

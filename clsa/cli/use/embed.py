"""`clsa embed`."""

from clsa.cli.command import parse
from clsa.options.commands import EmbedOptions


def embed(args: list[str]) -> None:
    """Write features of pictures as a parquet table: path, label, vector."""
    options = parse(embed, EmbedOptions, args)
    from clsa.evaluate.embed import embed as run

    print(f"{run(options)}: read it with pandas.read_parquet or any parquet reader")

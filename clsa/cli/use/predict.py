"""`clsa predict`."""

from clsa.cli.command import parse
from clsa.options.commands import PredictOptions


def predict(args: list[str]) -> None:
    """Label pictures with a classifier that `evaluate` learned; write CSV or JSON."""
    options = parse(predict, PredictOptions, args)
    from clsa.evaluate.predict import predict as run

    print(run(options))

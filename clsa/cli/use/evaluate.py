"""`clsa evaluate`."""

import shlex
from typing import Any

from clsa.cli.command import is_first, parse
from clsa.options.commands import EvaluateOptions


def evaluate(args: list[str]) -> None:
    """Judge a run's encoder against its random initialisation; write results.json."""
    options = parse(evaluate, EvaluateOptions, args)
    from clsa.evaluate.evaluate import evaluate as run
    from clsa.evaluate.results.heads import saved_heads
    from clsa.evaluate.results.records import results_path

    records = run(options)
    if is_first():
        print_table(records)
        print(f"All records: {results_path(options.run)}")
        learned = {name for name, _ in saved_heads(options.run)}
        if learned & {record.protocol for record in records}:
            name = shlex.quote(str(options.run))
            print(f"Next: clsa predict {name} IMAGES    labels pictures with what was learned")


def print_table(records: list[Any]) -> None:
    """Print the records of an evaluation, the random encoder next to the trained one."""
    from rich.console import Console

    from clsa.evaluate.results.records import table

    Console().print(table(records))

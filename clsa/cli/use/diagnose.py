"""`clsa diagnose`."""

from clsa.cli.command import parse
from clsa.options.commands import DiagnoseOptions


def diagnose(args: list[str]) -> None:
    """Examine what a run has learned: positives, classes, spread, distortions; with figures."""
    options = parse(diagnose, DiagnoseOptions, args)
    from rich.console import Console

    from clsa.diagnose.diagnose import diagnose as run
    from clsa.diagnose.diagnose import table

    findings, numbers, figures = run(options)
    Console().print(table(findings))
    print(f"All numbers: {numbers}")
    if figures:
        print(f"Figures: {', '.join(path.name for path in figures)} in {numbers.parent}")

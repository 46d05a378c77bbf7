"""Diagnose a run: numbers and figures for the trained networks and for their random start."""

import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from clsa.diagnose.inputs import Finding, Inputs
from clsa.diagnose.parts import NEEDS_LABELS, PARTS
from clsa.evaluate.features.extract import frozen
from clsa.options.commands import DiagnoseOptions
from clsa.runs.snapshots import Opened
from clsa.system import files
from clsa.system.errors import ClsaError
from clsa.system.extras import require
from clsa.system.machine import keep_freed_memory

NUMBERS = "diagnostics.json"
# Rows of the table: part, name of the number, label for readers, and which values are good.
SHOWN = (
    ("similarity", "P+ weak quantile 0.5", "P+ weak, median", "far above chance"),
    ("similarity", "P+ strong quantile 0.5", "P+ strong, median", "near weak"),
    ("similarity", "P+ distance", "P+ weak/strong distance", "0 alike, 1 apart"),
    ("similarity", "Var- distance", "Var- weak/strong distance", "0 alike, 1 apart"),
    ("similarity", "entropy weak", "entropy over bank, nats", "below ln(bank)"),
    ("similarity", "KL weak strong", "KL(weak || strong), nats", "low, if keys are found"),
    ("similarity", "retrieval weak", "own key found by weak, %", "high"),
    ("similarity", "retrieval strong", "own key found by strong, %", "near weak"),
    ("neighbours", "20-NN clean", "20-NN centre crops, %", "high"),
    ("neighbours", "20-NN strong", "20-NN strong queries, %", "near centre crops"),
    ("classes", "within classes", "cosine within classes", "far above between"),
    ("classes", "between classes", "cosine between classes", "low"),
    ("spread", "alignment of features", "alignment of features", "low, if spread"),
    ("spread", "uniformity of features", "uniformity of features", "low (0: collapsed)"),
    ("spread", "rank of features", "RankMe of features", "high"),
    ("spread", "rank of projections", "RankMe of projections", "high"),
    ("spread", "spread of features", "deviation of features", "near 1 (0: collapsed)"),
    ("operations", "mean retrieval", "found again distorted, %", "high"),
    ("operations", "mean KL", "KL(clean || distorted)", "low, if found again"),
)


def diagnose(options: DiagnoseOptions) -> tuple[list[Finding], Path, list[Path]]:
    """Write OUT/diagnostics.json, then OUT/*.png; the networks do not change, to the bit.

    A part that needs labels or the networks of a checkpoint is left out if these are missing, with
    a line on stderr; if `only` names such a part, an error is raised instead. Without matplotlib
    all numbers are written, and a line says which extra to install.

    Returns:
        The findings, the path of the JSON file, and the paths of the figures.

    Raises:
        ClsaError: if there is no run or no picture, or if a part fails that cannot be left out.
    """
    keep_freed_memory()
    inputs = Inputs(options)
    home = options.run if options.run.is_dir() else options.run.parent
    out = options.out or home / "diagnostics"
    findings, drawings = [], {}
    modules = {
        id(module): module
        for snapshot in inputs.snapshots
        for module in (snapshot.encoder, snapshot.query, snapshot.key)
        if module is not None
    }
    with contextlib.ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(frozen(module))
        for name in options.only or tuple(PARTS):
            try:
                part = PARTS[name](inputs)
            except ClsaError as error:
                if options.only or not _may_be_left_out(name, inputs):
                    raise
                print(f"left out: {name} ({error})", file=sys.stderr)
                continue
            findings += part.findings
            drawings |= part.figures
    with files.output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / NUMBERS, json.dumps(_facts(inputs, findings), indent=1) + "\n")
    written = []
    try:
        for module in ("matplotlib.figure", "sklearn.manifold"):
            require(module, "plots", "figures")
    except ClsaError as error:
        print(f"warning: {error} (the numbers are written)", file=sys.stderr)
        return findings, out / NUMBERS, written
    for name, draw in drawings.items():
        data, path = draw(), out / f"{name}.png"
        files.write_atomic(path, lambda file, data=data: file.write(data))
        written.append(path)
    return findings, out / NUMBERS, written


def _may_be_left_out(name: str, inputs: Inputs) -> bool:
    """Whether a failed part can be skipped: it needs labels, or a network that is missing."""
    if name in NEEDS_LABELS:
        return True
    return name == "similarity" and inputs.snapshots[0].query is None


def _facts(inputs: Inputs, findings: list[Finding]) -> dict[str, object]:
    opened: Opened = inputs.opened
    return {
        "run": str(inputs.options.run),
        "recipe": opened.facts.recipe,
        "step": opened.facts.step,
        "run_seed": opened.facts.seed,
        "temperature": opened.temperature,
        "options": inputs.options.model_dump(mode="json", exclude={"run", "out"}),
        "findings": [finding._asdict() for finding in findings],
    }


def table(findings: Iterable[Finding]) -> Table:
    """A table of the most useful numbers: random, trained, and in words which values are good."""
    values = {(each.part, each.name, each.encoder): each.value for each in findings}
    result = Table("number")
    for title in ("random", "trained"):
        result.add_column(title, justify="right")
    result.add_column("good is")
    for part, name, label, good in SHOWN:
        pair = [values.get((part, name, encoder)) for encoder in ("random", "trained")]
        if any(value is not None for value in pair):
            shown = ["" if value is None else _short(value) for value in pair]
            result.add_row(label, *shown, good)
    return result


def _short(value: float) -> str:
    """At most four digits, with an exponent only for tiny numbers."""
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"

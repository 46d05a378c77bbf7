"""Runs a grid, one run after the other; an interrupted sweep can be resumed.

A sweep's folder holds `sweep.yaml` (the grid), a run folder for each cell, and `table.md` and
`table.json`, which are rewritten after every run.
"""

import os
import sys
import traceback
from pathlib import Path

import safetensors.torch
from rich.console import Console

from clsa.evaluate.evaluate import evaluate
from clsa.evaluate.features.split import split
from clsa.options.commands import EvaluateOptions, SweepOptions
from clsa.options.config import read_yaml
from clsa.pictures.opening import open_source, open_val
from clsa.runs import digests
from clsa.runs.folder import FREE, RunFolder
from clsa.sweeps.grid import Cell, Grid, cells_of, read_grid, require_same, slug
from clsa.sweeps.table import (  # fmt: skip
    LEGEND,
    Outcome,
    outcome_of,
    printed,
    read_outcomes,
    write_tables,
)
from clsa.system import files, lock
from clsa.system.errors import RESUMABLE, ClsaError, Exit
from clsa.system.launch import stoppable
from clsa.system.signals import StopError
from clsa.training.stages import pretrain


def sweep(options: SweepOptions) -> Path:
    """Run a grid, or continue it; print its table; return its folder.

    Runs that are finished and judged are skipped. A run that fails is recorded in the table, and
    the sweep continues with the next.

    Raises:
        ClsaError: before the first run, if the grid, the pictures or the folder cannot be used.
            Later, after writing the table: 75 if a signal stopped the sweep; at the end, if runs
            failed, the code of the first failed run.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ClsaError("clsa sweep", "it runs in one process", "start it without torchrun")
    grid = read_grid(options)
    out = options.out or Path("runs") / slug(grid.name)
    cells = cells_of(grid, out)
    require_room(out, grid, cells)
    titles = [f"[{number}/{len(cells)}] {cell}" for number, cell in enumerate(cells, 1)]
    if options.dry_run:
        print("\n".join(titles))
        print(f"{len(cells)} runs in {out}; nothing was run or written")
        return out
    require_labels(cells)
    with stoppable(patient=True) as stop, lock.only_writer(out):
        files.write_text(out / "sweep.yaml", grid.to_yaml())
        before = read_outcomes(out / "table.json")
        outcomes = [before.get(cell.options.out.name, outcome_of(cell)) for cell in cells]
        try:
            for place, (cell, title) in enumerate(zip(cells, titles, strict=True)):
                if is_settled(outcomes[place], cell, grid):
                    print(f"{title}: already done", file=sys.stderr)
                    continue
                if stop.level:  # the signal came between two runs
                    name, hint = stop.signal_name, "run the same command again to continue"
                    raise StopError(f"stopped before {title}", name, hint, name)
                print(title, file=sys.stderr, flush=True)
                try:
                    outcomes[place] = run(cell, grid)
                except ClsaError as error:
                    outcomes[place] = outcome_of(cell, error=error)
                    raise
                write_tables(out, grid, outcomes)
        finally:
            write_tables(out, grid, outcomes)
            Console().print(printed(grid, outcomes))
    print(f"{LEGEND}\nTable: {out / 'table.md'}; all figures: {out / 'table.json'}")
    failed = [outcome for outcome in outcomes if outcome.code]
    if failed:
        what = f"{len(failed)} of {len(cells)} runs failed"
        why = f"{failed[0].run}: {failed[0].reason}"
        raise ClsaError(what, why, "run the same command again to retry them", Exit(failed[0].code))
    return out


def run(cell: Cell, grid: Grid) -> Outcome:
    """Train one cell, or continue its training, and judge it; print and return a failure.

    Raises:
        ClsaError: for failures that would end the other runs too: a signal, or a disk that cannot
            be written.
    """
    judging = EvaluateOptions(
        run=cell.options.out,
        protocol=grid.protocol,
        labels=grid.labels,
        device=cell.options.device,
    )
    try:
        pretrain(cell.options)
        return outcome_of(cell, evaluate(judging))
    except Exception as error:  # a bug or a full GPU must not cost the other runs
        if isinstance(error, ClsaError) and error.code in RESUMABLE:
            raise
        if not isinstance(error, ClsaError):
            traceback.print_exc()
        print(f"failed: {error}", file=sys.stderr)
        return outcome_of(cell, error=error)


def require_room(out: Path, grid: Grid, cells: list[Cell]) -> None:
    """Check that `out` and every run folder are free or belong to this grid's sweep.

    Raises:
        ClsaError: 2 if they do not, 73 if `out` cannot be a folder.
    """
    with files.output_errors(out):
        taken = out.exists() and any(path.name != lock.NAME for path in out.iterdir())
    if taken:
        written = out / "sweep.yaml"
        if not written.exists():
            why = "neither empty nor a sweep's folder"
            raise ClsaError(str(out), why, "choose another --out")
        before = Grid.parse(read_yaml(written), str(written))
        require_same(before, grid, FREE - {"recipe"}, out)
    for cell in cells:
        RunFolder(cell.options.out).check(cell.options)


def require_labels(cells: list[Cell]) -> None:
    """Raise before any run, not after it, if its pictures are missing or cannot judge it."""
    for data in dict.fromkeys(cell.options.data for cell in cells):
        source = open_source(data.data, "train", data)
        split(source, open_val(data, source.classes), seed=0)


def is_settled(outcome: Outcome, cell: Cell, grid: Grid) -> bool:
    """Whether a run reached its end, or a limit that still holds, and its encoder is judged.

    A run that stopped at `max_minutes` continues if the limit has changed.
    """
    at_end = {
        "finished": True,
        "max_steps": outcome.step == cell.options.max_steps,
        "max_minutes": outcome.max_minutes == cell.options.max_minutes,
    }.get(outcome.reason, False)
    judged = all(outcome.headline(protocol) is not None for protocol in grid.protocol)
    if outcome.code or not at_end or not judged:
        return False
    try:
        weights = safetensors.torch.load_file(RunFolder(cell.options.out).encoder)
    except (OSError, safetensors.SafetensorError):
        return False
    found = digests.digest(weights)
    return all(x.encoder_digest == found for x in outcome.records if x.encoder == "trained")

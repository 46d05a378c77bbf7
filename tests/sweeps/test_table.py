"""The table of a sweep: means and deviations computed by hand, its notes, and reading it back."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clsa.evaluate.results.records import Record
from clsa.recipes import resolve
from clsa.sweeps.grid import Cell, Grid
from clsa.sweeps.table import (
    Mean,
    Outcome,
    markdown,
    mean_of,
    outcome_of,
    printed,
    read_outcomes,
    sheet_of,
    write_tables,
)

GRID = Grid(name="s", about="why?", seeds=(0, 1, 2), protocol=("knn-20",), grid={"a": ["x", "y"]})


def record(value: float, encoder: str, protocol: str = "knn-20", metric: str = "top1") -> Record:
    return Record(
        protocol, "hash", "", metric, value, "", None, encoder, "val", 100, 9, 0, encoder, encoder,
        "data", None,
    )  # fmt: skip


def outcome(place: str, seed: int, trained: float, random: float, **over: Any) -> Outcome:
    facts = {
        "run": f"a-{place}_seed-{seed}", "row": {"a": place}, "seed": seed, "epochs": 4,
        "reason": "finished", "step": 20, "epoch": 4.0, "pictures_seen": 160, "ms_per_picture": 2.0,
        "records": (
            record(90.0, "trained", metric="balanced"), record(trained, "trained"),
            record(random, "random"), record(1.0, "trained", "linear-fast"),
        ),
    }  # fmt: skip
    return Outcome(**{**facts, **over})


def blank(place: str, seed: int, **over: Any) -> Outcome:
    return Outcome(run=f"a-{place}_seed-{seed}", row={"a": place}, seed=seed, epochs=4, **over)


def test_mean_and_sample_deviation_by_hand() -> None:
    # (2, 4, 9): mean 5, squares 9 + 1 + 16 over n - 1 = 2 make 13
    assert mean_of([2.0, None, 4.0, 9.0]) == Mean(5.0, pytest.approx(13**0.5), 3)
    assert mean_of([7.0]) == Mean(7.0, None, 1) and mean_of([None]) is None
    assert mean_of([2.0, 4.0, 9.0]).text() == "5.00 ± 3.61"  # pyright: ignore
    assert (Mean(1.5, None, 1).text("+"), Mean(-1.5, 0.0, 2).text("+")) == ("+1.50", "-1.50 ± 0.00")


def test_the_table_by_hand() -> None:
    outcomes = [
        outcome("x", 0, 32.0, 31.0),
        outcome("y", 0, 30.0, 25.0, ms_per_picture=3.0),
        outcome("x", 1, 34.0, 30.0, ms_per_picture=4.0, pictures_seen=80),
        outcome("y", 1, 31.0, 25.0),
        outcome("x", 2, 39.0, 31.0),
        blank("y", 2),
    ]
    sheet = sheet_of(GRID, outcomes)
    assert sheet.titles == [
        "a", "knn-20", "knn-20 gain", "seeds", "ms per picture", "pictures seen", "note",
    ]  # fmt: skip
    # x: gains 1, 4, 8; y: 5, 6. Deviations: sqrt(13), sqrt(37/3), sqrt(1/2); of 2, 4, 2: sqrt(4/3)
    assert sheet.lines == [
        ["x", "35.00 ± 3.61", "+4.33 ± 3.51", "3", "2.67 ± 1.15", "80 to 160", ""],
        ["y", "30.50 ± 0.71", "+5.50 ± 0.71", "2 of 3", "2.50 ± 0.71", "160", "seed 2 not run yet"],
    ]
    assert sheet.best == {(0, 1), (1, 2)}
    lines = markdown(GRID, outcomes).splitlines()
    assert lines[:4] == ["# s", "", "why?", "Judged on 100 pictures (val): the standard error of "
                         "one run is up to 5.0 points."]  # fmt: skip
    assert "| x | **35.00 ± 3.61** | +4.33 ± 3.51 | 3 | 2.67 ± 1.15 | 80 to 160 |  |" in lines


def test_one_seed_has_no_deviation_and_one_row_no_best() -> None:
    grid = GRID.model_copy(update={"seeds": (0,)})
    sheet = sheet_of(grid, [outcome("x", 0, 32.0, 31.0)])
    assert sheet.lines == [["x", "32.00", "+1.00", "1", "2.00", "160"]]
    assert sheet.best == set() and sheet.titles[-1] == "pictures seen"
    tie = sheet_of(grid, [outcome("x", 0, 32.001, 31.0), outcome("y", 0, 32.0, 31.0)])
    assert tie.best >= {(0, 1), (1, 1)}  # equal in the two digits that are shown


def test_notes_say_how_a_run_ended() -> None:
    stopped: dict[str, Any] = {"step": 13, "epoch": 2.6, "epochs": 4}
    assert outcome("x", 1, 1.0, 0.0).note == ""
    limit = outcome("x", 1, 1.0, 0.0, reason="max_minutes", **stopped)
    assert limit.note == "seed 1 stopped at step 13, epoch 2.6 of 4: max_minutes"
    signal = blank("x", 1).model_copy(update={"code": 75, "reason": "SIGTERM - a - b", **stopped})
    assert signal.note == "seed 1 stopped at step 13, epoch 2.6 of 4: interrupted"
    failed = blank("x", 1).model_copy(update={"code": 76, "reason": "step 3 - nan - x", **stopped})
    assert failed.note == "seed 1 failed: step 3 - nan - x"
    assert blank("x", 1).note == "seed 1 not run yet"


def test_a_sweep_without_finished_runs_has_a_table_too(tmp_path: Path) -> None:
    outcomes = [blank(place, seed) for seed in (0, 1, 2) for place in "xy"]
    sheet = sheet_of(GRID, outcomes)
    assert sheet.lines[0][:-1] == ["x", "", "", "0 of 3", "", ""] and sheet.best == set()
    write_tables(tmp_path, GRID, outcomes)
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["knn-20"] is None


def test_markup_characters_are_escaped() -> None:
    odd = "[bold]a|b*c_d`<e>"
    grid = GRID.model_copy(update={"name": "[red]|", "about": "a\n# b"})
    outcomes = [outcome("x", 0, 1.0, 0.0).model_copy(update={"row": {odd: odd}})]
    text = markdown(grid, outcomes)
    assert text.startswith("# \\[red\\]\\|\n\na # b\n")
    (line,) = [
        line for line in text.splitlines() if line.startswith("| \\[bold\\]a") and "1.00" in line
    ]
    assert line.startswith("| \\[bold\\]a\\|b\\*c\\_d\\`\\<e\\> | 1.00 |")
    outcomes.append(blank("y", 1).model_copy(update={"row": {odd: "y"}}))
    told = io.StringIO()
    Console(width=200, file=told).print(printed(grid, outcomes))
    assert "a-y_seed-1: seed 1 not run yet" in told.getvalue() and "note" not in told.getvalue()
    assert told.getvalue().count(odd) == 2 and "[red]|" in told.getvalue()


def test_everything_is_read_back(tmp_path: Path) -> None:
    outcomes = [outcome("x", 0, 32.0, 31.0), blank("y", 0)]
    write_tables(tmp_path, GRID, outcomes)
    found = read_outcomes(tmp_path / "table.json")
    assert list(found.values()) == outcomes and list(found) == ["a-x_seed-0", "a-y_seed-0"]
    whole = json.loads((tmp_path / "table.json").read_text())
    assert whole["rows"][0] == {
        "row": {"a": "x"},
        "knn-20": {"mean": 32.0, "deviation": None, "n": 1},
        "knn-20 gain": {"mean": 1.0, "deviation": None, "n": 1},
    }
    assert whole["runs"][0]["records"][1] == record(32.0, "trained")._asdict()
    for damage in ("", "[]", '{"runs": 3}', '{"runs": [{"run": 3}]}', '{"runs": [3]}', "nul\0"):
        (tmp_path / "table.json").write_text(damage)
        assert read_outcomes(tmp_path / "table.json") == {}
    assert read_outcomes(tmp_path / "none.json") == {}


def test_outcome_is_read_from_the_run_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    values = {"recipe": "clsa-small", "out": str(out), "epochs": 4, "batch_size": 32, "seed": 3}
    cell = Cell({"a": "x"}, resolve(values))
    assert outcome_of(cell) == Outcome(run="run", row={"a": "x"}, seed=3, epochs=4)
    failure = outcome_of(cell, error=ValueError("odd\nmore"))
    assert (failure.code, failure.reason, failure.step) == (1, "odd", 0)
    rates = [(10, 100.0), (20, 400.0), (30, 500.0)]
    lines = [{"step": s, "epoch": s / 20, "images_per_s": rate} for s, rate in rates]
    text = "\n".join(map(json.dumps, [*lines, {"step": 30, "knn": 3.0}])) + '\n{"step": 4'
    (out / "metrics.jsonl").write_text(text)
    status = {"code": 0, "reason": "max_minutes", "step": 30, "resumable": True}
    (out / "status.json").write_text(json.dumps(status))
    told = outcome_of(cell, [record(5.0, "trained")])
    assert (told.reason, told.step, told.epoch, told.code) == ("max_minutes", 30, 1.5, 0)
    seconds = 320 / 100 + 320 / 400 + 320 / 500  # each interval counts by its length in time
    assert told.pictures_seen == 960
    assert told.ms_per_picture == pytest.approx(1000 * seconds / 960)
    assert told.headline("knn-20") == 5.0 and told.gain("knn-20") is None

"""How a run computes: decided when it begins, kept when it is resumed, given on request."""

import json
from pathlib import Path

import pytest
import torch

from clsa.options.run import RunOptions
from clsa.runs import computing
from clsa.runs.computing import Computing
from clsa.runs.folder import RunFolder
from clsa.system import machine
from clsa.system.errors import ClsaError, Exit

CPU = torch.device("cpu")


def options(out: Path, **over: object) -> RunOptions:
    return RunOptions.model_validate({"out": out, "precision": "fp32", **over})


def saved_run(given: RunOptions, threads: int | None) -> None:
    """A folder of a run that has saved a step, with or without a record."""
    RunFolder(given.out).claim(given, Computing(threads=threads or 1, precision="fp32"))
    (given.out / "checkpoints").mkdir()
    (given.out / "checkpoints" / "step-00000001.json").write_text("{}")
    if threads is None:
        (given.out / computing.NAME).unlink()


@pytest.fixture(autouse=True)
def four_threads_on_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(machine, "num_cores", lambda: 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def test_a_new_run_takes_its_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, note = computing.take(options(tmp_path / "run"), CPU)
    assert (found.threads, found.precision, note) == (2, "fp32", "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert computing.take(options(tmp_path / "run"), CPU)[0].threads == 1
    assert computing.take(options(tmp_path / "run", threads=3), CPU)[0].threads == 3


def test_a_run_without_a_record_goes_on_as_it_began_and_says_so(tmp_path: Path) -> None:
    given = options(tmp_path / "run")
    saved_run(given, None)
    found, note = computing.take(given, CPU)
    assert found.threads == 4
    assert note.endswith("a new run on this machine would not: threads 4 -> 2")


def test_a_resumed_run_keeps_its_record_unless_a_number_is_given(tmp_path: Path) -> None:
    saved_run(options(tmp_path / "run"), 7)
    found, note = computing.take(options(tmp_path / "run"), CPU)
    assert found.threads == 7
    assert "threads 7 -> 2" in note
    found, note = computing.take(options(tmp_path / "run", threads=1), CPU)
    assert (found.threads, note) == (1, "")


def test_a_run_that_saved_nothing_begins_anew(tmp_path: Path) -> None:
    given = options(tmp_path / "run")
    RunFolder(given.out).claim(given, Computing(threads=7, precision="bf16"))
    assert computing.take(given, CPU) == (Computing(threads=2, precision="fp32"), "")


def test_the_step_of_a_stage_is_one_of_the_run(tmp_path: Path) -> None:
    assert not computing.has_begun(tmp_path / "run")
    saved_run(options(tmp_path / "run" / "stage-1"), None)
    assert computing.has_begun(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"threads": 0, "precision": "fp32"}'])
def test_a_damaged_record_is_refused(text: str, tmp_path: Path) -> None:
    saved_run(options(tmp_path / "run"), 1)
    (tmp_path / "run" / computing.NAME).write_text(text)
    with pytest.raises(ClsaError, match=r"computing\.json.*how the run computes") as told:
        computing.take(options(tmp_path / "run"), CPU)
    assert told.value.code == Exit.NO_INPUT


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    Computing(threads=3, precision="bf16").write(tmp_path)
    kept = json.loads((tmp_path / computing.NAME).read_text())
    assert (kept["threads"], kept["precision"]) == (3, "bf16")

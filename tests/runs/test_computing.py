"""How a run computes: decided when it begins, kept when it is resumed, given on request."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from clsa.learning.memory_format import layout_of
from clsa.learning.models import Network, momentum_copy
from clsa.learning.precision import InFloat32
from clsa.options.run import ModelOptions, RunOptions
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


def begun(out: Path, encoder: str, **over: object) -> Computing:
    return computing.begin(options(out, model={"encoder": encoder}, **over), CPU)


SMALL_VIEWS = {"size": 32, "weak": {"sizes": [32]}, "local": {"sizes": [16]}}


def test_layers_that_bf16_gets_wrong_are_found_when_a_run_begins(tmp_path: Path) -> None:
    found = begun(tmp_path, "resnet18", precision="bf16", views=SMALL_VIEWS)
    assert found.float32_layers == ("layer4.0.conv1",)
    assert begun(tmp_path, "resnet18", precision="bf16").float32_layers == ()
    assert begun(tmp_path, "resnet18", precision="fp32", views=SMALL_VIEWS).float32_layers == ()
    strong = {"stronger": True, "strong": {"sizes": [16]}}
    found = begun(tmp_path, "resnet18", precision="bf16", views={"size": 32}, **strong)
    assert found.float32_layers == ("layer4.0.conv1",)
    found.write(tmp_path)
    assert computing.read(tmp_path) == found
    assert found.notes() == [
        "computed in float32, because bf16 loses gradients there: layer4.0.conv1"
    ]


def test_a_run_begun_before_keeps_its_memory_format_and_layers(tmp_path: Path) -> None:
    given = options(tmp_path / "run", model={"encoder": "mobileone_s0"}, threads=1)
    assert computing.begin(given, CPU).memory_format == "contiguous"
    RunFolder(given.out).claim(given, Computing(threads=1, precision="fp32"))
    (given.out / "checkpoints").mkdir()
    (given.out / "checkpoints" / "step-00000001.json").write_text("{}")
    old = json.loads((given.out / computing.NAME).read_text())
    kept = {name: old[name] for name in ("threads", "precision")}
    (given.out / computing.NAME).write_text(json.dumps(kept))
    found, note = computing.take(given, CPU)
    assert (found.memory_format, found.float32_layers) == ("channels_last", ())
    assert note.endswith("would not: memory_format channels_last -> contiguous")


def test_all_networks_of_a_method_compute_so() -> None:
    how = Computing(
        threads=1, precision="bf16", memory_format="contiguous", float32_layers=("layer4.0.conv1",)
    )
    network = Network(ModelOptions(encoder="resnet18"), 0)
    both = nn.ModuleList([network, momentum_copy(network)])
    how.apply_to(both)
    for each in both:
        assert isinstance(each, Network)
        assert isinstance(each.encoder.get_submodule("layer4.0.conv1"), InFloat32)
        assert layout_of(each.encoder) == "contiguous"
    assert len(how.notes()) == 2

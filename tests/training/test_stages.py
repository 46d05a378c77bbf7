"""Staged runs: splitting pictures, what passes from stage to stage, resuming, the matrix."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clsa.cli.main import main
from clsa.options.config import merge
from clsa.options.run import DataOptions, RunOptions
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Folder, Joined, Pictures, joined
from clsa.recipes import resolve
from clsa.runs.checkpoint import load_newest, run_digest
from clsa.runs.saved_encoder import load_encoder
from clsa.system.errors import ClsaError, Exit
from clsa.training import stages
from clsa.training.forgetting import Forgetting, describe, markdown, picture
from clsa.training.stages import labelled_parts, stage_seed, stage_sources
from tests.support.pictures import clipart_folder, jpeg_folder


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clipart_folder(tmp_path_factory.mktemp("drawings"), classes=6, each=14)


def options(data: Path | str, out: Path, **over: Any) -> RunOptions:
    tiny = {
        "recipe": "continual-small",
        "data": {"data": str(data), "workers": 0},
        "out": str(out),
        "stages": ["classes:3"],
        "batch_size": 8,
        "epochs": 2,
        "device": "cpu",
        "views": {"size": 16, "weak": {"sizes": (16,)}},
        "model": {"projector_hidden": 32, "projector_dim": 16, "norm_groups": 2},
        "method": {"queue_size": 20},
        "continual": {"exemplars": 3, "extra_keys": 8},
    }
    return resolve(merge(tiny, over))


# ---- pictures


def test_classes_are_split_into_groups_that_differ_by_one(drawings: Path, tmp_path: Path) -> None:
    parts = stage_sources(options(drawings, tmp_path, stages=["classes:4"]))
    groups = [set(part.labels.tolist()) for part in parts]
    assert sorted(map(len, groups)) == [1, 1, 2, 2] and set().union(*groups) == set(range(6))
    assert sum(map(len, groups)) == 6 and sum(map(len, parts)) == 6 * 14
    again = stage_sources(options(drawings, tmp_path, stages=["classes:4"]))
    assert [set(part.labels.tolist()) for part in again] == groups
    other = stage_sources(options(drawings, tmp_path, stages=["classes:4"], seed=1))
    assert [set(part.labels.tolist()) for part in other] != groups


def test_pictures_without_a_label_are_in_no_stage(capsys: pytest.CaptureFixture[str]) -> None:
    parts = stage_sources(options("clipart", Path("unused"), stages=["classes:4"]))
    assert sum(map(len, parts)) == 1676
    assert "4161 pictures without a label are in no stage" in capsys.readouterr().err
    assert all(isinstance(part, Pictures) for part in parts)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["classes:7"], "the pictures have 6 classes"),
        (["classes:0"], "use at most one stage per class"),
        (["classes:x"], "not a valid way to split one set"),
        (["classes:2", "classes:3"], "not a valid way to split one set"),
        (["no/such/folder"], "no such folder, file or data set"),
    ],
)
def test_impossible_stages_are_refused(
    given: list[str], why: str, drawings: Path, tmp_path: Path
) -> None:
    with pytest.raises(ClsaError, match=why):
        stages.pretrain(options(drawings, tmp_path / "run", stages=given))
    assert not (tmp_path / "run" / "stage-1").exists()


def test_several_sets_share_their_classes_by_name(tmp_path: Path) -> None:
    for root, names in (("a", ("cat", "dog")), ("b", ("ape", "cat"))):
        for name in names:
            jpeg_folder(tmp_path / root / name, [(20, 20)] * 2)
    parts = stage_sources(
        options("", tmp_path / "run", stages=[str(tmp_path / "a"), str(tmp_path / "b")])
    )
    assert [part.classes for part in parts] == [["ape", "cat", "dog"]] * 2
    assert [sorted(set(part.labels.tolist())) for part in parts] == [[1, 2], [0, 1]]


def test_joined_sources_are_their_pictures_in_order(tmp_path: Path) -> None:
    first = open_source(str(jpeg_folder(tmp_path / "a", [(20, 30)] * 3)), "train", DataOptions())
    second = open_source(str(jpeg_folder(tmp_path / "b", [(40, 20)] * 4)), "train", DataOptions())
    source = joined([first, second.subset(np.array([3, 1]))])
    assert isinstance(source, Joined) and len(source) == 5
    assert list(source.ids) == [*first.ids, second.ids[3], second.ids[1]]
    assert np.array_equal(source.read(1), first.read(1))
    assert np.array_equal(source.read(3), second.read(3))
    few = source.subset(np.array([4, 0]))
    assert np.array_equal(few.read(0), second.read(1)) and few.encoded(1) == first.encoded(0)
    digests = {source.digest(), few.digest(), source.subset(np.array([0, 4])).digest()}
    assert len(digests) == 3
    assert source.digest() == joined([first, second.subset(np.array([3, 1]))]).digest()
    assert joined([first]) is first and isinstance(first, Folder)


def test_pictures_of_one_size_stay_in_memory() -> None:
    images = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    source = Pictures(images, np.array([0, 1, 0, 1, -1]), ["a", "b"])
    both = joined([source.subset(np.array([0, 2])), source.subset(np.array([4]))])
    assert isinstance(both, Pictures) and both.labels.tolist() == [0, 0, -1]
    assert np.array_equal(both.images, images[[0, 2, 4]]) and list(both.ids) == ["0", "2", "4"]


def test_each_stage_has_draws_of_its_own() -> None:
    seeds = [stage_seed(seed, number) for seed in (0, 1, (1 << 62) - 1) for number in (1, 2, 3)]
    assert len(set(seeds)) == 9 and stage_seed(5, 1) == 5
    assert all(0 <= seed < 1 << 62 for seed in seeds)


# ---- runs


@pytest.fixture(scope="module")
def whole(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stages.pretrain(options(drawings, tmp_path_factory.mktemp("whole") / "run"))


def test_a_staged_run_leaves_one_run_per_stage_and_a_matrix(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"stage-1", "stage-2", "stage-3", "config.yaml", "encoder.safetensors"} <= names
    assert {"forgetting.json", "forgetting.md", "forgetting.png", "metrics.jsonl"} <= names
    facts = json.loads((whole / "forgetting.json").read_text())
    assert [len(row) for row in facts["accuracy"]] == [1, 2, 3] and len(facts["random"]) == 3
    assert facts["forgetting"] is not None and len(facts["everything"]) == 3
    numbers = [
        json.loads((whole / f"stage-{n}" / "exemplars.json").read_text())["numbers"] for n in (1, 2)
    ]
    assert all(0 < len(each) <= 6 for each in numbers)
    assert not (whole / "stage-3" / "exemplars.json").exists()
    steps = [
        json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()
    ]
    status = json.loads((whole / "status.json").read_text())
    assert steps == sorted(steps) and status["step"] == steps[-1]
    assert status["reason"] == "finished" and not status["resumable"]
    last = load_encoder(whole / "stage-3").state_dict()
    assert all(torch.equal(value, last[k]) for k, value in load_encoder(whole).state_dict().items())
    lines = (whole / "stage-2" / "metrics.jsonl").read_text().splitlines()
    assert {"contrast", "extra", "distill"} <= set(json.loads(lines[0]))


def test_a_stage_starts_where_the_one_before_ended(whole: Path) -> None:
    """Weights and optimiser; after one stage the extra queue holds keys of the main queue."""
    first = load_newest(whole / "stage-1" / "checkpoints")
    assert first is not None
    fresh = options("unused", whole, stages=["classes:3"])
    state = first.state["method"]
    assert "teacher.encoder.conv1.weight" in state and "extra.rows" in state
    assert fresh.continual.keep == "distill"
    views = Image.open(whole / "stage-2" / "views.png")
    assert views.width > views.height / 6  # originals and four views of some pictures


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_stopped_inside_a_stage_goes_on_to_the_same_bits(
    stop: int, whole: Path, drawings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    for limit in (stop, None):
        stages.pretrain(options(drawings, out, max_steps=limit))
    assert json.loads((out / "status.json").read_text())["reason"] == "finished"
    for number in (1, 2, 3):
        assert run_digest(out / f"stage-{number}") == run_digest(whole / f"stage-{number}")
    assert (out / "forgetting.json").read_text() == (whole / "forgetting.json").read_text()


def test_a_run_stopped_inside_the_second_stage_goes_on_to_the_same_bits(
    whole: Path, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, train = tmp_path / "cut", stages.start.train

    def interrupted(given: RunOptions, *args: Any, **rest: Any) -> Any:
        if given.out.name == "stage-2":
            given = given.model_copy(update={"max_steps": 3})
        return train(given, *args, **rest)

    monkeypatch.setattr(stages.start, "train", interrupted)
    stages.pretrain(options(drawings, out))
    assert not (out / "stage-3").exists()
    assert json.loads((out / "status.json").read_text())["reason"] == "stage 2 of 3 ended"
    monkeypatch.undo()
    stages.pretrain(options(drawings, out))
    for number in (2, 3):
        assert run_digest(out / f"stage-{number}") == run_digest(whole / f"stage-{number}")


def test_the_same_command_leaves_a_finished_run_as_it_is(
    whole: Path, drawings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, encoder = run_digest(whole / "stage-3"), whole / "encoder.safetensors"
    bytes_before = encoder.read_bytes()
    encoder.unlink()  # as if killed before it was written
    stages.pretrain(options(drawings, whole))
    assert run_digest(whole / "stage-3") == before and encoder.read_bytes() == bytes_before
    told = capsys.readouterr().err
    assert told.count("already done") == 3
    assert "nothing was to be done: all stages are finished\n" in told


def test_baselines_keep_less(drawings: Path, tmp_path: Path) -> None:
    for keep in ("nothing", "replay"):
        out = stages.pretrain(
            options(drawings, tmp_path / keep, epochs=1, continual={"keep": keep})
        )
        values = json.loads((out / "stage-2" / "metrics.jsonl").read_text().splitlines()[0])
        assert "distill" not in values and (out / "forgetting.png").exists()
        assert (out / "stage-1" / "exemplars.json").exists() == (keep == "replay")


def test_methods_with_a_row_per_picture_are_refused(drawings: Path, tmp_path: Path) -> None:
    values = options(drawings, tmp_path / "run", epochs=1).model_dump(mode="json")
    one_view = merge(values["views"], {"weak": {"sizes": []}})
    names = ("data", "out", "stages", "batch_size", "epochs", "model")
    kept = {name: values[name] for name in names}
    given = resolve({**kept, "recipe": "instdisc-small", "views": one_view, "device": "cpu"})
    with pytest.raises(ClsaError, match="instdisc keeps a row for each picture of one set"):
        stages.pretrain(given)
    assert not (tmp_path / "run").exists()


def test_sets_without_labels_have_no_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = [str(jpeg_folder(tmp_path / name, [(20, 20)] * 12)) for name in "ab"]
    out = stages.pretrain(options("", tmp_path / "run", stages=roots, epochs=1))
    assert "no forgetting matrix" in capsys.readouterr().err
    assert not (out / "forgetting.json").exists() and (out / "stage-2" / "views.png").exists()


def test_from_the_command_line(
    drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(drawings, tmp_path / "run", epochs=1).to_yaml()
    (tmp_path / "config.yaml").write_text(given)
    out = str(tmp_path / "run")
    assert main(["pretrain", "--config", str(tmp_path / "config.yaml"), "--out", out]) == 0
    printed = capsys.readouterr()
    assert "stage 2 of 3: 28 pictures, 6 exemplars" in printed.err and "random" in printed.out
    assert main(["evaluate", out, "--protocol", "knn-20"]) == 0
    args = ["pretrain", "--config", str(tmp_path / "config.yaml"), "--out", out]
    assert main([*args, "--stages", "classes:2"]) == Exit.USAGE
    assert "holds another run (stages: " in capsys.readouterr().err


def test_two_processes_go_through_the_stages_together(drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(options(drawings, tmp_path / "run", epochs=1).to_yaml())
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "clsa"]
    done = subprocess.run(
        [sys.executable, *launch, "pretrain", "--config", str(tmp_path / "config.yaml")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["reason"] == "finished"
    assert done.stderr.count("stage 3 of 3") == 1 and done.stdout.count("Next:") == 1
    facts = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    assert [len(row) for row in facts["accuracy"]] == [1, 2, 3]


# ---- the matrix


FOUND = Forgetting(["1", "2", "3"], [[50.0], [30.0, 70.0], [40.0, 60.0, 80.0]], [20.0, 20.0, 20.0],
                   [50.0, 45.0, 60.0])  # fmt: skip


def test_forgetting_is_what_was_lost_since_the_best() -> None:
    assert FOUND.average(2) == 60.0
    assert FOUND.forgotten() == pytest.approx(((50 - 40) + (70 - 60)) / 2)
    assert Forgetting(["1"], [[50.0]], [], [50.0]).forgotten() is None
    assert describe(FOUND) == "average accuracy 60.0 %, forgetting +10.0 points"
    text = markdown(FOUND)
    assert "| after 2 | 30.0 | 70.0 |  | 50.0 | 45.0 |" in text


def test_the_picture_holds_every_number() -> None:
    sheet = picture(FOUND)
    cells = np.asarray(sheet)[70 + 10, 150 + 10 :: 64][:3]
    assert (cells[1:] == 255).all() and (cells[0] < 255).any()  # after stage 1
    dark = [np.asarray(sheet)[70 + i * 64 + 6, 150 + i * 64 + 6].sum() for i in range(3)]
    assert dark[2] < dark[1] < dark[0]  # 80, 70, 50 percent


def test_a_stage_is_judged_on_its_own_classes(drawings: Path, tmp_path: Path) -> None:
    given = options(drawings, tmp_path)
    parts = labelled_parts(stage_sources(given), given)
    assert parts is not None
    classes = [set(part.queries.labels.tolist()) | set(part.bank.labels.tolist()) for part in parts]
    assert [len(each) for each in classes] == [2, 2, 2] and not classes[0] & classes[1]

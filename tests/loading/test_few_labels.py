"""Runs with few labels from end to end: what they see, how they resume, how they are evaluated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clsa.evaluate.evaluate import evaluate
from clsa.evaluate.features.split import split, with_few_bank_labels
from clsa.loading.few_labels import with_few_labels
from clsa.methods import build_method
from clsa.methods.method import Extent
from clsa.options.commands import EvaluateOptions
from clsa.options.config import merge
from clsa.options.run import DataOptions, RunOptions
from clsa.pictures.opening import open_source
from clsa.recipes import resolve
from clsa.runs.checkpoint import run_digest
from clsa.runs.saved_encoder import load_encoder
from clsa.system.errors import ClsaError, Exit
from clsa.training import setup
from clsa.training.start import pretrain
from tests.support.pictures import clipart_folder


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clipart_folder(tmp_path_factory.mktemp("drawings"), classes=6, each=14)


def options(data: Path, out: Path, **over: Any) -> RunOptions:
    tiny = {
        "recipe": "suncet-small",
        "data": {"data": str(data), "workers": 0},
        "out": str(out),
        "labels": "25%",
        "suncet": {"classes": 4, "per_class": 2},
        "batch_size": 8,
        "epochs": 2,
        "probe_every": 0,
        "device": "cpu",
        "views": {"size": 16, "weak": {"sizes": (16,)}},
        "model": {"projector_hidden": 32, "projector_dim": 16},
    }
    return resolve(merge(tiny, over))


@pytest.fixture(scope="module")
def whole(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(options(drawings, tmp_path_factory.mktemp("whole") / "run"))


def test_labels_held_out_for_evaluation_are_never_seen(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def watched(given: RunOptions, extent: Extent) -> Any:
        assert extent.labels is not None
        seen.append(extent.labels)
        return build_method(given, extent)

    monkeypatch.setattr(setup, "build_method", watched)
    pretrain(options(drawings, tmp_path / "run", max_steps=1, labels="100%"))
    source = open_source(str(drawings), "train", DataOptions())
    held = set(split(source, None, seed=0).queries.ids)
    known = {source.ids[i] for i in np.flatnonzero(seen[0] >= 0)}
    assert held and not held & known and len(held) + len(known) == len(source)


def test_the_run_learns_from_both_terms_and_says_how_many_labels(
    whole: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all({"contrast", "suncet"} <= set(line) for line in lines if "loss" in line)
    pretrain(options(drawings, tmp_path / "run", max_steps=1))
    assert "labels: 16 pictures of 6 classes" in capsys.readouterr().err


@pytest.mark.parametrize("limits", [(3, 11, None)])
def test_resume_is_bitwise_also_after_suncet_ends(
    limits: tuple[int | None, ...], drawings: Path, tmp_path: Path
) -> None:
    once = {"suncet": {"epochs": 1}}
    straight = pretrain(options(drawings, tmp_path / "straight", **once))
    for limit in limits:
        pretrain(options(drawings, tmp_path / "cut", max_steps=limit, **once))
    assert run_digest(tmp_path / "cut") == run_digest(straight)
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert ["suncet" in line for line in lines if "loss" in line][-1] is False


def test_a_changed_list_of_labels_is_refused(drawings: Path, tmp_path: Path) -> None:
    source = open_source(str(drawings), "train", DataOptions())
    kept = set(split(source, None, seed=0).bank.ids)
    names = [name for name in source.ids if name in kept][::3]
    few = tmp_path / "few.txt"
    few.write_text("\n".join(names))
    given = options(drawings, tmp_path / "run", labels=str(few), max_steps=2)
    pretrain(given)
    few.write_text("\n".join(names[:-1]))
    with pytest.raises(ClsaError, match="data changed: "):
        pretrain(given)


@pytest.mark.parametrize("sizes", [(16,), ()])
def test_labelled_pictures_that_cannot_be_read_have_no_class(
    sizes: tuple[int, ...], tmp_path: Path
) -> None:
    root = clipart_folder(tmp_path / "data", classes=4, each=14)
    source = open_source(str(root), "train", DataOptions())
    parts = split(source, None, seed=0)
    names = [
        parts.bank.ids[i] for c in range(4) for i in np.flatnonzero(parts.bank.labels == c)[:2]
    ]
    for name in (names[0], names[2]):  # from two classes, so each keeps one picture
        (root / name).write_bytes(b"no picture")
    (tmp_path / "few.txt").write_text("\n".join(names))
    over = {
        "recipe": "instdisc-small",
        "model": {"norm_groups": 1},
        "views": {"weak": {"sizes": sizes}},
    }
    out = pretrain(
        options(root, tmp_path / "run", labels=str(tmp_path / "few.txt"), epochs=1, **over)
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["suncet"]) for line in lines if "loss" in line)


def test_one_list_serves_training_and_evaluation(
    drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(str(drawings), "train", DataOptions())
    names = list(source.ids)[::2]
    few = tmp_path / "few.txt"
    few.write_text("\n".join(names))
    parts = split(source, None, seed=0)
    known = [name for name in names if name in set(parts.bank.ids)]
    run = pretrain(options(drawings, tmp_path / "run", labels=str(few), max_steps=1))
    told = f"labels: {len(known)} pictures of 6 classes; held out for evaluation:"
    assert f"{told} {len(names) - len(known)} more of the list" in capsys.readouterr().err
    assert set(with_few_bank_labels(parts, str(few), seed=0).bank.ids) == set(known)
    assert evaluate(EvaluateOptions(run=run, labels=str(few), protocol=("knn-20",), random=False))


def test_evaluation_learns_from_the_labels_of_the_run(whole: Path, drawings: Path) -> None:
    source = open_source(str(drawings), "train", DataOptions())
    parts = split(source, None, seed=0)
    few = with_few_bank_labels(parts, "25%", seed=0)
    assert len(few.bank) == 16 and few.queries is parts.queries
    kept = source.subset(np.flatnonzero(np.isin(list(source.ids), list(parts.bank.ids))))
    chosen = with_few_labels(kept, "25%", seed=0)
    assert {chosen.ids[i] for i in np.flatnonzero(chosen.labels >= 0)} == set(few.bank.ids)
    records = evaluate(EvaluateOptions(run=whole, labels="25%", protocol=("knn-20",)))
    assert all("labels=25%" in record.settings for record in records)


def test_finetuning_learns_and_leaves_the_encoder_alone(whole: Path) -> None:
    before = {k: v.clone() for k, v in load_encoder(whole).state_dict().items()}
    judging = EvaluateOptions(
        run=whole, labels="100%", protocol=("finetune",), change=("epochs=30",), random=False
    )
    found = {record.metric: record.value for record in evaluate(judging) if record.chosen == "last"}
    assert found["top1"] > 100 / 6 + 5 and found["top5"] >= found["top1"]
    again = {record.metric: record.value for record in evaluate(judging) if record.chosen == "last"}
    assert again == found
    for name, value in load_encoder(whole).state_dict().items():
        assert torch.equal(value, before[name])


def test_labels_without_classes_are_refused(tmp_path: Path) -> None:
    from tests.support.pictures import jpeg_folder

    root = jpeg_folder(tmp_path / "plain", [(20, 20)] * 12)
    with pytest.raises(ClsaError, match="none of the pictures has a label") as caught:
        pretrain(options(root, tmp_path / "run"))
    assert caught.value.code == Exit.USAGE and not (tmp_path / "run").exists()

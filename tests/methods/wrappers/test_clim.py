"""CLIM around a method, and whole runs with it: refreshes, resuming, the sheet of neighbours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clsa.cli.main import main
from clsa.evaluate.features import projections
from clsa.methods import build_method
from clsa.methods.wrappers.clim import CLIM
from clsa.options.config import merge
from clsa.options.run import RunOptions
from clsa.recipes import resolve
from clsa.runs.checkpoint import load_newest, run_digest
from clsa.system.errors import ClsaError, Exit
from clsa.training.start import pretrain
from tests.support.contract import EXTENT, batch_of, build, embed, tiny
from tests.support.pictures import clipart_folder

MIXTURE: dict[str, Any] = {"num_clusters": 3, "neighbours": 8, "refresh_epochs": 2, "start": 0.25}


# ---- around a method


@pytest.mark.parametrize("recipe", ["moco-v2", "moco-v1", "infomin", "adco", "pcl"])
def test_before_the_first_refresh_it_is_the_method_alone(recipe: str) -> None:
    given = {"clim": True, "mixture": {**MIXTURE, "num_clusters": 2}}
    method = build_method(tiny(recipe, **given), EXTENT)
    alone = build_method(tiny(recipe), EXTENT)
    for each in (method, alone):
        each.before_epoch(0, embed)
    assert isinstance(method, CLIM) and method.companions() is None
    batch = batch_of(method)
    ours, theirs = method(batch), alone(batch)
    assert set(ours.losses) == set(theirs.losses)
    for name, loss in theirs.losses.items():
        torch.testing.assert_close(ours.losses[name], loss)
    method.before_epoch(1, embed)
    assert method.companions() is not None and method.refreshes(1) and not method.refreshes(2)
    mixed = method(batch_of(method))
    assert all(loss.isfinite() for loss in mixed.losses.values())
    assert not torch.equal(mixed.losses["contrast"], ours.losses["contrast"])


@pytest.mark.parametrize("recipe", ["simclr", "byol", "swav", "instdisc", "moco-v3", "dino"])
def test_methods_without_keys_are_refused(recipe: str) -> None:
    with pytest.raises(ClsaError, match="use moco"):
        build(recipe, clim=True, mixture={**MIXTURE, "num_clusters": 2})
    with pytest.raises(ClsaError, match="use moco"):
        build("moco-v2", clim=True, method={"symmetric": True})


def test_resolutions_share_crop_and_draws() -> None:
    method = build("moco-v2", clim=True, mixture={**MIXTURE, "resolutions": (12, 8)})
    key, weak, *more = method.view_specs
    assert [spec.size for spec in more] == [12, 12, 8, 8]
    for spec, first in zip(more, [key, weak, key, weak], strict=True):
        assert spec._replace(name="", size=0) == first._replace(name="", size=0)


def test_three_systems_do_not_go_together() -> None:
    for given in ({"labels": "10%"}, {"stages": ["classes:2"]}):
        with pytest.raises(ClsaError, match="cannot be combined"):
            resolve({"recipe": "clim-small", **given})


# ---- runs


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clipart_folder(tmp_path_factory.mktemp("drawings"), classes=4, each=11)


def options(data: Path, out: Path, **over: Any) -> RunOptions:
    values = {
        "recipe": "clim-small",
        "data": {"data": str(data), "workers": 0},
        "out": str(out),
        "batch_size": 8,
        "epochs": 4,
        "probe_every": 0,
        "device": "cpu",
        "views": {"size": 16, "weak": {"sizes": (16,)}},
        "model": {"projector_hidden": 32, "projector_dim": 16, "norm_groups": 2},
        "method": {"queue_size": 20},
        "mixture": MIXTURE,
    }
    return resolve(merge(values, over))


@pytest.fixture(scope="module")
def whole(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(options(drawings, tmp_path_factory.mktemp("whole") / "run"))


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_refresh_is_logged_apart_and_drawn(whole: Path) -> None:
    refreshed = [line for line in lines_of(whole) if "refresh_s" in line]
    assert [line["epoch"] for line in refreshed] == [1.0, 3.0]
    for line in refreshed:
        assert 0 <= line["clustering_s"] + line["search_s"] <= line["refresh_s"]
        assert 0 < line["positives"] <= 8
    assert Image.open(whole / "neighbours.png").width > 10 * 96
    assert not (whole / "embeddings").exists()


@pytest.mark.parametrize("streamed", [False, True])
def test_resume_is_bitwise_before_at_and_after_a_refresh(
    streamed: bool, whole: Path, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = whole
    if streamed:  # rounds the embeddings to float16
        monkeypatch.setattr(projections, "LIMIT", 0)
        wanted = pretrain(options(drawings, tmp_path / "straight"))
    for limit in (3, 5, 8, 15, None):  # five steps an epoch
        pretrain(options(drawings, tmp_path / "cut", max_steps=limit))
    assert run_digest(tmp_path / "cut") == run_digest(wanted)
    times = [line["step"] for line in lines_of(tmp_path / "cut") if "refresh_s" in line]
    assert times == [6, 16]


def test_an_interrupted_embedding_goes_on_where_it_was(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "LIMIT", 0)
    monkeypatch.setattr(projections, "NOTED", 1)
    straight = pretrain(options(drawings, tmp_path / "straight"))
    encode, seen = projections.encode, 0

    def breaking(*args: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(projections, "encode", breaking)
    with pytest.raises(KeyboardInterrupt):
        pretrain(options(drawings, tmp_path / "cut"))
    assert seen == 1 and list((tmp_path / "cut" / "embeddings").glob("*.f16"))
    monkeypatch.setattr(projections, "encode", encode)
    pretrain(options(drawings, tmp_path / "cut"))
    assert run_digest(tmp_path / "cut") == run_digest(straight)
    assert not (tmp_path / "cut" / "embeddings").exists()


def test_the_kept_positives_are_numbers_of_the_set(whole: Path) -> None:
    saved = load_newest(whole / "checkpoints")
    assert saved is not None
    (name,) = [name for name in saved.state["method"] if name.endswith("positives")]
    table = saved.state["method"][name].numpy()
    assert table.shape == (44, 10) and table.min() >= 0 and table.max() < 44
    assert (table[:, 0] != np.arange(44)).all()


def test_neighbours_are_shown_on_demand(
    whole: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    args = ["preview", str(whole), "--neighbours", "--count", "3", "--out", str(out)]
    assert main(args) == 0 and str(out) in capsys.readouterr().out
    assert Image.open(out).height < Image.open(whole / "neighbours.png").height
    early = pretrain(options(drawings, tmp_path / "early", max_steps=2))
    assert main(["preview", str(early), "--neighbours"]) == Exit.USAGE
    plain = pretrain(options(drawings, tmp_path / "plain", max_steps=1, clim=False))
    assert main(["preview", str(plain), "--neighbours"]) == Exit.USAGE
    text = capsys.readouterr().err
    assert "not been found yet" in text and "runs without --clim" in text and text.count("\n") < 12

"""Files that clsa wrote before its modules moved into wings are still read, and a run goes on.

The set was written by the commit before that move: a run of 12 of 20 steps with checkpoints,
encoders, results and a classifier, its pictures, a packed set and a table of features.
`expected.json` holds what the same code then found in it.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from clsa.cli.main import main
from clsa.evaluate.results.records import read_records
from clsa.learning import models
from clsa.options.run import DataOptions
from clsa.pictures.opening import open_source
from clsa.runs.checkpoint import run_digest
from clsa.runs.folder import RunFolder
from clsa.runs.saved_encoder import load_encoder
from tests.support.small_encoder import shrink_encoder

ARCHIVE = Path(__file__).parents[1] / "support" / "written-before-wings.tar.xz"
IMAGE = torch.linspace(-2, 2, 3 * 16 * 16).view(1, 3, 16, 16)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The files, in the folder that the process works in; the encoder is as small as theirs."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_create", models._create)  # put back afterwards
    shrink_encoder((3, 8, 16))
    yield json.loads((tmp_path / "expected.json").read_text())


def features(run: str) -> list[float]:
    with torch.no_grad():
        return load_encoder(run)(IMAGE)[0].tolist()


def test_the_set_is_small() -> None:
    assert ARCHIVE.stat().st_size <= 200_000


def test_a_run_is_read(written: dict[str, Any]) -> None:
    assert run_digest(Path("run")) == written["digest"]
    assert features("run") == pytest.approx(written["features"], abs=1e-6)
    options = RunFolder(Path("run")).read_options()
    assert (options.recipe, options.batch_size, options.max_steps) == ("clsa-small", 8, 12)
    records = read_records(Path("run/results.json"))
    assert {record.protocol for record in records} >= {"knn-20", "knn-strong", "logistic"}
    assert main(["predict", "run", "pictures", "--device", "cpu"]) == 0  # by the saved classifier
    rows = Path("predictions.csv").read_text().splitlines()
    assert len(rows) == 41 and "dark" in rows[1]


def test_packed_pictures_and_tables_are_read(written: dict[str, Any]) -> None:
    source = open_source("packed", "train", DataOptions(data="packed"))
    assert source.digest() == written["packed_digest"]
    assert [*list(source.ids)[:3], len(source)] == written["packed_ids"]
    assert source.classes == ["dark", "light"]
    assert pq.read_table("vectors.parquet").column_names == ["path", "label", "vector"]


def test_a_run_goes_on_as_its_own_code_went_on(
    written: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """From its config.yaml, to the weights that the earlier code came to."""
    assert main(["extend", "run", "--epochs", "4"]) == 0, capsys.readouterr().err
    status = json.loads(Path("run/status.json").read_text())
    assert (status["reason"], status["step"]) == ("finished", 20)
    assert features("run") == pytest.approx(written["end_features"], abs=1e-3)


def test_a_configuration_starts_another_run(
    written: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "--config", "run/config.yaml", "--out", "again", "--max-steps", "2"]
    assert main(words) == 0, capsys.readouterr().err
    before, now = (RunFolder(Path(name)).read_options() for name in ("run", "again"))
    assert now.model_copy(update={"out": before.out, "max_steps": 12, "config": None}) == before
    other = [*words[:-2], "--recipe", "moco-v2-small"]  # it would file a CLSA run as MoCo v2
    assert main(other) == 2 and "was resolved from clsa-small" in capsys.readouterr().err

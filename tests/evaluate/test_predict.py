import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clsa.cli.main import main
from clsa.evaluate.evaluate import evaluate
from clsa.evaluate.features.extract import centre_views
from clsa.evaluate.predict import predict
from clsa.evaluate.results.heads import load_head, saved_heads
from clsa.learning import models
from clsa.options.commands import EvaluateOptions, PredictOptions
from clsa.options.run import DataOptions, ModelOptions, ViewOptions
from clsa.pictures.opening import open_source
from clsa.runs import saved_encoder
from tests.support.pictures import clipart_folder, encoded, photograph
from tests.support.refusals import refusal

MODEL = ModelOptions(encoder="resnet10-w32")
VIEWS = ViewOptions(size=32)
HEADS = ("logistic", "linear-fast", "linear-clsa", "finetune")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clipart_folder(tmp_path_factory.mktemp("drawings"), classes=5, each=12)


@pytest.fixture(scope="module")
def run(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run judged by every protocol that learns a classifier, on its own pictures."""
    folder = tmp_path_factory.mktemp("run")
    facts = saved_encoder.EncoderFacts(
        model=MODEL, views=VIEWS, data=DataOptions(data=str(drawings)), recipe="clsa", seed=7,
        step=1, data_digest="",
    )  # fmt: skip
    encoder = models.build_encoder(MODEL, seed=1)
    saved_encoder.save_encoder(folder / "encoder.safetensors", encoder, facts)
    data = DataOptions(data=str(drawings), val=str(drawings), workers=0)
    options = EvaluateOptions(
        run=folder, data=data, protocol=HEADS, random=False, device="cpu", leaks="off",
    )  # fmt: skip
    records = evaluate(options)
    (folder / "top1.json").write_text(
        json.dumps(
            {
                r.protocol: r.value
                for r in records
                if (r.encoder, r.metric) == ("trained", "top1") and r.chosen in ("last", "")
            }
        )
    )
    return folder


def test_every_head_predicts_as_well_as_judged(run: Path, drawings: Path, tmp_path: Path) -> None:
    judged = json.loads((run / "top1.json").read_text())
    assert set(judged) == set(HEADS)
    source = open_source(str(drawings), "val", DataOptions())
    for name in HEADS:
        out = tmp_path / f"{name}.json"
        told = predict(
            PredictOptions(run=run, images=(str(drawings),), head=name, out=out, device="cpu")
        )
        assert told == f"{out}: 60 pictures labelled by {name}"
        rows = json.loads(out.read_text())
        assert [row["path"] for row in rows] == list(source.ids)
        right = [
            row["labels"][0] == source.classes[label]
            for row, label in zip(rows, source.labels, strict=True)
        ]
        assert 100 * np.mean(right) == pytest.approx(judged[name], abs=1e-6)
        for row in rows:
            values = row["probabilities"]
            assert len(values) == 3 and values == sorted(values, reverse=True)
            assert 0 < sum(values) <= 1 + 1e-5


def test_probabilities_are_the_softmax_of_the_layer(run: Path, drawings: Path) -> None:
    encoder = saved_encoder.load_encoder(run)
    head, facts = load_head(run, "linear-clsa", encoder)
    source = open_source(str(drawings), "val", DataOptions())
    ((_, images),) = centre_views(source, np.array([4]), VIEWS, torch.device("cpu"))
    with torch.no_grad():
        wanted = head.layer(encoder(images)).double().softmax(1)[0]
    out = run / "one.json"
    path = str(drawings / source.ids[4])
    predict(PredictOptions(run=run, images=(path,), head="linear-clsa", out=out, top=5))
    (row,) = json.loads(out.read_text())
    found = dict(zip(row["labels"], row["probabilities"], strict=True))
    for name, value in zip(facts.classes, wanted.tolist(), strict=True):
        assert found[name] == pytest.approx(value, abs=2e-6)


def test_csv_of_files_with_odd_and_broken_ones(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a, b.png", 'quote".jpg', "gray.png", "broken.jpg"]
    (tmp_path / names[0]).write_bytes(encoded(photograph(0, 40, 300)))
    (tmp_path / names[1]).write_bytes(encoded(photograph(1, 7, 9), "JPEG"))
    (tmp_path / names[2]).write_bytes(encoded(photograph(2, 50, 50)[..., 0]))
    (tmp_path / names[3]).write_bytes(b"nothing")
    out = tmp_path / "deep" / "predictions.csv"
    images = [str(tmp_path / name) for name in names]
    code = main(["predict", str(run), *images, "--out", str(out), "--top", "2"])
    assert code == 0
    assert "1 of them unreadable" in capsys.readouterr().out
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label_1", "probability_1", "label_2", "probability_2"]
    assert [row["path"] for row in rows] == images
    assert [bool(row["label_1"]) for row in rows] == [True, True, True, False]
    assert 0 < float(rows[0]["probability_2"]) <= float(rows[0]["probability_1"]) < 1


def test_the_last_head_is_taken_and_a_wrong_one_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(photograph(0, 40, 40)))
    images = (str(tmp_path / "a.png"),)
    out = tmp_path / "p.csv"
    assert predict(PredictOptions(run=run, images=images, out=out)).endswith("by finetune")

    def asked(**over: object) -> PredictOptions:
        values = {"run": run, "images": images, "out": out, **over}
        return PredictOptions(**values)  # pyright: ignore

    text, code = refusal(lambda: predict(asked(head="linear-clas")))
    assert "did you mean linear-clsa?" in text and code == 66
    text, code = refusal(lambda: predict(asked(images=("no.png",))))
    assert "no.png - no such file" in text and code == 66
    text, code = refusal(lambda: predict(asked(images=())))
    assert code == 66
    (tmp_path / "b.png").write_bytes(b"")
    text, code = refusal(lambda: predict(asked(images=(str(tmp_path / "b.png"),))))
    assert "none of the 1 pictures can be read" in text and code == 65


def test_a_head_of_another_encoder_or_no_head_at_all(run: Path, tmp_path: Path) -> None:
    encoder, facts = saved_encoder.load_encoder_facts(run)
    with torch.no_grad():
        next(encoder.parameters()).mul_(2)
    other = tmp_path / "other"
    other.mkdir()
    saved_encoder.save_encoder(other / "encoder.safetensors", encoder, facts)
    (other / "heads").mkdir()
    for name in ("linear-clsa", "finetune"):
        data = (run / "heads" / f"{name}.safetensors").read_bytes()
        (other / "heads" / f"{name}.safetensors").write_bytes(data)
    for name in ("linear-clsa", "finetune"):  # one has its own encoder
        text, code = refusal(lambda name=name: load_head(other, name, encoder))
        assert "another encoder" in text and code == 2
    (other / "heads" / "linear-clsa.safetensors").write_bytes(b"x" * 100)
    text, code = refusal(lambda: load_head(other, "linear-clsa", encoder))
    assert "not a head of clsa" in text and code == 77
    text, code = refusal(lambda: load_head(tmp_path, None, encoder))
    assert "no such head is saved yet" in text and "clsa evaluate" in text and code == 66


def test_changed_cards_have_separate_heads_and_a_copy_keeps_their_order(
    run: Path, drawings: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    (copied / "heads").mkdir(parents=True)
    files = [run / "encoder.safetensors", *sorted((run / "heads").glob("*"), reverse=True)]
    for path in files:
        (copied / path.relative_to(run)).write_bytes(path.read_bytes())
    assert saved_heads(copied) == saved_heads(run)
    data = DataOptions(data=str(drawings), workers=0)
    few = EvaluateOptions(
        run=copied, data=data, protocol=("linear-fast",), change=("epochs=2",), labels="50%",
        device="cpu", leaks="off", random=False,
    )  # fmt: skip
    evaluate(few)
    names = [name for name, _ in saved_heads(copied)]
    assert names[:-1] == list(HEADS) and names[-1].startswith("linear-fast-")
    (tmp_path / "a.png").write_bytes(encoded(photograph(0, 40, 40)))
    asked = PredictOptions(run=copied, images=(str(tmp_path / "a.png"),), out=tmp_path / "p.csv")
    assert predict(asked).endswith("by linear-fast (labels=50% epochs=2)")

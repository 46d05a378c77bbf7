import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from rich.console import Console
from torch import nn

from clsa.evaluate import exam as subject_module
from clsa.evaluate.classify.linear import fitting
from clsa.evaluate.evaluate import evaluate
from clsa.evaluate.features.extract import centre_views, extract, frozen, projections
from clsa.evaluate.features.split import split, without_held_out_labels
from clsa.evaluate.results.heads import load_head
from clsa.evaluate.results.records import Record, append_records, read_records, table
from clsa.learning import models
from clsa.options.commands import EvaluateOptions
from clsa.options.protocols import CARDS
from clsa.options.run import DataOptions, ModelOptions, ViewOptions
from clsa.pictures import opening
from clsa.pictures.sources import Pictures
from clsa.runs import digests, saved_encoder
from clsa.system import dist
from clsa.system.errors import ClsaError, Exit
from clsa.system.files import ASSETS
from clsa.training.online_probe import _spread, probe
from tests.support import judging
from tests.support.pictures import voc_folder

MODEL = ModelOptions(encoder="resnet10-w32")
VIEWS = ViewOptions(size=32)
CLASSES = ["flag", "card", "icon"]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 drawings, in one folder per class."""
    folder = tmp_path_factory.mktemp("drawings")
    taken = dict.fromkeys(CLASSES, 0)
    with tarfile.open(ASSETS / "clipart.tar") as tar:
        for member in tar:
            split_name, name = member.name.split("/")[:2]
            if member.isfile() and split_name == "train" and taken.get(name, 20) < 20:
                path = folder / name / Path(member.name).name
                path.parent.mkdir(exist_ok=True)
                file = tar.extractfile(member)
                assert file
                path.write_bytes(file.read())
                taken[name] += 1
    assert set(taken.values()) == {20}
    return folder


def save_run(folder: Path, data: DataOptions) -> None:
    """Save an encoder that differs from its random start, as a run with seed 7 does."""
    encoder = models.build_encoder(MODEL, seed=7)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    facts = saved_encoder.EncoderFacts(
        model=MODEL, views=VIEWS, data=data, recipe="clsa", seed=7, step=1, data_digest=""
    )
    saved_encoder.save_encoder(folder / "encoder.safetensors", encoder, facts)


@pytest.fixture
def run(tmp_path: Path, drawings: Path) -> Path:
    save_run(tmp_path, DataOptions(data=str(drawings)))
    return tmp_path


def test_evaluation_repeats_and_leaves_the_encoder_alone(run: Path) -> None:
    before = (run / "encoder.safetensors").read_bytes()
    options = EvaluateOptions(
        run=run,
        protocol=("knn-20", "knn-200", "knn-strong", "logistic", "linear-fast", "linear-clsa"),
        change=("linear-clsa.epochs=2", "linear-fast.epochs=3"),
        device="cpu",
    )
    records = evaluate(options)
    first = (run / "results.json").read_bytes()
    assert evaluate(options) == records and (run / "results.json").read_bytes() == first
    assert (run / "encoder.safetensors").read_bytes() == before
    assert [Record(**entry) for entry in json.loads(first)] == records
    assert {record.protocol for record in records} == set(options.protocol)
    assert {(record.split, record.n, record.seed) for record in records} == {("holdout", 12, 0)}
    assert all(0 <= record.value <= 100 for record in records)
    found = {record.encoder: record.encoder_digest for record in records}
    assert found == {
        "random": digests.digest(models.build_encoder(MODEL, seed=7).state_dict()),
        "trained": digests.digest(saved_encoder.load_encoder(run).state_dict()),
    }
    assert all(record.encoder_digest_after == record.encoder_digest for record in records)
    settings = {record.protocol: record.settings for record in records}
    assert settings["knn-20"] == "" and settings["linear-clsa"] == "epochs=2"
    hashes = {record.protocol: record.card for record in records}
    assert hashes["knn-20"] == CARDS["knn-20"].hash("knn-20")
    assert hashes["linear-clsa"] != CARDS["linear-clsa"].hash("linear-clsa")
    epochs = {(r.chosen, r.epoch) for r in records if r.protocol == "linear-clsa"}
    assert ("last", 2) in epochs and epochs <= {("last", 2), ("best", 1), ("best", 2)}
    assert {r.leaked for r in records} == {12}  # held out of the pictures of the run


def test_knn_on_its_own_pictures_is_perfect(run: Path, drawings: Path) -> None:
    data = DataOptions(data=str(drawings), val=str(drawings))
    options = EvaluateOptions(
        run=run / "encoder.safetensors",
        data=data,
        protocol=("knn-20",),
        change=("neighbours=1",),
        device="cpu",
    )
    records = evaluate(options)
    values = {(r.encoder, r.metric): (r.value, r.split, r.n) for r in records}
    assert values["random", "top1"] == values["trained", "balanced"] == (100.0, "val", 60)
    assert read_records(run / "results.json") == records


def test_pictures_without_labels_are_refused_with_a_remedy(run: Path, drawings: Path) -> None:
    flat = DataOptions(data=str(drawings / "flag"))
    with pytest.raises(ClsaError, match="subfolder") as caught:
        evaluate(EvaluateOptions(run=run, data=flat, device="cpu"))
    assert caught.value.code == Exit.BAD_DATA and not (run / "results.json").exists()


def test_unknown_classes_are_refused_with_the_known_ones(
    run: Path, drawings: Path, tmp_path: Path
) -> None:
    for name in ("x", "y"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for path in sorted(drawings.glob("flag/*"))[:2]:
            (tmp_path / "val" / name / path.name).write_bytes(path.read_bytes())
    data = DataOptions(data=str(drawings), val=str(tmp_path / "val"))
    with pytest.raises(ClsaError, match=r"none of its 4 pictures .*card, flag, icon") as caught:
        evaluate(EvaluateOptions(run=run, data=data, device="cpu"))
    assert caught.value.code == Exit.BAD_DATA


def test_damaged_results_are_reported_before_the_work(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "results.json").write_text("[{}]")
    monkeypatch.setattr(subject_module, "split", lambda *_: pytest.fail("began to work"))
    with pytest.raises(ClsaError, match=r"results\.json - not a list of results") as caught:
        evaluate(EvaluateOptions(run=run, device="cpu"))
    assert caught.value.code == Exit.BAD_DATA and (run / "results.json").read_text() == "[{}]"


def test_results_of_the_best_encoder_are_kept_with_those_of_the_last(run: Path) -> None:
    encoder, facts = saved_encoder.load_encoder_facts(run)
    with torch.no_grad():
        next(encoder.parameters()).mul_(0.5)
    saved_encoder.save_encoder(run / "encoder-best.safetensors", encoder, facts)
    options = EvaluateOptions(run=run, protocol=("knn-20",), device="cpu")
    last = evaluate(options)
    best = evaluate(options.model_copy(update={"run": run / "encoder-best.safetensors"}))
    found = {r.encoder: r.encoder_digest for r in best}
    assert found["trained"] == digests.digest(encoder.state_dict())
    assert [r for r in best if r.encoder == "random"] == [r for r in last if r.encoder == "random"]
    assert read_records(run / "results.json") == last + [r for r in best if r.encoder == "trained"]


def test_training_never_sees_the_labels_that_judging_holds_out() -> None:
    images = np.zeros((60, 4, 4, 3), np.uint8)
    labels = np.arange(60) % 4 - 1
    source = Pictures(images, labels, ["a", "b", "c"], [f"{i:02}" for i in range(60)])
    shown, judged = without_held_out_labels(source), split(source, None, seed=0)
    known = {source.ids[int(i)] for i in np.flatnonzero(shown.labels >= 0)}
    assert known == set(judged.bank.ids) and not known & set(judged.queries.ids)
    assert (shown.labels[shown.labels >= 0] == labels[shown.labels >= 0]).all()
    assert (source.labels == labels).all() and shown.digest() != source.digest()


def test_split_prefers_the_sets_own_test_pictures_and_drops_unlabelled_ones() -> None:
    images, labels = np.zeros((10, 4, 4, 3), np.uint8), np.array([0, 1, -1, 0, 1, 0, -1, 1, 0, 1])
    train, val = Pictures(images, labels, ["a", "b"]), Pictures(images[:3], labels[:3], ["a", "b"])
    bank, queries, name = split(train, val, seed=0)
    assert name == "val" and bank.labels.min() == 0 and queries.labels.tolist() == [0, 1]
    bank, queries, name = split(train, None, seed=0)
    assert (name, len(bank), len(queries)) == ("holdout", 6, 2)
    assert not set(bank.ids) & set(queries.ids)
    with pytest.raises(ClsaError, match="4 of 10"):
        split(Pictures(images, np.where(labels == 0, -1, labels), ["a", "b"]), val, seed=0)
    with pytest.raises(ClsaError, match="no val picture"):
        split(train, Pictures(images[:1], np.array([-1]), ["a", "b"]), seed=0)


def test_frozen_restores_modes_and_notices_a_moved_buffer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
    with frozen(model):
        assert not model[0].training and not torch.is_grad_enabled()
    assert model[0].training and not model[1].training and torch.is_grad_enabled()
    with pytest.raises(ClsaError, match="changed the encoder"), frozen(model):
        model.train()
        model(torch.randn(4, 2))
    assert model[0].training and not model[1].training


def test_features_ignore_batch_size_and_strong_ones_follow_the_seed(drawings: Path) -> None:
    source = opening.open_source(str(drawings), "train", DataOptions())
    encoder, rows = models.build_encoder(MODEL, seed=0), np.array([3, 40, 7])

    def features(batch_size: int = 256, seed: int | None = None) -> torch.Tensor:
        with frozen(encoder):
            kept, found = extract(encoder, source, rows, VIEWS, CPU, batch_size, seed)
        assert kept.tolist() == [3, 40, 7] and found.dtype == torch.float32
        return found

    torch.testing.assert_close(features(1), features(256), rtol=1e-4, atol=1e-5)
    assert torch.equal(features(seed=0), features(seed=0))
    assert not torch.allclose(features(seed=0), features(seed=1), rtol=1e-2)
    assert not torch.allclose(features(seed=0), features(), rtol=1e-2)
    rows = rows[::-1]
    with frozen(encoder):
        alone = extract(encoder, source, rows, VIEWS, CPU, 256, 0)[1].flip(0)
    rows = rows[::-1]
    torch.testing.assert_close(alone, features(seed=0), rtol=1e-4, atol=1e-5)


def test_unreadable_pictures_are_left_out(run: Path, drawings: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    for path in drawings.glob("*/*"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    for name in CLASSES:
        (folder / name / "0broken.png").write_bytes(b"not a picture")
    data = DataOptions(data=str(drawings), val=str(folder))
    protocol = ("knn-20", "knn-strong")
    records = evaluate(EvaluateOptions(run=run, data=data, protocol=protocol, device="cpu"))
    assert {record.n for record in records} == {60}


def test_projections_are_unit_rows_in_the_sets_order_and_zeros_where_unreadable(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in drawings.glob("flag/*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "0broken.png").write_bytes(b"not a picture")  # the first of 21
    source = opening.open_source(str(tmp_path), "train", DataOptions())
    options = MODEL.model_copy(update={"projector_hidden": 16, "projector_dim": 8})
    network = models.Network(options, seed=0).train()
    before = digests.digest(network.state_dict())
    whole = projections(source, VIEWS, CPU, network)
    assert whole.shape == (21, 8) and whole.dtype == torch.float32 and not whole.requires_grad
    assert network.training and digests.digest(network.state_dict()) == before
    assert not whole[0].any()
    torch.testing.assert_close(whole[1:].norm(dim=1), torch.ones(20))
    ((_, images),) = centre_views(source, np.array([13]), VIEWS, CPU)
    with torch.no_grad():
        alone = network.eval()(images)[0]
    torch.testing.assert_close(whole[13], alone, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", lambda rows: rows)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shares.append(projections(source, VIEWS, CPU, network))
    assert [len(share) for share in shares] == [11, 11] and not shares[1][-1].any()
    torch.testing.assert_close(torch.cat(shares)[:21], whole, rtol=1e-4, atol=1e-5)


def test_probe_gives_percent_and_keeps_the_train_mode(drawings: Path) -> None:
    source = opening.open_source(str(drawings), "train", DataOptions())
    encoder = models.build_encoder(MODEL, seed=0).train()
    parts = split(source, None, seed=0)
    value = probe(encoder, parts, VIEWS, CPU)
    assert value == probe(encoder, parts, VIEWS, CPU)
    assert encoder.training and 100 / 3 < value <= 100
    assert probe(encoder, split(source, source, seed=0), VIEWS, CPU) >= value
    assert _spread(7, 3).tolist() == [0, 2, 4] and _spread(3, 7).tolist() == [0, 1, 2]


def test_records_replace_those_with_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    old = Record(
        "knn-20", "hash", "", "top1", 50.0, "", None, "random", "val", 10, 9, 0, "e", "e", "d", None
    )
    append_records(path, [old, old._replace(encoder="trained", value=61.5)])
    append_records(path, [old._replace(value=55.0, n=12), old._replace(settings="neighbours=1")])
    values = [(record.value, record.n) for record in read_records(path)]
    assert values == [(55.0, 12), (61.5, 10), (50.0, 10)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(read_records(path)[:2]))
    shown = console.export_text()
    assert all(text in shown for text in ("55.00", "61.50", "+6.50", "12 val"))
    path.write_text("{")
    with pytest.raises(ClsaError, match="not a list of results"):
        append_records(path, [old])


def launch(
    run: Path, processes: int, protocols: tuple[str, ...], *more: str
) -> dict[tuple[str, ...], float]:
    """Run the command under torchrun; return every number, keyed by what it measures."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words += [str(Path(judging.__file__)), "evaluate", str(run), "--device", "cpu"]
    words += ["--workers", "0", "--leaks", "off", "--protocol", *protocols, *more]
    (run / "results.json").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=250,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("All records:") == 1
    records = read_records(run / "results.json")
    found = {(r.protocol, r.metric, r.chosen, r.encoder, r.data_digest): r.value for r in records}
    return found | {("n", str({r.n for r in records})): 0.0}


def test_two_processes_find_what_one_finds(run: Path, drawings: Path, tmp_path: Path) -> None:
    """60 pictures in chunks of 8, three of them unreadable: each process has some."""
    folder = tmp_path / "copy"
    for path in drawings.glob("*/*"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    for name in CLASSES:
        (folder / name / "0broken.png").write_bytes(b"not a picture")
    frozen_ones = ("knn-20", "knn-strong", "logistic", "linear-fast", "linear-clsa", "lowshot")
    more = ("--data", str(drawings), "--val", str(folder), "--change", "epochs=3", "batch_size=16")
    one, two = (launch(run, count, frozen_ones, *more) for count in (1, 2))
    assert one == two and len(one) > 30 and ("n", "{60}") in one


def test_two_processes_find_what_one_finds_on_voc07(run: Path, tmp_path: Path) -> None:
    devkit = voc_folder(tmp_path / "voc", {"train": 20, "val": 12, "test": 21})
    more = ("--data", str(devkit), "--change", "voc07-map.epochs=2", "voc07-map.batch_size=16")
    one, two = (launch(run, count, ("voc07-map", "voc07-svm"), *more) for count in (1, 2))
    assert one == two and ("n", "{21}") in one


def test_two_processes_fine_tune_as_one_does(run: Path) -> None:
    """Batch norm sums over the processes in another order, so the weights differ by rounding.

    The rates are low, because with few pictures high rates amplify rounding from step to step.
    """
    weights = []
    for count in (1, 2):
        changes = ("epochs=3", "batch_size=16", "lr=1e-5", "head_lr=1e-3")
        found = launch(run, count, ("finetune",), "--change", *changes)
        encoder = saved_encoder.load_encoder(run)
        head, _ = load_head(run, None, encoder)
        assert head.encoder is not None
        weights.append((found, head.layer.weight.detach(), *head.encoder.parameters()))
    (one, *first), (two, *second) = weights
    assert one.keys() == two.keys()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert max(abs(one[key] - two[key]) for key in one) <= 100 / 12 + 1e-9  # one of 12 pictures


def test_few_labels_follow_the_card_or_the_option(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def judged(**over: Any) -> list[Record]:
        options = {"run": run, "device": "cpu", "random": False, "leaks": "off", **over}
        return evaluate(EvaluateOptions(**{"change": ("epochs=2",), **options}))

    caplog.clear()
    judged(protocol=("knn-20", "semi-1", "semi-10"), leaks="auto")
    assert caplog.text.count("held out of the pretraining set") == 1
    semi = judged(protocol=("semi-1", "semi-10", "semi-10-clim"))
    assert {r.settings for r in semi} == {"epochs=2"}
    assert len({(r.protocol, r.data_digest) for r in semi}) == 3
    assert all(r.encoder_digest_after != r.encoder_digest for r in semi)
    share = judged(protocol=("semi-1",), labels="50%")
    assert {r.settings for r in share} == {"labels=50% epochs=2"}
    assert {r.data_digest for r in share}.isdisjoint({r.data_digest for r in semi})


def test_pictures_the_run_learned_from_are_reported(
    run: Path, drawings: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the evaluation pictures are copies of training pictures, compressed again."""
    folder = tmp_path / "judged"
    for place, path in enumerate(sorted(drawings.glob("*/*"))):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        if place % 2:
            image = ImageOps.mirror(image).rotate(15)
        image.save(folder / path.parent.name / f"{place:03}.jpg", quality=60)
    options = EvaluateOptions(
        run=run, data=DataOptions(val=str(folder)), protocol=("knn-20",), device="cpu"
    )
    records = evaluate(options)
    (leaked,) = {record.leaked for record in records}
    assert leaked is not None and 28 <= leaked <= 34
    assert f"{leaked} of 60 evaluation pictures were pretrained on" in caplog.text
    assert (run / "thumbnails.npy").exists()
    caplog.clear()
    off = evaluate(options.model_copy(update={"leaks": "off"}))
    assert {r.leaked for r in off} == {None} and not caplog.text
    assert [r.value for r in off] == [r.value for r in records]


def test_without_the_training_pictures_only_the_search_for_leaks_is_skipped(
    run: Path, drawings: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, facts = saved_encoder.load_encoder_facts(run)
    gone = facts.model_copy(update={"data": DataOptions(data="/nowhere/at/all")})
    saved_encoder.save_encoder(run / "encoder.safetensors", encoder, gone)
    data = DataOptions(data=str(drawings))
    records = evaluate(EvaluateOptions(run=run, data=data, protocol=("knn-20",), device="cpu"))
    assert {r.leaked for r in records} == {None}
    assert "cannot search for leaks" in caplog.text and "/nowhere/at/all" in caplog.text


def test_without_scikit_learn_the_extra_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    options = EvaluateOptions(run=run, protocol=("knn-20", "lowshot"), device="cpu")
    with pytest.raises(ClsaError, match=r"sklearn is not installed.*clsa\[evaluation\]"):
        evaluate(options)
    assert {r.protocol for r in read_records(run / "results.json")} == {"knn-20"}  # kept


def test_too_few_labels_are_reported_at_once(run: Path, drawings: Path, tmp_path: Path) -> None:
    name = next(iter(sorted(drawings.glob("flag/*")))).name
    (tmp_path / "one.txt").write_text(f"flag/{name}\n")
    for protocol in ("knn-20", "logistic", "linear-fast", "lowshot", "finetune"):
        options = EvaluateOptions(
            run=run, protocol=(protocol,), labels=str(tmp_path / "one.txt"), device="cpu"
        )
        with pytest.raises(ClsaError, match="labels of two classes or more"):
            evaluate(options)


def test_a_folder_that_cannot_be_written_is_reported_before_the_work(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise ClsaError("cannot write", "read-only", "choose another", Exit.CANNOT_WRITE)

    monkeypatch.setattr("clsa.system.files.write_text", refused)
    monkeypatch.setattr(subject_module, "extract", lambda *_: pytest.fail("began to work"))
    with pytest.raises(ClsaError, match="cannot write") as caught:
        evaluate(EvaluateOptions(run=run, device="cpu"))
    assert caught.value.code == Exit.CANNOT_WRITE


def test_results_of_an_earlier_version_are_reported(run: Path) -> None:
    (run / "results.json").write_text('[{"protocol": "knn", "metric": "top1", "value": 1.0}]')
    with pytest.raises(ClsaError, match="one of an earlier version") as caught:
        evaluate(EvaluateOptions(run=run, device="cpu"))
    assert caught.value.code == Exit.BAD_DATA


def test_processes_that_cannot_share_a_batch_are_told_what_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    with pytest.raises(ClsaError, match=r"batch of 16 .* 3 processes .*--change batch_size"):
        fitting(256, 19)
    assert fitting(9, 19) == 9

"""`clsa diagnose` on tiny runs: numbers that repeat, figures that open, what is left out."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from clsa.cli.main import main
from clsa.diagnose import diagnose as diagnose_module
from clsa.diagnose.diagnose import diagnose, table
from clsa.diagnose.figures import Curve, Spread, maps, neighbours, similarity, tsne
from clsa.diagnose.inputs import Finding, Inputs, spread_over
from clsa.evaluate.evaluate import evaluate
from clsa.learning.models import Network
from clsa.methods import build_method
from clsa.methods.method import Extent
from clsa.options.commands import DiagnoseOptions, EvaluateOptions
from clsa.options.config import merge
from clsa.options.run import DataOptions, RunOptions
from clsa.recipes import resolve
from clsa.runs import checkpoint, digests, saved_encoder
from clsa.runs.snapshots import kept_encoders, open_run
from clsa.system.errors import Exit
from clsa.training import start
from tests.support.pictures import clipart_folder
from tests.support.refusals import refusal

FIGURES = {
    "similarity", "neighbours", "classes", "tsne", "spread", "spectrum", "operations",
    "operations-divergence",
}  # fmt: skip
SMALL: dict[str, Any] = {
    "num_pictures": 20, "queries": 20, "bank": 40, "num_distorted": 6, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clipart_folder(tmp_path_factory.mktemp("drawings"), classes=3, each=16)


def pretrained(data: Path, out: Path, recipe: str, **over: Any) -> RunOptions:
    """A run of two epochs at 16 pixels."""
    tiny = {
        "recipe": recipe,
        "data": {"data": str(data), "workers": 0},
        "out": str(out),
        "batch_size": 16,
        "epochs": 2,
        "device": "cpu",
        "views": {"size": 16},
        "model": {"projector_hidden": 32, "norm_groups": 2},
    }
    options = resolve(merge(tiny, over))
    start.pretrain(options)
    return options


@pytest.fixture(scope="module")
def run(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "clsa"
    pretrained(drawings, out, "clsa-small", method={"queue_size": 32}, keep_every=1,
               views={"weak": {"sizes": (16,)}}, strong={"sizes": (16,)})  # fmt: skip
    return out


@pytest.fixture(scope="module")
def found(run: Path) -> tuple[list[Finding], Path, list[Path]]:
    return diagnose(DiagnoseOptions(run=run, **SMALL))


def by_name(findings: list[Finding]) -> dict[tuple[str, str, str], float]:
    return {(each.part, each.name, each.encoder): each.value for each in findings}


# ---- a whole run


def test_every_figure_is_a_picture(found: tuple[list[Finding], Path, list[Path]]) -> None:
    _, numbers, written = found
    assert {path.stem for path in written} == FIGURES
    assert {path.parent for path in written} == {numbers.parent}
    for path in written:
        with Image.open(path) as image:
            assert image.width > 500 and image.height > 300
            assert len(image.convert("RGB").resize((64, 64)).getcolors(1 << 24) or []) > 8


def test_numbers_are_written_with_what_they_depend_on(
    run: Path, found: tuple[list[Finding], Path, list[Path]]
) -> None:
    findings, numbers, _ = found
    facts = json.loads(numbers.read_text("utf-8"))
    assert numbers == run / "diagnostics" / "diagnostics.json"
    assert [Finding(**entry) for entry in facts["findings"]] == findings
    assert facts["temperature"] == 0.2 and facts["recipe"] == "clsa-small" and facts["step"] == 6
    found = {each.encoder: each.encoder_digest for each in findings}
    assert found["trained"] == digests.digest(saved_encoder.load_encoder(run).state_dict())
    random = Network(open_run(run).facts.model, seed=0).encoder
    assert found["random"] == digests.digest(random.state_dict())
    assert {"step 3"} == set(found) - {"random", "trained"}
    assert len(by_name(findings)) == len(findings)  # no name twice
    assert all(each.seed == 0 and each.n > 0 and each.data_digest for each in findings)
    assert all(np.isfinite(each.value) for each in findings)


def test_the_same_command_gives_the_same_numbers(
    run: Path, found: tuple[list[Finding], Path, list[Path]], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = DiagnoseOptions(run=run, out=tmp_path / "again", only=("similarity",), **SMALL)
    again, numbers, written = diagnose(options)
    assert again == [each for each in found[0] if each.part == "similarity"]
    assert numbers.parent == tmp_path / "again"
    assert written[0].read_bytes() == (run / "diagnostics" / "similarity.png").read_bytes()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    other = diagnose(options.model_copy(update={"seed": 1}))[0]
    assert by_name(other) != by_name(again)


def test_positives_by_a_slow_loop(run: Path, found: tuple[list[Finding], Path, list[Path]]) -> None:
    """Compute P+ again from the same views, one query at a time."""
    inputs = Inputs(DiagnoseOptions(run=run, **SMALL))
    trained, specs = inputs.snapshots[1], inputs.specs()
    assert trained.query is not None and trained.key is not None
    rows = spread_over(48, 41)
    with torch.no_grad():
        trained.query.eval()
        trained.key.eval()
        _, (bank,) = inputs.encoded(specs["key"], rows, [trained.key])
        places = spread_over(41, 20)
        _, (asked,) = inputs.encoded(specs["strong"], rows[places], [trained.query])
    shares = []
    for query, own in zip(asked.double(), places, strict=True):
        weights = [float(torch.exp(query @ key / 0.2)) for key in bank.double()]
        shares.append(weights[own] / sum(weights))
    values = by_name(found[0])
    assert values["similarity", "P+ strong mean", "trained"] == pytest.approx(
        np.mean(shares), rel=1e-5
    )


def test_nearest_neighbours_are_those_of_evaluate(
    run: Path, drawings: Path, tmp_path: Path
) -> None:
    options = DiagnoseOptions(run=run, out=tmp_path, only=("neighbours",), **SMALL)
    values = by_name(diagnose(options)[0])
    judged = evaluate(EvaluateOptions(run=run, protocol=("knn-20", "knn-strong"), device="cpu"))
    for record in judged:
        if record.metric == "top1":
            kind = "strong" if record.protocol.endswith("strong") else "clean"
            assert values["neighbours", f"20-NN {kind}", record.encoder] == record.value


def test_views_use_the_runs_options_but_separate_draws(run: Path) -> None:
    specs = Inputs(DiagnoseOptions(run=run, **SMALL)).specs()
    assert {name: spec.size for name, spec in specs.items()} == {
        "key": 16, "weak": 16, "strong": 16,
    }  # fmt: skip
    assert specs["strong"].ops.rounds == 5 and specs["weak"].ops.rounds == 0
    assert len({spec.view for spec in specs.values()}) == 3


def test_checkpoints_are_opened_oldest_first(run: Path) -> None:
    options = open_run(run).options
    assert options is not None
    assert [name for name, _ in kept_encoders(run, options)] == ["step 3", "step 6"]


def test_key_network_is_loaded_separately_from_the_query_network(run: Path) -> None:
    random, trained = open_run(run).snapshots
    assert random.key is random.query and trained.key is not trained.query
    state = checkpoint.load_newest(run / "checkpoints")
    assert state is not None and trained.key is not None
    saved = state.state["method"]["base.key_network.projector.0.weight"]
    assert torch.equal(trained.key.projector[0].get_parameter("weight"), saved)


# ---- other methods


@pytest.mark.parametrize(
    ("recipe", "over", "temperature", "own_keys"),
    [
        ("simclr-small", {}, 0.2, False),
        ("swav-small", {"views": {"local": {"sizes": ()}}}, 0.1, False),
        ("dino-resnet-small", {"views": {"local": {"sizes": ()}}}, 0.1, True),
        ("byol-small", {"method": {"queue_size": 32}}, 0.2, True),
        ("supervised-small", {}, 0.2, False),
    ],
)
def test_methods_without_keys_without_bank_and_with_labels(
    recipe: str, over: dict, temperature: float, own_keys: bool, drawings: Path, tmp_path: Path
) -> None:
    pretrained(drawings, tmp_path / "run", recipe, **merge({"epochs": 1}, over))
    trained = open_run(tmp_path / "run").snapshots[1]
    assert (trained.key is not trained.query) == own_keys
    options = DiagnoseOptions(run=tmp_path / "run", only=("similarity", "spread"), **SMALL)
    findings, numbers, written = diagnose(options)
    assert json.loads(numbers.read_text("utf-8"))["temperature"] == temperature
    assert all(np.isfinite(each.value) for each in findings)
    assert [path.stem for path in written] == ["similarity", "spread", "spectrum"]


@pytest.mark.parametrize(
    ("recipe", "over", "prefix"),
    [
        ("continual-small", {"stages": ["classes:3"], "stronger": True}, "base.base."),
        ("continual-small", {"stages": ["classes:3"]}, "base."),
        ("clim-small", {"mixture": {"num_clusters": 4}}, "base."),
        ("moco-v2-small", {}, ""),
    ],
)
def test_networks_are_those_of_the_innermost_method(
    recipe: str, over: dict, prefix: str, drawings: Path, tmp_path: Path
) -> None:
    """For example, the teacher of continual pretraining must not be taken."""
    small = {
        "recipe": recipe,
        "out": str(tmp_path),
        "data": {"data": str(drawings)},
        "views": {"size": 16},
        "strong": {"sizes": (16,)},
    }
    options = resolve(merge(small, over))
    method = build_method(options, Extent(48, 3, 1, 1, np.zeros(48, np.int64)))
    state = method.state_dict()
    for name in state:
        if state[name].is_floating_point():
            state[name] = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(7))
            if name.startswith(prefix + "key_network."):
                state[name] += 1
    (tmp_path / "config.yaml").write_text(options.to_yaml())
    saved = {"method": state, "step": 1, "data_digest": ""}
    checkpoint.save(tmp_path / "checkpoints", "step-000001", saved, {"step": 1})
    _, trained = open_run(tmp_path).snapshots
    assert trained.query is not None and trained.key is not None
    for network, name in ((trained.query, "network"), (trained.key, "key_network")):
        for key, value in network.state_dict().items():
            assert torch.equal(value, state[f"{prefix}{name}.{key}"])


# ---- what is left out, and what is refused


def test_an_encoder_alone_is_diagnosed_by_its_features(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = DiagnoseOptions(run=run / "encoder.safetensors", out=tmp_path, **SMALL)
    findings, _, written = diagnose(options)
    assert {path.stem for path in written} == FIGURES - {"similarity"}
    assert "left out: similarity (" in capsys.readouterr().err
    assert not any("projections" in each.name for each in findings)
    text, code = refusal(lambda: diagnose(options.model_copy(update={"only": ("similarity",)})))
    assert "give the run folder" in text and code == Exit.NO_INPUT


def test_without_labels_the_parts_that_need_them_are_left_out(
    run: Path,
    drawings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = {name: part for name, part in diagnose_module.PARTS.items() if name != "operations"}
    monkeypatch.setattr(diagnose_module, "PARTS", parts)
    flat = DataOptions(data=str(sorted(drawings.iterdir())[0]))
    options = DiagnoseOptions(run=run, data=flat, out=tmp_path, **SMALL)
    findings, _, written = diagnose(options)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in told] == [
        "left out: neighbours", "left out: classes",
    ]  # fmt: skip
    assert {path.stem for path in written} == {"similarity", "spread", "spectrum"}
    assert {each.n for each in findings if each.part == "similarity"} == {16}
    text, code = refusal(lambda: diagnose(options.model_copy(update={"only": ("classes",)})))
    assert "labels" in text and code == Exit.BAD_DATA


def test_without_matplotlib_the_numbers_are_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = DiagnoseOptions(run=run, out=tmp_path, only=("spread",), **SMALL)
    findings, numbers, written = diagnose(options)
    assert findings and not written and [path.name for path in tmp_path.iterdir()] == [numbers.name]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and 'pip install "clsa[plots]"' in told


def test_mistakes_end_in_one_line(run: Path, drawings: Path, tmp_path: Path) -> None:
    text, code = refusal(lambda: diagnose(DiagnoseOptions(run=tmp_path / "none", **SMALL)))
    assert code == Exit.NO_INPUT
    folder = clipart_folder(tmp_path / "two", classes=1, each=2)
    few = DiagnoseOptions(run=run, data=DataOptions(data=str(folder)), out=tmp_path / "x", **SMALL)
    text, code = refusal(lambda: diagnose(few))
    assert "2 of its pictures can be read" in text and code == Exit.BAD_DATA
    (tmp_path / "file").write_text("")
    taken = DiagnoseOptions(run=run, out=tmp_path / "file" / "x", only=("spread",), **SMALL)
    assert refusal(lambda: diagnose(taken))[1] == Exit.CANNOT_WRITE


def test_a_config_that_does_not_match_the_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    (copied / "checkpoints").mkdir(parents=True)
    text = (run / "config.yaml").read_text("utf-8")
    assert "projector_hidden: 32" in text
    (copied / "config.yaml").write_text(text.replace("projector_hidden: 32", "projector_hidden: 8"))
    for path in (run / "checkpoints").glob("step-000006.*"):
        (copied / "checkpoints" / path.name).write_bytes(path.read_bytes())
    text, code = refusal(lambda: open_run(copied))
    assert "config.yaml" in text and code == Exit.BAD_DATA


def test_the_command_prints_a_table_and_the_names_of_figures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    args = ["diagnose", str(run), "--out", str(tmp_path), "--only", "spread", *small]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "RankMe of features" in out and "good is" in out and "20-NN" not in out
    assert "Figures: spread.png, spectrum.png" in out.replace("\n", " ")


def test_the_table_has_a_row_for_each_number(
    found: tuple[list[Finding], Path, list[Path]],
) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(table(found[0]))
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert text.count("\n") == 4 + 19  # every number of SHOWN was found


# ---- figures


def test_figures_accept_unusual_values() -> None:
    same = np.full(5, 0.25)
    curve = Curve("random", same, same)
    wide = Curve("trained", np.geomspace(1e-7, 2e-6, 5), np.geomspace(1e-6, 1, 5))
    assert similarity([wide], [wide], 3, "").startswith(b"\x89PNG")
    assert similarity([curve], [Curve("random", 0 * same, 0 * same)], 3, "").startswith(b"\x89PNG")
    assert neighbours({"random": (0.0, 0.0)}, "").startswith(b"\x89PNG")
    places = {"trained": np.arange(8.0).reshape(4, 2)}
    assert maps(places, np.array([-1, -1, 0, -1]), ["only"], "").startswith(b"\x89PNG")
    assert Spread("random features", 0.0, 0.0, 1.0, 2).width == 2


def test_tsne_repeats_and_keeps_groups_together() -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(2, 6)).repeat(15, 0)
    features = 10 * centres + 0.1 * generator.normal(size=(30, 6))
    places = tsne(features, 0)
    assert np.array_equal(places, tsne(features, 0)) and places.shape == (30, 2)
    middle = places[:15].mean(0), places[15:].mean(0)
    nearer = np.linalg.norm(places - middle[0], axis=1) < np.linalg.norm(places - middle[1], axis=1)
    assert nearer[:15].all() and not nearer[15:].any()


def test_spread_numbers_are_distinct() -> None:
    assert spread_over(10, 20).tolist() == list(range(10))
    chosen = spread_over(1000, 7)
    assert len(np.unique(chosen)) == 7 and chosen[0] == 0 and chosen[-1] == 999

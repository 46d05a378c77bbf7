"""Grids: the cells that a file's axes give, folder names, and what is refused before any run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from clsa.options.commands import SweepOptions
from clsa.options.config import flatten
from clsa.recipes import RECIPES
from clsa.runs.folder import FREE
from clsa.sweeps.grid import (
    PRESETS,
    Grid,
    cells_of,
    names_of,
    nested,
    read_grid,
    require_same,
    words,
)
from clsa.system.errors import Exit
from tests.support.refusals import refusal

OUT = Path("runs") / "s"


def grid_of(axes: dict[str, Any], **over: Any) -> Grid:
    base = {"recipe": "clsa-small", "data.data": "clipart"}
    return Grid.parse({"name": "s", "base": base, "grid": axes, **over}, "s.yaml")


def refused(axes: dict[str, Any], **over: Any) -> str:
    text, code = refusal(lambda: cells_of(grid_of(axes, **over), OUT))
    assert code == Exit.USAGE
    return text


def test_cells_are_the_product_of_the_axes_seed_by_seed() -> None:
    axes = {
        "strong.rounds": [3, 5],
        "method": {
            "MoCo v2": {"recipe": "moco-v2-small"},
            "two": {"stronger": False, "views": {"weak.sizes": [32, 28]}, "optim.lr": 0.5},
        },
    }
    cells = cells_of(grid_of(axes, seeds=[4, 9]), OUT)
    assert [str(cell) for cell in cells] == [
        f"strong.rounds={rounds} method={method} seed={seed}"
        for seed in (4, 9)
        for rounds in (3, 5)
        for method in ("MoCo v2", "two")
    ]
    assert len({cell.options.out for cell in cells}) == 8
    last = cells[-1]
    assert last.row == {"strong.rounds": "5", "method": "two"}
    assert last.options.out == OUT / "strong.rounds-5_method-two_seed-9"
    assert (last.options.recipe, last.options.stronger, last.options.seed) == (
        "clsa-small",
        False,
        9,
    )
    assert last.options.views.weak.sizes == (32, 28) and last.options.optim.lr == 0.5
    assert (last.options.strong.rounds, last.options.data.data) == (5, "clipart")
    first = cells[0].options
    assert (first.recipe, first.strong.rounds, first.optim.lr) == ("moco-v2-small", 3, 0.06)


def test_dotted_names_and_groups_mean_the_same() -> None:
    given = {
        "views.weak": {"ops.rounds": 2},
        "views": {"size": 16, "weak": {"blur": 0.0}},
        "a.b": [],
    }
    assert nested(given) == {
        "views": {"size": 16, "weak": {"ops": {"rounds": 2}, "blur": 0.0}},
        "a": {"b": []},
    }


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (True, "true"), (None, "null"), (0.1, "0.1"), ([32, 28], "32,28"), ([], "none"), ("", "''"),
        (" a\n\x1b[1m b ", "a [1m b"), ({"a": 1}, '{"a": 1}'),
    ],
)  # fmt: skip
def test_values_as_text(value: Any, told: str) -> None:
    assert words(value) == told


def test_folder_names_survive_odd_labels() -> None:
    labels = [
        "a/b",
        "a b",
        "A-B",
        "../..",
        "",
        "方法",
        "法",
        ".",
        "x" * 300,
        "x" * 299,
        "nul\0",
        "-rf",
    ]
    rows = [{"method": label} for label in labels]
    names = names_of(rows)
    assert len({name.casefold() for name in names}) == len(labels)
    for name in names:
        assert name.isascii() and name.replace("-", "").replace(".", "").isalnum(), name
        assert name[0] not in "-." and len(name) < 200
    assert names_of([{"strong.rounds": "3", "method": "MoCo v2"}]) == [
        "strong.rounds-3_method-MoCo-v2"
    ]
    assert names_of(rows) == names  # depends on the row alone, so it is the same at every start


TWICE = {"strong.rounds": [3, 5], "a": {"b": {"strong": {"rounds": 7}}}}
SAME = {"a": {"b": {"stronger": True}, "c": {"optim.lr": 0.06}}}


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"strong.round": [3]}, "s: strong.round=3: strong.round - no such setting - did you mean"),
        ({"strong.rounds": [3, 50]}, "s: strong.rounds=50: strong.rounds - "),
        ({"strong.rounds": [3, "5 "]}, "expected int, got '5 '"),
        ({"recipe": ["clsa-smal"]}, "recipe clsa-smal - no such recipe - did you mean clsa-small?"),
        ({"a": {"b": {"method": {"queue_sise": 3}}}}, "did you mean method.queue_size?"),
        ({}, "s: grid - there are none"),
        ({"strong.rounds": []}, "s: grid: strong.rounds - no values"),
        ({"a": {}}, "s: grid: a - no values"),
        ({"strong.rounds": [3, 3]}, "s: grid: strong.rounds - a value appears twice"),
        ({"strong.rounds": 3}, "s: grid: strong.rounds - not an axis"),
        ({"a": {"b": 3}}, "s: grid: a - not an axis"),
        ({"a": {"b": None}}, "s: grid: a - not an axis"),
        (TWICE, "s: a: strong.rounds - the axis strong.rounds sets it too"),
        ({"seed": [1, 2]}, "s: seed: seed - the sweep itself sets it - use seeds"),
        ({"a": {"b": {"out": "x"}}}, "s: a: out - the sweep itself sets it - use --out"),
        (SAME, "s: a=c seed=0 - the same run as a=b seed=0"),
        ({"recipe": ["clsa-small", "clsa-official-small"]}, "the same run as recipe=clsa-small"),
    ],
)
def test_refused_before_any_run(axes: dict[str, Any], words: str) -> None:
    assert words in refused(axes)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"seeds": []}, "s: seeds - there are none"),
        ({"seeds": [1, 1]}, "s: seeds - one appears twice"),
        ({"protocol": []}, "s: protocol - there are none"),
        ({"protocol": ["voc07-map"]}, "s: protocol voc07-map - it needs VOC's or COCO's folders"),
        ({"base": {"seed": 3}}, "s: base: seed - the sweep itself sets it"),
        ({"base": {"optim": {"lr": -1}}}, "optim.lr - Input should be greater than 0"),
    ],
)
def test_the_rest_of_the_file_is_checked_too(over: dict[str, Any], words: str) -> None:
    assert words in refused({"strong.rounds": [3, 5]}, **over)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gird: {}", "no such setting - did you mean grid?"),
        ("seeds: [a]", "expected int"),
        ("protocol: [20nn]", "protocol.0"),
        ("grid: [1]", "grid"),
        ("grid: {a: [1], a: [2]}", "line 1: a appears twice"),
        ("[]", "holds no"),
    ],
)
def test_files_that_are_not_grids_are_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    told, code = refusal(lambda: read_grid(SweepOptions(sweep=str(path))))
    assert words in told and str(path) in told and code == Exit.USAGE


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tabel7", "no such file or preset - did you mean table7?"),
        ("qqqq", "give a file, or augmentation-strength, clim"),
        ("nowhere.yaml", "No such file"),
    ],
)
def test_a_name_that_is_neither_file_nor_preset_is_refused(name: str, words: str) -> None:
    told, code = refusal(lambda: read_grid(SweepOptions(sweep=name)))
    assert words in told and code == Exit.NO_INPUT


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = {
        "base": {"epochs": 9, "data": {"data": "x", "workers": 0}},
        "grid": {"strong.rounds": [3]},
    }
    path.write_text(yaml.safe_dump(text))
    grid = read_grid(SweepOptions(sweep=str(path)))
    assert (grid.name, grid.seeds, grid.protocol) == ("mine", (0,), ("knn-20", "knn-strong"))
    asked = SweepOptions(
        sweep=str(path), data="clipart", seeds=(3, 4), epochs=2, max_minutes=1.5, device="cpu",
        protocol=("logistic",),
    )  # fmt: skip
    grid = read_grid(asked)
    (first, _) = cells_of(grid, OUT)
    options = first.options
    assert (options.data.data, options.data.workers, options.epochs) == ("clipart", 0, 2)
    assert (options.max_minutes, options.device, options.seed) == (1.5, "cpu", 3)
    assert grid.protocol == ("logistic",)
    again = tmp_path / "sweep.yaml"  # a sweep can be started from the file that it writes
    again.write_text(grid.to_yaml())
    assert cells_of(read_grid(SweepOptions(sweep=str(again))), OUT) == cells_of(grid, OUT)


def test_the_command_line_cannot_give_what_an_axis_varies(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("grid: {length: {short: {epochs: 2}, long: {epochs: 4}}}")
    told, code = refusal(lambda: read_grid(SweepOptions(sweep=str(path), epochs=3)))
    assert told.startswith("--epochs - the axis length sets it") and code == Exit.USAGE


def test_only_the_same_rows_may_share_a_folder() -> None:
    free = FREE - {"recipe"}
    before = grid_of({"strong.rounds": [3, 5]})
    same = grid_of(
        {"strong.rounds": [3, 5]}, seeds=[0, 1], protocol=["logistic"],
        base={"recipe": "clsa-small", "data": {"data": "elsewhere"}, "max_minutes": 1.0},
    )  # fmt: skip
    require_same(before, same, free, OUT)
    for other in (
        grid_of({"strong.rounds": [3, 7]}),
        grid_of({"strong.probability": [0.3, 0.5]}),
        grid_of({"strong.rounds": [3, 5]}, base={"recipe": "clsa-small", "epochs": 3}),
        grid_of({"strong.rounds": [3, 5]}, base={"recipe": "clsa-paper-small"}),
    ):
        told, code = refusal(lambda other=other: require_same(before, other, free, OUT))
        assert "holds another sweep" in told and code == Exit.USAGE


SIZES = {
    "augmentation-strength": (10, 3),
    "clim": (2, 3),
    "clim-alpha": (4, 3),
    "clim-clusters": (9, 3),
    "clim-mixing": (3, 3),
    "clim-resolution": (3, 3),
    "clim-selection": (10, 3),
    "continual": (3, 3),
    "head-depth": (4, 3),
    "methods": (26, 1),
    "num-negatives": (4, 3),
    "suncet": (2, 3),
    "table5": (5, 3),
    "table7": (3, 3),
}


def test_every_preset_is_known_to_the_command_and_to_the_page() -> None:
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text("utf-8")
    assert names == sorted(SIZES)
    for name in names:
        rows, seeds = SIZES[name]
        assert f"| `{name}` | {rows} x {seeds} |" in page, name


@pytest.mark.parametrize("name", SIZES)
def test_presets_resolve_to_their_documented_sizes(name: str) -> None:
    grid = read_grid(SweepOptions(sweep=name))
    cells = cells_of(grid, OUT)
    rows, seeds = SIZES[name]
    assert grid.name == name and grid.about.startswith(
        ("CLSA's", "CLIM's", "Good practices", "Does", "Continual")
    )
    assert len(grid.seeds) == seeds and len(cells) == rows * seeds
    assert all(cell.options.data.data == "clipart" for cell in cells)
    assert all(cell.options.recipe.endswith("-small") for cell in cells)
    # Equal pictures seen. With stages, an epoch of a later stage also goes through the exemplars.
    assert len({cell.options.epochs for cell in cells}) == (2 if name == "continual" else 1)
    assert len({cell.options.batch_size for cell in cells}) == 1


def varied(name: str) -> dict[str, set[Any]]:
    """Options that differ between a preset's cells of the first seed, with their values."""
    cells = cells_of(read_grid(SweepOptions(sweep=name, seeds=(0,))), OUT)
    found = [flatten(cell.options) for cell in cells]
    names = set().union(*found) - {"out"}
    values = {key: {options.get(key) for options in found} for key in names}
    return {key: value for key, value in values.items() if len(value) > 1}


def test_presets_vary_exactly_the_options_of_their_question() -> None:
    assert varied("table7") == {"strong.rounds": {3, 5, 7}}
    assert varied("clim-alpha") == {"mixture.alpha": {1.0, 1.5, 2.0, 2.5}}
    assert varied("clim-clusters") == {
        "mixture.num_clusters": {23, 46, 92}, "mixture.neighbours": {10, 20, 40},
    }  # fmt: skip
    assert varied("continual") == {
        "continual.keep": {"nothing", "replay", "distill"}, "epochs": {25, 40},
    }  # fmt: skip
    assert varied("head-depth") == {"model.projector_layers": {0, 1, 2, 3}}
    assert varied("num-negatives") == {"method.queue_size": {256, 1024, 4096, 16384}}
    assert varied("table5") == {
        "recipe": {f"{x}-small" for x in ("moco-v2", "moco-strong-query", "moco-strong-query-key",
                                          "clsa-contrastive", "clsa")},
        "stronger": {False, True},
        "method.strong_query": {False, True},
        "method.strong_key": {False, True},
        "strong.target": {"query", "one-hot"},
    }  # fmt: skip


def test_preset_methods_has_every_method_with_and_without_the_divergence() -> None:
    cells = cells_of(read_grid(SweepOptions(sweep="methods")), OUT)
    assert {cell.options.stronger for cell in cells[::2]} == {False}
    assert {cell.options.stronger for cell in cells[1::2]} == {True}
    assert {cell.options.recipe for cell in cells} <= set(RECIPES)
    from clsa.options.methods import KINDS

    assert {cell.options.method.name for cell in cells} == set(KINDS)

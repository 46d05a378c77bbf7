"""Recipes: the table of the documentation, value by value, and what wins over what."""

from pathlib import Path
from typing import Any

import pytest

from clsa.cli import main
from clsa.config import flatten, merge, read_yaml
from clsa.errors import ClsaError, Exit
from clsa.options import RunOptions
from clsa.recipes import FULL, NAMES, overrides_of, resolve

FIVE, FIVE_SMALL = (224, 192, 160, 128, 96), (32, 28, 24, 20, 16)
# recipe: method, weak sizes, strong sizes, pool, bank; the sizes of the -small form after them
TABLE: dict[str, tuple[Any, ...]] = {
    "moco-v1": ("moco", (224,), (), None, "queue", (32,), ()),
    "moco-v2": ("moco", (224,), (), None, "queue", (32,), ()),
    "moco-multi": ("moco", FIVE, (), None, "batch+queue", FIVE_SMALL, ()),
    "clsa-paper": ("clsa", (224,), (96,), "paper", "queue", (32,), (32,)),
    "clsa-official": ("clsa", (224,), (96,), "official", "batch+queue", (32,), (32,)),
    "clsa": ("clsa", (224,), (96,), "official", "batch+queue", (32,), (32,)),
    "clsa-multi-paper": ("clsa", (224,), FIVE, "paper", "queue", (32,), FIVE_SMALL),
    "clsa-multi": ("clsa", FIVE, FIVE, "official", "batch+queue", FIVE_SMALL, FIVE_SMALL),
    "moco-strong-query": ("moco", (224,), (), "official", "queue", (32,), ()),
    "moco-strong-query-key": ("moco", (224,), (), "official", "queue", (32,), ()),
    "clsa-contrastive": ("clsa", (224,), (96,), "official", "batch+queue", (32,), (32,)),
}


def test_the_table_names_every_recipe() -> None:
    assert list(FULL) == list(TABLE)
    assert [*TABLE, *(f"{name}-small" for name in TABLE)] == NAMES


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_recipe_table(name: str, small: bool) -> None:
    method, weak, strong, pool, bank, small_weak, small_strong = TABLE[name]
    options = resolve({"recipe": f"{name}-small" if small else name})
    assert options.recipe == (f"{name}-small" if small else name)
    assert options.method.name == method and options.method.bank == bank
    assert options.views.weak.sizes == (small_weak if small else weak)
    assert options.views.strong.sizes == (small_strong if small else strong)
    assert pool is None or options.views.strong.pool == pool
    assert options.method.reduce == "sum" and options.method.beta == 1
    assert (options.views.strong.rounds, options.views.strong.probability) == (5, 0.5)
    assert options.method.strong_query == ("strong-query" in name)
    assert options.method.strong_key == ("query-key" in name)
    assert options.method.target == ("one-hot" if name == "clsa-contrastive" else "query")
    temperature = 0.07 if name == "moco-v1" else 0.2
    assert options.method.temperature == temperature
    assert options.method.strong_temperature == options.method.target_temperature == 0.2


@pytest.mark.parametrize("name", TABLE)
def test_full_recipes_train_as_the_official_code_does(name: str) -> None:
    options = resolve({"recipe": name})
    assert (options.epochs, options.batch_size) == (200, 256)
    assert (options.views.size, options.views.scale) == (224, (0.2, 1.0))
    assert (options.model.encoder, options.model.projector_dim) == ("resnet50", 128)
    assert (options.method.queue_size, options.method.key_momentum) == (65536, 0.999)
    assert (options.optim.name, options.optim.lr, options.optim.momentum) == ("sgd", 0.03, 0.9)
    assert (options.optim.weight_decay, options.optim.warmup_epochs) == (1e-4, 0)
    v1 = name == "moco-v1"
    assert options.optim.schedule == ("step" if v1 else "cosine-epoch")
    assert options.model.projector_layers == (1 if v1 else 2)
    assert options.views.weak.blur == (0.0 if v1 else 0.5)
    assert options.views.weak.jitter == ((0.4,) * 4 if v1 else (0.4, 0.4, 0.4, 0.1))
    assert options.views.weak.jitter_probability == (1.0 if v1 else 0.8)


@pytest.mark.parametrize("name", TABLE)
def test_small_recipes_differ_in_size_and_optimiser_only(name: str) -> None:
    full, small = (flatten(resolve({"recipe": n})) for n in (name, f"{name}-small"))
    assert {key: small[key] for key in small if small[key] != full[key]} == {
        "recipe": f"{name}-small",
        "epochs": 20,
        "views.size": 32,
        "views.eval_crop": 1.0,
        "views.weak.sizes": TABLE[name][5],
        "model.encoder": "resnet10-w32",
        "model.projector_hidden": 256,
        "method.queue_size": 4096,
        "method.key_momentum": 0.99,
        "optim.lr": 0.06,
        "optim.weight_decay": 5e-4,
        **({"views.strong.sizes": TABLE[name][6]} if TABLE[name][2] else {}),
        **({} if name == "moco-v1" else {"views.weak.blur": 0.0, "optim.schedule": "cosine"}),
    }


@pytest.mark.parametrize("form", ["", "-small"])
def test_clsa_is_clsa_official_until_there_is_evidence(form: str) -> None:
    a, b = resolve({"recipe": f"clsa{form}"}), resolve({"recipe": f"clsa-official{form}"})
    assert a.model_copy(update={"recipe": b.recipe}) == b


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("clsa-offical", "did you mean clsa-official?"),
        ("moco-v2-smal", "did you mean moco-v2-small?"),
        ("clsa-small-small", "did you mean clsa-small?"),
        ("xyzzy", "`clsa recipes` lists them"),
    ],
)
def test_unknown_recipes_are_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ClsaError) as caught:
        overrides_of(name)
    assert str(caught.value) == f"recipe {name} - no such recipe - {hint}"
    assert caught.value.code == Exit.USAGE


def test_a_recipe_can_be_asked_for_twice_and_gives_the_same() -> None:
    first = overrides_of("clsa-multi")
    merge(first, {"views": {"strong": {"pool": "paper"}}})
    assert overrides_of("clsa-multi") == first


def test_every_recipe_says_what_it_is() -> None:
    for recipe in FULL.values():
        first, _, rest = (recipe.__doc__ or "").partition("\n")
        assert len(first) > 30 and first.endswith(".")
        assert not rest or "not measured here" in rest.lower()  # or says where it was


# ---- precedence: defaults < recipe < --config < flags


def test_given_values_win_over_the_recipe_and_the_recipe_over_defaults() -> None:
    options = resolve({"recipe": "clsa-paper-small", "method": {"queue_size": 77}})
    assert options.method.queue_size == 77  # given
    assert options.method.bank == "queue"  # recipe
    assert options.method.key_momentum == 0.99  # -small
    assert options.batch_size == RunOptions.model_fields["batch_size"].default


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Options that a `clsa pretrain` command line would run."""
    seen: list[RunOptions] = []

    def run(options: RunOptions) -> Path:
        seen.append(options)
        return options.out

    monkeypatch.setattr("clsa.train.pretrain", run)

    def parse(*args: object) -> RunOptions:
        assert main(["pretrain", *map(str, args)]) == 0
        return seen.pop()

    return parse


def test_flags_win_over_the_file_which_wins_over_the_recipe(parsed: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("recipe: clsa-paper-small\nepochs: 7\nbatch_size: 16\noptim: {lr: 1e-3}\n")
    options = parsed("--config", file, "--batch-size", 64, "--optim.momentum=0.5")
    assert options.recipe == "clsa-paper-small" and options.method.bank == "queue"
    assert (options.epochs, options.batch_size) == (7, 64)
    assert (options.optim.lr, options.optim.momentum) == (1e-3, 0.5)
    assert options.optim.weight_decay == 5e-4
    options = parsed("--recipe=moco-v2-small", "--config", file)
    assert options.recipe == "moco-v2-small" and options.method.name == "moco"
    assert options.epochs == 7 and options.views.strong.sizes == ()


def test_the_last_of_repeated_flags_wins_as_everywhere(parsed: Any, tmp_path: Path) -> None:
    options = parsed("--recipe", "moco-v2-small", "--recipe", "clsa-small", "--seed", 1, "--seed=2")
    assert (options.recipe, options.method.name, options.seed) == ("clsa-small", "clsa", 2)
    assert options == resolve({"seed": 2})


def test_a_runs_config_yaml_is_a_config_file(parsed: Any, tmp_path: Path) -> None:
    before = resolve({"recipe": "clsa-multi-small", "optim": {"lr": 0.5}, "data": {"data": "x"}})
    file = tmp_path / "config.yaml"
    file.write_text(before.to_yaml())
    assert parsed("--config", file).model_copy(update={"config": None}) == before
    assert read_yaml(file)["recipe"] == "clsa-multi-small"


def test_no_command_line_at_all_is_the_default_recipe(parsed: Any) -> None:
    assert parsed() == resolve({}) == resolve({"recipe": "clsa-small"})

"""Recipes: every value in the tables of the documentation, and the order of precedence."""

from pathlib import Path
from typing import Any

import pytest

from clsa.cli.main import main
from clsa.options.config import flatten, merge, read_yaml
from clsa.options.methods import KINDS
from clsa.options.run import RunOptions
from clsa.recipes import RECIPES, describe_recipe, overrides_of, resolve
from clsa.recipes.cifar import CIFAR
from clsa.recipes.imagenet import IMAGENET
from clsa.system.errors import ClsaError, Exit

FIVE, FIVE_SMALL = (224, 192, 160, 128, 96), (32, 28, 24, 20, 16)
# recipe: stronger, weak sizes, strong sizes, pool, bank; then both sizes in the -small form
TABLE: dict[str, tuple[Any, ...]] = {
    "moco-v1": (False, (224,), (96,), "official", "queue", (32,), (32,)),
    "moco-v2": (False, (224,), (96,), "official", "queue", (32,), (32,)),
    "moco-multi": (False, FIVE, (96,), "official", "batch+queue", FIVE_SMALL, (32,)),
    "clsa-paper": (True, (224,), (96,), "paper", "queue", (32,), (32,)),
    "clsa-official": (True, (224,), (96,), "official", "batch+queue", (32,), (32,)),
    "clsa": (True, (224,), (96,), "official", "batch+queue", (32,), (32,)),
    "clsa-multi-paper": (True, (224,), FIVE, "paper", "queue", (32,), FIVE_SMALL),
    "clsa-multi": (True, FIVE, FIVE, "official", "batch+queue", FIVE_SMALL, FIVE_SMALL),
    "moco-strong-query": (False, (224,), (96,), "official", "queue", (32,), (32,)),
    "moco-strong-query-key": (False, (224,), (96,), "official", "queue", (32,), (32,)),
    "clsa-contrastive": (True, (224,), (96,), "official", "batch+queue", (32,), (32,)),
}


def method_of(options: RunOptions, name: str) -> Any:
    return getattr(options.method, name)


def test_every_recipe_resolves_and_every_method_has_all_sizes() -> None:
    for name in RECIPES:
        assert resolve({"recipe": name}).recipe == name
    for form in ("", "-small"):
        names = {resolve({"recipe": f"{name}{form}"}).method.name for name in IMAGENET}
        assert names == set(KINDS)
    assert {resolve({"recipe": f"{name}-small"}).views.size for name in IMAGENET} == {32}
    encoders = {resolve({"recipe": f"{name}-cifar"}).model.encoder for name in CIFAR}
    assert encoders == {"resnet18"}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_recipe_table(name: str, small: bool) -> None:
    stronger, weak, strong, pool, bank, small_weak, small_strong = TABLE[name]
    options = resolve({"recipe": f"{name}-small" if small else name})
    assert options.stronger == stronger and options.method.name == "moco"
    assert method_of(options, "bank") == bank
    assert options.views.weak.sizes == (small_weak if small else weak)
    assert options.strong.sizes == (small_strong if small else strong)
    assert options.strong.pool == pool
    assert method_of(options, "reduce") == options.strong.reduce == "sum"
    assert options.strong.beta == 1
    assert (options.strong.rounds, options.strong.probability) == (5, 0.5)
    assert method_of(options, "strong_query") == ("strong-query" in name)
    assert method_of(options, "strong_key") == ("query-key" in name)
    assert options.strong.target == ("one-hot" if name == "clsa-contrastive" else "query")
    temperature = 0.07 if name == "moco-v1" else 0.2
    assert method_of(options, "temperature") == temperature
    assert options.strong.temperature == options.strong.target_temperature == 0.2


@pytest.mark.parametrize("name", TABLE)
def test_full_recipes_train_as_the_official_code_does(name: str) -> None:
    options = resolve({"recipe": name})
    assert (options.epochs, options.batch_size) == (200, 256)
    assert (options.views.size, options.views.scale) == (224, (0.2, 1.0))
    assert (options.model.encoder, options.model.projector_dim) == ("resnet50", 128)
    assert method_of(options, "queue_size") == 65536 and options.model.norm_groups == 8
    assert method_of(options, "key_momentum") == 0.999
    assert (options.optim.name, options.optim.lr, options.optim.momentum) == ("sgd", 0.03, 0.9)
    assert (options.optim.weight_decay, options.optim.warmup_epochs) == (1e-4, 0)
    v1 = name == "moco-v1"
    assert options.optim.schedule == ("step" if v1 else "cosine-epoch")
    assert options.model.projector_layers == (1 if v1 else 2)
    assert options.views.weak.blur == (0.0 if v1 else 0.5,)
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
        "strong.sizes": TABLE[name][6],
        "model.encoder": "resnet10-w32",
        "model.projector_hidden": 256,
        "method.queue_size": 4096,
        "method.key_momentum": 0.99,
        "optim.lr": 0.06,
        "optim.weight_decay": 5e-4,
        **({} if name == "moco-v1" else {"views.weak.blur": (0.0,), "optim.schedule": "cosine"}),
    }


# Values for the other methods on ImageNet, from the papers and their code.
PUBLISHED: dict[str, dict[str, Any]] = {
    "simclr": {
        "batch_size": 4096, "method.temperature": 0.1, "optim.name": "lars", "optim.lr": 0.3,
        "optim.warmup_epochs": 10, "views.scale": (0.08, 1.0), "optim.decay_vectors": False,
        "views.weak.jitter": (0.8, 0.8, 0.8, 0.2), "model.norm_groups": 1,
    },
    "byol": {
        "method.key_momentum": 0.996, "method.final_key_momentum": 1.0, "optim.lr": 0.2,
        "optim.weight_decay": 1.5e-6, "views.weak.blur": (1.0, 0.1),
        "views.weak.solarize": (0.0, 0.2), "model.projector_hidden": 4096,
        "model.projector_dim": 256, "method.predictor_hidden": 4096,
    },
    "simsiam": {
        "model.projector_layers": 3, "model.projector_dim": 2048, "model.projector_norm": "all",
        "model.zero_init_last": True, "method.predictor_hidden": 512, "optim.lr": 0.05,
        "batch_size": 512, "method.fixed_predictor_rate": True,
    },
    "swav": {
        "method.num_prototypes": 3000, "method.epsilon": 0.05, "method.queue_size": 3840,
        "method.queue_epoch": 15, "method.freeze_steps": 5005, "optim.lr": 0.6,
        "optim.final_lr": 0.0006, "views.local.sizes": (96,) * 6, "views.scale": (0.14, 1.0),
        "views.local.scale": (0.05, 0.14),
    },
    "adco": {
        "method.num_negatives": 65536, "method.temperature": 0.12, "method.negative_lr": 3.0,
        "method.negative_temperature": 0.02, "optim.lr": 0.03, "optim.final_lr": 0.0006,
    },
    "instdisc": {
        "method.temperature": 0.07, "method.num_negatives": 4096, "views.weak.sizes": (),
        "method.row_momentum": 0.5, "model.projector_layers": 1,
    },
    "pirl": {
        "method.jigsaw_weight": 0.5, "method.num_negatives": 32000, "method.grid": 3,
        "method.jigsaw_size": 255, "method.patch_size": 64, "batch_size": 1024,
    },
    "pcl": {
        "method.num_clusters": (25000, 50000, 100000), "method.warmup_epochs": 20,
        "method.num_negatives": 16384, "method.temperature": 0.2,
    },
    "clim": {
        "batch_size": 512, "epochs": 1200, "optim.lr": 0.03, "optim.weight_decay": 1e-4,
        "clim": True, "mixture.selection": "center-wise", "mixture.mixing": "cutmix",
        "mixture.alpha": 2.0, "mixture.num_clusters": 10000, "mixture.neighbours": 40,
        "mixture.num_positives": 10, "mixture.refresh_epochs": 5, "mixture.resolutions": (),
    },
    "clim-multi-res": {"views.size": 224, "mixture.resolutions": (160,), "clim": True},
    "clim-multi-crop": {
        "views.weak.sizes": (224,), "views.local.sizes": (96, 96),
        "views.local.scale": (0.05, 0.14), "mixture.resolutions": (), "clim": True,
    },
    "infomin": {
        "method.temperature": 0.15, "views.weak.ops.pool": "randaugment",
        "views.weak.ops.rounds": 2, "views.weak.jitter": (0.8, 0.8, 0.8, 0.2),
    },
    "moco-v3": {
        "method.temperature": 1.0, "method.key_momentum": 0.99, "optim.lr": 0.3,
        "optim.weight_decay": 1e-6, "epochs": 300, "batch_size": 4096,
        "model.projector_hidden": 4096,
    },
    "moco-v3-vit": {
        "method.temperature": 0.2, "method.key_momentum": 0.99, "optim.name": "adamw",
        "optim.lr": 1.5e-4, "optim.weight_decay": 0.1, "optim.warmup_epochs": 40,
        "method.freeze_patches": True,
    },
    "dino": {
        "views.scale": (0.4, 1.0), "method.num_prototypes": 65536, "method.temperature": 0.1,
        "method.teacher_temperature": 0.07, "method.first_teacher_temperature": 0.04,
        "method.center_momentum": 0.9, "optim.weight_decay": 0.04, "optim.clip_norm": 3.0,
        "optim.final_weight_decay": 0.4, "views.weak.blur": (1.0, 0.1, 0.5),
    },
    "supervised": {"views.scale": (0.08, 1.0), "views.weak.jitter_probability": 0.0},
}  # fmt: skip
PROTOTYPES = ("swav", "instdisc", "pirl", "dino")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_other_recipes_have_the_published_values(name: str) -> None:
    values = flatten(resolve({"recipe": name}))
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    expected = 0.1 if name in PROTOTYPES else 0.2
    assert values["strong.temperature"] == values["strong.target_temperature"] == expected


# Batch size, optimiser, learning rate for 256 pictures, weight decay, epochs, temperature.
SMALL_SETS: dict[str, tuple[Any, ...]] = {
    "moco-v1": (512, "sgd", 0.03, 5e-4, 200, 0.1),
    "moco-v2": (256, "sgd", 0.3, 1e-4, 1000, 0.2),
    "clsa": (512, "sgd", 0.03, 5e-4, 200, 0.2),
    "simclr": (512, "lars", 1.0, 1e-4, 1000, 0.5),
    "byol": (256, "lars", 1.0, 1e-5, 1000, None),
    "simsiam": (512, "sgd", 0.03, 5e-4, 800, None),
    "swav": (256, "lars", 0.6, 1e-6, 1000, 0.1),
    "adco": (256, "sgd", 0.03, 5e-4, 200, 0.12),
    "instdisc": (128, "sgd", 0.06, 5e-4, 200, 0.1),
    "clim": (256, "sgd", 0.03, 5e-4, 200, 0.2),
    "clim-multi-res": (256, "sgd", 0.03, 5e-4, 200, 0.2),
    "infomin": (512, "sgd", 0.03, 5e-4, 200, 0.15),
    "pirl": (256, "sgd", 0.03, 5e-4, 200, 0.1),
    "pcl": (256, "sgd", 0.03, 5e-4, 200, 0.2),
}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_recipes_have_the_values_of_their_table(name: str) -> None:
    options = resolve({"recipe": f"{name}-cifar"})
    temperature = getattr(options.method, "temperature", None)
    optim = options.optim
    found = (options.batch_size, optim.name, optim.lr, optim.weight_decay, options.epochs)
    assert (*found, temperature) == SMALL_SETS[name]
    assert (options.views.size, options.model.small_stem) == (32, True)


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
        ("swav-cifr", "did you mean swav-cifar?"),
        ("xyzzy", "`clsa recipes` lists them"),
    ],
)
def test_unknown_recipes_are_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ClsaError) as caught:
        overrides_of(name)
    assert str(caught.value) == f"recipe {name} - no such recipe - {hint}"
    assert caught.value.code == Exit.USAGE


def test_another_method_than_the_recipes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = "method.name swav - moco-v2-small is a recipe for moco - choose another --recipe"
    with pytest.raises(ClsaError, match=f"{message}, perhaps swav-small"):
        resolve({"recipe": "moco-v2-small", "method": {"name": "swav"}})
    args = ["pretrain", "--recipe", "moco-v2-small", "--method.name", "swav", "--data", "clipart"]
    assert main(args) == Exit.USAGE and message in capsys.readouterr().err


def test_a_merge_does_not_change_the_recipe() -> None:
    first = overrides_of("clsa-multi")
    merge(first, {"views": {"strong": {"pool": "paper"}}})
    assert overrides_of("clsa-multi") == first


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_describes_its_purpose_source_cost_and_results(
    name: str,
) -> None:
    first, values, status = (line[28:] for line in describe_recipe(name).splitlines())
    assert len(first) > 20 and first.endswith(".")
    assert values.startswith("values: ") and " epochs of batch " in values and "pixels" in values
    assert "not measured here" in status or "measured: " in status


def test_a_recipe_is_shown_as_yaml_that_gives_it_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["recipes", "swav-small"]) == 0
    head, _, body = capsys.readouterr().out.partition("\n\n")
    assert head == describe_recipe("swav-small")
    (tmp_path / "values.yaml").write_text(body)
    values = merge({"recipe": "clsa-small", "stronger": False}, read_yaml(tmp_path / "values.yaml"))
    again = RunOptions.parse({**values, "recipe": "swav-small"}, "test")
    assert again == resolve({"recipe": "swav-small"})


# ---- precedence: defaults < recipe < --config < flags


def test_given_values_win_over_the_recipe_and_the_recipe_over_defaults() -> None:
    options = resolve({"recipe": "clsa-paper-small", "method": {"queue_size": 77}})
    assert method_of(options, "queue_size") == 77  # given
    assert method_of(options, "bank") == "queue"  # recipe
    assert method_of(options, "key_momentum") == 0.99  # -small
    assert options.batch_size == RunOptions.model_fields["batch_size"].default


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parses a `clsa pretrain` command line and returns its options, without training."""
    seen: list[RunOptions] = []

    def run(options: RunOptions) -> Path:
        seen.append(options)
        return options.out

    monkeypatch.setattr("clsa.training.start.pretrain", run)

    def parse(*args: object) -> RunOptions:
        assert main(["pretrain", *map(str, args)]) == 0
        return seen.pop()

    return parse


def test_flags_win_over_the_file_which_wins_over_the_recipe(parsed: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("recipe: clsa-paper-small\nepochs: 7\nbatch_size: 16\noptim: {lr: 1e-3}\n")
    options = parsed("--config", file, "--batch-size", 64, "--optim.momentum=0.5")
    assert options.recipe == "clsa-paper-small" and method_of(options, "bank") == "queue"
    assert (options.epochs, options.batch_size) == (7, 64)
    assert (options.optim.lr, options.optim.momentum) == (1e-3, 0.5)
    assert options.optim.weight_decay == 5e-4
    options = parsed("--recipe=moco-v2-small", "--config", file)
    assert options.recipe == "moco-v2-small" and options.method.name == "moco"
    assert options.epochs == 7 and not options.stronger


def test_the_last_of_repeated_flags_wins_as_everywhere(parsed: Any, tmp_path: Path) -> None:
    options = parsed("--recipe", "moco-v2-small", "--recipe", "clsa-small", "--seed", 1, "--seed=2")
    assert (options.recipe, options.stronger, options.seed) == ("clsa-small", True, 2)
    assert options == resolve({"seed": 2})


def test_a_runs_config_yaml_is_a_config_file(parsed: Any, tmp_path: Path) -> None:
    before = resolve({"recipe": "clsa-multi-small", "optim": {"lr": 0.5}, "data": {"data": "x"}})
    file = tmp_path / "config.yaml"
    file.write_text(before.to_yaml())
    assert parsed("--config", file).model_copy(update={"config": None}) == before
    assert read_yaml(file)["recipe"] == "clsa-multi-small"


def test_no_command_line_at_all_is_the_default_recipe(parsed: Any) -> None:
    assert parsed() == resolve({}) == resolve({"recipe": "clsa-small"})


def test_one_size_moves_all_views_that_were_not_set_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sides(options: RunOptions) -> tuple[Any, ...]:
        weak, local = options.views.weak.sizes, options.views.local.sizes
        return options.views.size, weak, local, options.strong.sizes, options.mixture.resolutions

    def sized(recipe: str, size: int, **over: Any) -> tuple[Any, ...]:
        return sides(resolve({"recipe": recipe, "views": {"size": size, **over}}))

    assert sized("clsa-small", 96) == (96, (96,), (), (96,), ())
    # 96 of 224 is 27.4 of 64; 16 of 32 is 48 of 96; 160 of 224 is 68.6 of 96
    assert sized("clsa-multi", 64) == (64, (64, 56, 44, 36, 28), (), (64, 56, 44, 36, 28), ())
    assert sized("swav-small", 96)[2] == (48, 48)
    assert sized("clim-multi-res", 96)[4] == (68,)
    assert sized("swav-small", 16)[2] == (8, 8) and sized("swav-small", 8)[2] == (8, 8)
    assert sized("clsa-small", 96, weak={"sizes": [40]}) == (96, (40,), (), (96,), ())
    for name in RECIPES:  # its own size changes nothing
        own = resolve({"recipe": name})
        assert resolve({"recipe": name, "views": {"size": own.views.size}}) == own

    seen: list[RunOptions] = []
    monkeypatch.setattr("clsa.training.stages.pretrain", lambda options: seen.append(options))
    monkeypatch.setattr("clsa.cli.train.pretrain.say_next", lambda _: None)

    def typed(*args: str) -> tuple[Any, ...]:
        main(["pretrain", "--data", "clipart", *args])
        return sides(seen[-1])

    small = ("--recipe", "clsa-small")
    assert typed(*small, "--views.size", "96") == (96, (96,), (), (96,), ())
    apart = typed(*small, "--views.size=96", "--views.weak.sizes", "40")
    assert apart == (96, (40,), (), (96,), ())
    (tmp_path / "config.yaml").write_text(resolve({"recipe": "swav-small"}).to_yaml())
    config = ("--config", str(tmp_path / "config.yaml"))
    assert typed(*config, "--views.size", "96")[:3] == (96, (96,), (48, 48))
    assert typed(*config)[:3] == (32, (32,), (16, 16))

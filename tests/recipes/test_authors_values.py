"""Values of recipes and cards that the authors' code settles; each names its source."""

import math
from typing import Any, cast

import pytest
import torch

from clsa.evaluate.classify.voc07_released import rate_at
from clsa.learning.pair_losses import suncet
from clsa.options.protocols import CARDS
from clsa.options.run import RunOptions
from clsa.recipes import RECIPES, resolve


def options(recipe: str) -> RunOptions:
    return resolve({"recipe": recipe})


def test_suncet_shows_twenty_classes_in_one_view() -> None:
    """suncet, configs/suncet/imgnt_train.yaml:2,4,5,16 on 64 GPUs; src/data_manager.py:796-820."""
    labelled = options("suncet").suncet
    assert (labelled.classes, labelled.per_class, labelled.views) == (20, 128, 1)
    rows = torch.ones(20 * 128, 4) / 2  # all alike: the loss stands at chance
    labels = torch.arange(20).repeat_interleave(128)
    chance = float(suncet(rows, labels, 0.1))
    assert chance == pytest.approx(math.log((2560 - 1) / (128 - 1)), abs=1e-4)
    assert chance == pytest.approx(3.00, abs=5e-3)


@pytest.mark.parametrize(
    ("recipe", "zero"),
    [
        ("simclr", True),  # simclr, resnet.py:395, 480
        ("suncet", False),  # suncet, src/resnet.py:150
        ("byol", False),  # byol, README: the paper's figures were obtained without it
        ("swav", False),
        ("dino-resnet", False),
        ("moco-v2", False),
        ("clsa", False),
    ],
)
def test_which_blocks_start_at_zero(recipe: str, zero: bool) -> None:
    assert options(recipe).model.zero_init_last is zero


def test_pirl_does_not_decay_biases_and_norms() -> None:
    """vissl, pirl_jigsaw_4node_resnet50.yaml:93-94."""
    assert options("pirl").optim.decay_vectors is False


@pytest.mark.parametrize("recipe", ["adco", "adco-multi", "pirl", "continual"])
def test_rates_that_change_only_between_epochs(recipe: str) -> None:
    """AdCo main_worker.py:196; vissl pirl yaml:104; CCSSL train.py:341."""
    assert options(recipe).optim.schedule == "cosine-epoch"


def test_the_figure_of_dino_is_that_of_its_code() -> None:
    """dino, README.md:202: 76.0 linear, 73.3 20-NN at 300 epochs."""
    assert "76.0 at 300 epochs (20-NN 73.3)" in RECIPES["dino"].published


def test_rates_of_the_released_voc07_code() -> None:
    """CLSA, VOC_CLF/train.py:42: the scheduler steps before the epoch."""
    card = cast(Any, CARDS["voc07-clsa-released"])
    rates = [rate_at(epoch, card) for epoch in range(3)]
    assert rates == pytest.approx([0.04915, 0.04665, 0.04268], abs=5e-6)

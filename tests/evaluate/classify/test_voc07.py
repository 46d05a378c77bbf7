import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC
from torch import nn

from clsa.evaluate.classify.svm import chosen_cost, drawn, lowshot, scaled, voc07_svm
from clsa.evaluate.classify.voc07 import Lists, loss_of, mean_ap, read_lists, voc07
from clsa.evaluate.classify.voc07_released import (
    crop_at,
    distorted,
    rate_at,
    squares,
    voc07_released,
)
from clsa.evaluate.evaluate import evaluate
from clsa.evaluate.features.extract import extract, frozen
from clsa.evaluate.results.heads import saved_heads
from clsa.learning import models
from clsa.options.cards import LowshotCard, ReleasedCard, SvmCard, Voc07Card
from clsa.options.commands import EvaluateOptions
from clsa.options.protocols import CARDS
from clsa.options.run import DataOptions, ModelOptions, ViewOptions
from clsa.runs import digests, saved_encoder
from tests.support.pictures import voc_folder
from tests.support.refusals import refusal

MODEL = ModelOptions(encoder="resnet10-w32")
VIEWS = ViewOptions(size=32)
MAP, RELEASED, SVM = CARDS["voc07-map"], CARDS["voc07-clsa-released"], CARDS["voc07-svm"]
assert isinstance(MAP, Voc07Card) and isinstance(SVM, SvmCard)
assert isinstance(RELEASED, ReleasedCard)


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voc_folder(tmp_path_factory.mktemp("voc"), {"train": 24, "val": 12, "test": 30})


@pytest.fixture(scope="module")
def lists(devkit: Path) -> Lists:
    return read_lists(DataOptions(data=str(devkit)), "trainval", None)


class MeanColour(nn.Module):
    """An encoder that gives the mean of each colour, which coloured squares change."""

    head_hidden_size = 3

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.gain = nn.Parameter(torch.tensor(4.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.gain * self.norm(images).mean((2, 3))


def test_targets_mark_difficult_objects(lists: Lists) -> None:
    assert lists.classes == ["blue", "green", "red"]
    assert len(lists.train.source) == 36 and len(lists.test.source) == 30
    # picture 0 of train: red, and a difficult blue; picture 1: green and blue
    assert lists.train.targets[:2].tolist() == [[-1, 0, 1], [1, 1, 0]]
    assert lists.several and lists.digest() != lists._replace(train=lists.test).digest()


def test_the_folder_of_one_year_is_enough_and_other_folders_are_refused(
    devkit: Path, tmp_path: Path, lists: Lists
) -> None:
    again = read_lists(DataOptions(data=str(devkit / "VOC2007")), "trainval", None)
    assert np.array_equal(again.train.targets, lists.train.targets)
    text, code = refusal(lambda: read_lists(DataOptions(), "trainval", None))
    assert "no --data" in text and code == 2
    text, _ = refusal(lambda: read_lists(DataOptions(data="clipart"), "trainval", None))
    assert "VOCdevkit" in text
    text, code = refusal(lambda: read_lists(DataOptions(data=str(tmp_path)), "trainval", None))
    assert code == 66


def test_the_loss_is_summed_over_classes_and_skips_the_difficult() -> None:
    logits = torch.tensor([[0.0, 2.0], [-1.0, 3.0]])
    targets = torch.tensor([[1, 0], [-1, 1]])

    def term(logit: float, there: bool) -> float:
        return math.log1p(math.exp(-logit if there else logit))

    kept = term(0, True) + term(2, False) + term(3, True)
    assert loss_of(logits, targets, dropped=True).item() == pytest.approx(kept)
    whole = loss_of(logits, targets, dropped=False)
    assert whole.item() == pytest.approx(kept + term(-1, False))


def test_the_linear_layer_learns_and_repeats(lists: Lists) -> None:
    encoder = MeanColour().eval()
    card = MAP.model_copy(update={"epochs": 12, "batch_size": 12, "lr": 1.0})
    with frozen(encoder):
        rows, features = extract(encoder, lists.queries, np.arange(30), VIEWS, torch.device("cpu"))
        runs = [
            voc07(encoder, lists, (features, rows), 32, card, 0, DataOptions(workers=0))
            for _ in range(2)
        ]
    (found, layer), (again, same) = runs
    assert found == again and torch.equal(layer.weight, same.weight)
    by = {one.chosen: one for one in found}
    assert set(by) == {"last", "best"} and by["best"].value >= by["last"].value > 75
    scores = layer(features).detach().double().numpy()
    assert by["last"].value == mean_ap(scores, lists.test.targets, "all", dropped=True)


def test_eleven_points_are_another_number_of_the_same_layer(devkit: Path, tmp_path: Path) -> None:
    run = saved(tmp_path)
    judged = evaluate(
        EvaluateOptions(
            run=run, data=DataOptions(data=str(devkit), workers=0), random=False, device="cpu",
            protocol=("voc07-map", "voc07-map-11pt", "voc07-svm"),
            change=("epochs=2", "voc07-svm.costs=[0.5, 1]"),
        )
    )  # fmt: skip
    values = {r.protocol: r for r in judged if r.chosen in ("last", "")}
    assert values["voc07-map"].value != values["voc07-map-11pt"].value
    assert {r.n for r in judged} == {30} and {r.split for r in judged} == {"test"}
    assert {r.metric for r in judged} == {"map"}
    assert all(r.encoder_digest == r.encoder_digest_after for r in judged)
    names = {name.rpartition("-")[0] for name, _ in saved_heads(run)}  # without the hashes
    assert names == {"voc07-map", "voc07-map-11pt"}
    assert {r.leaked for r in judged} == {0}


def saved(folder: Path) -> Path:
    """A run folder with an encoder whose facts say that it learned from drawings."""
    encoder = models.build_encoder(MODEL, seed=3)
    facts = saved_encoder.EncoderFacts(
        model=MODEL, views=VIEWS, data=DataOptions(data="clipart"), recipe="clsa", seed=7, step=1,
        data_digest="",
    )  # fmt: skip
    saved_encoder.save_encoder(folder / "encoder.safetensors", encoder, facts)
    return folder


def test_the_released_rate_goes_down_and_up_and_ends_high() -> None:
    rates = [rate_at(epoch, RELEASED) for epoch in (-1, 5, 11, 23, 99)]
    assert rates == pytest.approx([0.05, 0.025, 0.0, 0.05, 0.0375])


def test_the_released_protocol_moves_statistics_of_a_copy(devkit: Path, tmp_path: Path) -> None:
    lists = read_lists(DataOptions(data=str(devkit)), "train", "val")
    assert lists.select is not None and len(lists.train.source) == 24
    encoder = MeanColour().eval()
    before = digests.digest(encoder.state_dict())
    card = RELEASED.model_copy(update={"epochs": 3, "size": 24})
    with frozen(encoder):
        runs = [voc07_released(encoder, lists, card, seed=0) for _ in range(2)]
    (found, count, after), (again, *_) = runs
    assert count == 30
    assert found == again and digests.digest(encoder.state_dict()) == before
    assert {one.metric for one in found} == {"per-image-ap", "map"}
    assert {one.chosen for one in found} == {"last", "best"}
    assert isinstance(after, MeanColour) and not after.training
    moved = after.state_dict()
    assert torch.equal(moved["gain"], encoder.gain)
    assert not torch.equal(moved["norm.running_mean"], encoder.norm.running_mean)
    still = card.model_copy(update={"moving_statistics": False})
    with frozen(encoder):
        kept = voc07_released(encoder, lists, still, seed=0)[2]
    assert digests.digest(kept.state_dict()) == before


def test_released_views_are_those_of_its_code(lists: Lists) -> None:
    rows, pictures = squares(lists.train.source, 24)
    assert pictures.shape == (36, 3, 24, 24) and rows.tolist() == list(range(36))
    many = pictures[:1].expand(400, -1, -1, -1)
    seen = distorted(many, np.arange(400), epoch=0, seed=0)
    assert torch.equal(seen, distorted(many, np.arange(400), epoch=0, seed=0))
    gray = ((seen - seen.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1).float().mean().item()
    assert 0.06 < gray < 0.2  # a quarter of the half whose brightness stays
    boxes, flips = crop_at(0.5, 1.0)(np.array([0]), np.array([110]), np.array([220]))
    assert boxes.tolist() == [[5, 120, 100, 100]] and not flips.any()


def test_machines_equal_scikit_learns_own(lists: Lists) -> None:
    generator = np.random.default_rng(0)
    targets, asked = lists.train.targets, lists.test.targets
    train = (targets == 1) @ generator.normal(size=(3, 8)) + generator.normal(size=(36, 8))
    test = (asked == 1) @ generator.normal(size=(3, 8)) + generator.normal(size=(30, 8))
    card = SVM.model_copy(update={"costs": (0.5,)})
    (found,) = voc07_svm((train, targets), (test, asked), card)
    scores = np.zeros((30, 3))
    for column in range(3):
        reference = LinearSVC(
            C=0.5, class_weight={1: 2, -1: 1}, tol=1e-4, max_iter=2000, dual=True, random_state=0
        )
        unit = train / (np.linalg.norm(train, axis=1)[:, None] + 1e-5)
        reference.fit(unit, np.where(targets[:, column] == 1, 1, -1))
        unit = test / (np.linalg.norm(test, axis=1)[:, None] + 1e-5)
        scores[:, column] = reference.decision_function(unit)
    assert found.value == mean_ap(scores, asked, "all", dropped=True)


def test_the_cost_is_the_best_of_the_folds_and_half_for_rare_classes() -> None:
    generator = np.random.default_rng(0)
    wanted = np.where(np.arange(60) % 3 == 0, 1, -1)
    features = scaled(generator.normal(size=(60, 5)) + 0.2 * wanted[:, None])
    scores = [
        cross_val_score(
            LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=0),
            features, wanted, cv=3, scoring="average_precision",
        ).mean()
        for cost in SVM.costs
    ]  # fmt: skip
    assert len(set(scores)) > 1
    assert chosen_cost(features, wanted, SVM) == SVM.costs[int(np.argmax(scores))]
    assert chosen_cost(features, np.where(np.arange(60) < 2, 1, -1), SVM) == 0.5


def test_few_shot_accuracy_rises_with_more_shots() -> None:
    generator = np.random.default_rng(0)
    labels, asked = np.arange(200) % 4, np.arange(80) % 4
    centres = generator.normal(size=(4, 12))
    bank = centres[labels] + 0.9 * generator.normal(size=(200, 12))
    queries = centres[asked] + 0.9 * generator.normal(size=(80, 12))
    card = CARDS["lowshot"]
    assert isinstance(card, LowshotCard)
    found = lowshot((bank, labels), (queries, asked), 4, card, seed=0)
    assert found == lowshot((bank, labels), (queries, asked), 4, card, seed=0)
    values = {one.metric: one.value for one in found}
    assert list(values) == [f"top1-k{k}" for k in (1, 2, 4, 8, 16)]
    assert values["top1-k1"] < values["top1-k16"] and values["top1-k16"] > 60
    rows = drawn(labels, 3, seed=0, draw=1)
    assert np.bincount(labels[rows]).tolist() == [3] * 4
    assert rows.tolist() != drawn(labels, 3, seed=0, draw=2).tolist()
    assert len(drawn(np.array([0, 0, 1]), 2, seed=0, draw=0)) == 3


def test_every_field_of_the_cards_moves_the_number(lists: Lists, devkit: Path) -> None:
    """Every setting that a card accepts and records has an effect."""
    encoder, cpu = MeanColour().eval(), torch.device("cpu")
    base = MAP.model_copy(update={"epochs": 2, "batch_size": 12, "lr": 0.3})
    with frozen(encoder):
        rows, features = extract(encoder, lists.queries, np.arange(30), VIEWS, cpu)

        def layer(**over: object) -> torch.Tensor:
            card = base.model_copy(update=over)
            asked = features, rows
            return voc07(encoder, lists, asked, 32, card, 0, DataOptions(workers=0))[1].weight

        first = layer()
        for over in (
            {"epochs": 3}, {"batch_size": 8}, {"momentum": 0.5}, {"weight_decay": 0.5},
            {"lr": 0.1}, {"scale": (0.5, 1.0)}, {"train_difficult": "negative"},
        ):  # fmt: skip
            assert not torch.equal(layer(**over), first), over
    own = {"version", "train", "metric", "test_difficult"}  # only affect lists or judging
    tried = {"epochs", "batch_size", "momentum", "weight_decay", "lr", "scale", "train_difficult"}
    assert set(MAP.settings()) == own | tried
    scores = np.random.default_rng(0).random((30, 3))
    found = {
        mean_ap(scores, lists.test.targets, points, dropped)
        for points in ("all", "11")
        for dropped in (True, False)
    }
    assert len(found) == 4
    parts = read_lists(DataOptions(data=str(devkit)), "train", "val")
    released = RELEASED.model_copy(update={"epochs": 3, "size": 24, "cosine_period": 5})
    with frozen(encoder):
        before = voc07_released(encoder, parts, released, seed=0)[0]
        for over in (
            {"epochs": 1}, {"batch_size": 5}, {"momentum": 0.1}, {"lr": 2.0}, {"size": 48},
            {"cosine_period": 1}, {"moving_statistics": False},
        ):  # fmt: skip
            card = released.model_copy(update=over)
            found = voc07_released(encoder, parts, card, seed=0)[0]
            assert [one.value for one in found] != [one.value for one in before], over


def test_scores_that_are_no_numbers_are_refused(lists: Lists) -> None:
    scores = np.full((30, 3), np.nan)
    text, code = refusal(lambda: mean_ap(scores, lists.test.targets, "all", dropped=True))
    assert "diverged" in text and code == 76


def test_voc_and_class_cards_keep_to_their_pictures(devkit: Path, tmp_path: Path) -> None:
    run = saved(tmp_path)

    def judged(*protocols: str, data: Path = devkit, **over: object) -> tuple[str, int]:
        options = {"run": run, "data": DataOptions(data=str(data)), "protocol": protocols, **over}
        return refusal(lambda: evaluate(EvaluateOptions.parse(options, "test")))

    text, code = judged("knn-20", "voc07-map")
    assert "--protocol knn-20, voc07-map - they take different kinds" in text and code == 2
    for data in (devkit, devkit / "VOC2007"):
        text, code = judged("knn-20", data=data)
        assert "VOC's pictures have several classes" in text and code == 2
    text, code = judged("voc07-map", labels="1%")
    assert "--labels 1%" in text and "leave it out" in text and code == 2

"""Protocol cards: published values, hashes, changes, and the command that lists them."""

import dataclasses
from typing import get_args

import pytest

from clsa.cli.main import main
from clsa.options.cards import Card, FinetuneCard, LinearCard, ReleasedCard, Voc07Card
from clsa.options.protocols import CARDS, Name, cards_of, departures
from tests.support.refusals import refusal

RELEASED = {
    "knn-20": "a16063ab0e4c",
    "knn-200": "daa535193526",
    "knn-strong": "eb54dc8820fb",
    "logistic": "e96fe819610a",
    "linear-fast": "f4faa5226a25",
    "linear-clsa": "17212a41afa0",
    "linear-moco": "7d5d94b9e2c0",
    "linear-clim": "13dcd2e496fc",
    "finetune": "9bbf21e72b90",
    "semi-1": "0ad9aa41dca8",
    "semi-10": "e1993b17bc35",
    "semi-1-clim": "f22e66570d61",
    "semi-10-clim": "532a0314f10f",
    "lowshot": "b6c3eaa6ae8e",
    "voc07-map": "d13c1a2d57e5",
    "voc07-map-11pt": "76aeeefd3ebd",
    "voc07-svm": "21e39255ef80",
    "voc07-clsa-released": "674a8c2b6797",
    "detect-voc-c4": "8f5407269fca",
    "detect-coco-c4": "2c87d7ce2d59",
    "detect-coco-fpn": "8f85d1f76f9b",
    "detect-lvis-fpn": "c1156bfc7695",
    "detect-scenes-fpn": "d51ccdc712b9",
}


def test_every_name_has_a_card_and_every_card_a_judge() -> None:
    from clsa.evaluate.evaluate import JUDGES

    assert set(get_args(Name)) == set(CARDS)
    assert {type(card) for card in CARDS.values()} <= set(JUDGES)


def test_hashes_tell_cards_apart_and_are_those_of_the_release() -> None:
    """If you change a card, raise its version and put its new hash in RELEASED."""
    hashes = {name: card.hash(name) for name, card in CARDS.items()}
    assert hashes == RELEASED
    assert len(set(hashes.values())) == len(CARDS)
    card = CARDS["linear-clsa"]
    assert card.model_copy(update={"about": "x", "source": "y"}).hash("linear-clsa") == card.hash(
        "linear-clsa"
    )
    settings = [*card.settings()]
    assert {"about", "source"}.isdisjoint(settings) and "version" in settings
    for field, value in (("lr", 3.0), ("version", 2), ("epochs", 99), ("scale", (0.1, 1.0))):
        assert card.model_copy(update={field: value}).hash("linear-clsa") != card.hash(
            "linear-clsa"
        )


@pytest.mark.parametrize(
    ("name", "lr", "epochs", "batch_size", "drops", "weight_decay"),
    [
        ("linear-clsa", 10.0, 100, 256, (), 0),
        ("linear-moco", 30.0, 100, 256, (0.6, 0.8), 0),
        ("linear-clim", 30.0, 100, 256, (0.6, 0.8), 0),
        ("semi-1", 0.02, 20, 256, (0.6, 0.8), 0),
        ("semi-10", 0.01, 20, 256, (0.6, 0.8), 0),
        ("semi-10-clim", 1e-4, 60, 256, (1 / 3, 2 / 3), 0),
    ],
)
def test_cards_hold_the_published_values(
    name: str,
    lr: float,
    epochs: int,
    batch_size: int,
    drops: tuple[float, ...],
    weight_decay: float,
) -> None:
    card = CARDS[name]
    assert isinstance(card, LinearCard | FinetuneCard) and card.lr == lr
    assert (card.epochs, card.batch_size, card.momentum) == (epochs, batch_size, 0.9)
    assert card.drops == drops and card.weight_decay == weight_decay


def test_the_cards_of_voc07_hold_what_text_and_code_say() -> None:
    text, code = CARDS["voc07-map"], CARDS["voc07-clsa-released"]
    assert isinstance(text, Voc07Card) and isinstance(code, ReleasedCard)
    assert (text.lr, text.epochs, text.batch_size, text.momentum) == (0.05, 100, 256, 0.9)
    assert (text.train, text.weight_decay) == ("trainval", 0)
    assert (code.lr, code.epochs, code.batch_size, code.momentum) == (0.05, 100, 16, 0.9)
    assert (code.train, code.select, code.size, code.cosine_period) == ("train", "val", 300, 12)


def test_only_fine_tuning_and_the_released_code_move_an_encoder() -> None:
    moved = {name for name, card in CARDS.items() if not card.frozen}
    semi = {name for name in CARDS if name.startswith("semi-")}
    whole = {f"detect-{name}" for name in ("voc-c4", "coco-c4", "coco-fpn", "lvis-fpn")}
    assert moved == {"finetune", "voc07-clsa-released", *semi, *whole}


def test_changes_reach_the_cards_that_have_the_field() -> None:
    cards = cards_of(["knn-20", "linear-clsa", "linear-moco"], ["epochs=5", "linear-moco.lr=1e-1"])
    clsa, moco = cards["linear-clsa"], cards["linear-moco"]
    assert isinstance(clsa, LinearCard) and isinstance(moco, LinearCard)
    assert (clsa.epochs, clsa.lr, moco.epochs, moco.lr) == (5, 10.0, 5, 0.1)
    assert departures("knn-20", cards["knn-20"]) == ""
    assert departures("linear-moco", moco) == "epochs=5 lr=0.1"
    lowshot = cards_of(["lowshot"], ["shots=[1, 2]"])["lowshot"]
    assert departures("lowshot", lowshot) == "shots=1,2" and lowshot.headline == "top1-k2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochz=5", "did you mean epochs?"),
        ("linear-clsa.neighbours=5", "no card of --protocol has it"),
        ("linear-moko.lr=5", "did you mean linear-moco?"),
        ("epochs", "not of the form FIELD=VALUE"),
        ("epochs=many", "--change epochs=many: epochs"),
        ("epochs=0", "greater than or equal to 1"),
        ("about=mine", "no card of --protocol has it"),
        ("lr=1e300", "less than or equal to"),
    ],
)
def test_a_wrong_change_is_refused_with_the_reason(change: str, message: str) -> None:
    text, code = refusal(lambda: cards_of(["linear-clsa", "linear-moco"], [change]))
    assert message in text and code == 2


def test_the_command_lists_cards_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["protocols"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in CARDS)
    assert main(["protocols", "linear-moco"]) == 0
    shown = capsys.readouterr().out
    assert CARDS["linear-moco"].hash("linear-moco") in shown and "lr: 30.0" in shown
    assert main(["protocols", "linear-mocco"]) == 2
    assert "did you mean linear-moco?" in capsys.readouterr().err


def test_cards_are_frozen() -> None:
    card: Card = CARDS["knn-20"]
    with pytest.raises(Exception, match="frozen"):
        card.version = 2  # pyright: ignore
    assert not dataclasses.is_dataclass(card)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logistic", "grid=[]"), ("linear-fast", "rates=[]"), ("lowshot", "shots=[]"),
        ("voc07-svm", "costs=[]"),
    ],
)  # fmt: skip
def test_nothing_to_try_is_refused(name: str, change: str) -> None:
    text, code = refusal(lambda: cards_of([name], [change]))
    assert "at least 1 item" in text and code == 2

"""All protocols for judging features, as named, versioned cards. Needs no torch.

A card fixes every setting that changes a result, except those that follow from the run and the
pictures (size and centre crop; on small sets also batch, neighbours and shots). results.json stores
the card's hash with each result; a changed card has another hash.
"""

from collections.abc import Iterable
from typing import Any, Literal

from clsa.options.cards import (
    Card,
    FinetuneCard,
    KnnCard,
    LinearCard,
    LinearFastCard,
    LogisticCard,
    LowshotCard,
    ReleasedCard,
    SvmCard,
    Voc07Card,
)
from clsa.options.config import nearest, read_value
from clsa.options.detection_cards import DETECT_CARDS
from clsa.system.errors import ClsaError

Name = Literal[
    "knn-20", "knn-200", "knn-strong", "logistic",
    "linear-fast", "linear-clsa", "linear-moco", "linear-clim",
    "finetune", "semi-1", "semi-10", "semi-1-clim", "semi-10-clim", "lowshot",
    "voc07-map", "voc07-map-11pt", "voc07-svm", "voc07-clsa-released",
    "detect-voc-c4", "detect-coco-c4", "detect-coco-fpn", "detect-lvis-fpn", "detect-scenes-fpn",
]  # fmt: skip

_SWAV = "SwAV's code"
CARDS: dict[str, Card] = {
    "knn-20": KnnCard(about="20 nearest, weighted votes; plain votes too", source="CLSA, InstDisc"),
    "knn-200": KnnCard(
        about="200 nearest, weighted votes; plain votes too", source="InstDisc", neighbours=200
    ),
    "knn-strong": KnnCard(
        about="knn-20 of strongly augmented queries", source="CLSA, Fig. 5", queries="strong"
    ),
    "logistic": LogisticCard(about="logistic regression, chooses its L2 weight", source="ours"),
    "linear-fast": LinearFastCard(
        about="linear probe on cached features, chooses its rate", source="ours"
    ),
    "linear-clsa": LinearCard(
        about="linear probe, rate 10 to 0.01, cosine", source="CLSA's code", final_lr=0.01
    ),
    "linear-moco": LinearCard(
        about="linear probe, rate 30, to a tenth at 60 % and 80 %", source="MoCo v1, v2",
        lr=30.0, drops=(0.6, 0.8),
    ),
    "linear-clim": LinearCard(
        about="linear probe, rate 30, to a tenth after 60 % and 80 %", source="CLIM",
        lr=30.0, drops=(0.6, 0.8),
    ),
    "finetune": FinetuneCard(about="all layers, all labels", source=_SWAV),
    "semi-1": FinetuneCard(
        about="all layers, 1 % of the labels", source=_SWAV, labels="1%", lr=0.02, head_lr=5.0
    ),
    "semi-10": FinetuneCard(about="all layers, 10 % of the labels", source=_SWAV, labels="10%"),
    **{
        f"semi-{share}-clim": FinetuneCard(
            about=f"all layers, {share} % of the labels", source="CLIM", labels=f"{share}%",
            lr=1e-4, head_lr=10.0, epochs=60, drops=(1 / 3, 2 / 3), drop=0.1,
        )
        for share in (1, 10)
    },
    "lowshot": LowshotCard(about="SVMs on 1 to 16 pictures per class", source="PCL, C 0.5"),
    "voc07-map": Voc07Card(about="linear layer, AP of all points", source="CLSA's text"),
    "voc07-map-11pt": Voc07Card(
        about="linear layer, AP of 11 points", source="CLSA's text", metric="11"
    ),
    "voc07-svm": SvmCard(about="one SVM per class, chooses C, AP of all points", source="as VISSL"),
    "voc07-clsa-released": ReleasedCard(
        about="what CLSA's released code computes: no frozen probe, no class AP",
        source="CLSA's code",
    ),
    **DETECT_CARDS,
}  # fmt: skip


def cards_of(names: Iterable[str], changes: Iterable[str] = ()) -> dict[str, Card]:
    """The named cards, with the changes `FIELD=VALUE` or `CARD.FIELD=VALUE` made in them.

    A change without `CARD.` applies to each of the named cards that has the field.

    Raises:
        ClsaError: for a change of another form, of a field that none of the cards has, or to a
            value that the field does not accept.
    """
    cards = {name: CARDS[name] for name in names}
    for change in changes:
        key, equals, text = change.partition("=")
        name, dot, field = key.rpartition(".")
        reached = [each for each in cards if not dot or each == name]
        fitting = [each for each in reached if field in cards[each].settings()]
        if not equals or not fitting:
            known = sorted({one for each in reached for one in cards[each].settings()})
            close = nearest(field, known) or (nearest(name, list(cards)) if dot else None)
            hint = f"did you mean {close}?" if close else f"use one of {', '.join(known or cards)}"
            what = "no card of --protocol has it" if equals else "not of the form FIELD=VALUE"
            raise ClsaError(f"--change {change}", what, hint)
        value = read_value(text)
        for each in fitting:
            values = {**cards[each].model_dump(), field: value}
            cards[each] = type(cards[each]).parse(values, f"--change {change}")
    return cards


def departures(name: str, card: Card) -> str:
    """What `card` changes in the card called `name`, as `field=value` words."""
    own = CARDS[name].settings()
    changed = {key: value for key, value in card.settings().items() if value != own[key]}
    return " ".join(f"{key}={_words(value)}" for key, value in changed.items())


def _words(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)

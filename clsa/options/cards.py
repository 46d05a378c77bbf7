"""Kinds of protocol cards: every setting that changes a result of a protocol. Needs no torch."""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from clsa.options.config import Config, Count, Fraction, NotNegative, Positive, Share

Shares = tuple[Fraction, ...]
Rate = Annotated[float, pydantic.Field(gt=0, le=1e6)]

SOME = pydantic.Field(min_length=1)


class Card(Config):
    """What all protocols have; each kind of card adds the settings that change its results."""

    pictures: ClassVar[Literal["classes", "voc", "boxes"]] = "classes"
    """classes: one class per picture, in any form of `--data`; voc: the folders of VOC07; boxes:
    the folders of VOC or COCO."""
    about: str = ""
    """What the protocol does, in one line."""
    source: str = ""
    """Paper or code that the values come from."""
    version: Count = 1

    @property
    def frozen(self) -> bool:
        """Whether the encoder's weights and statistics stay the same to the bit."""
        return True

    @property
    def headline(self) -> str:
        """The metric that tables and sweeps show."""
        return "top1"

    def settings(self) -> dict[str, Any]:
        """All settings that change a result: every field but `about` and `source`."""
        return self.model_dump(mode="json", exclude={"about", "source"})

    def hash(self, name: str) -> str:
        """The first 12 hexadecimal digits of the sha256 over name, kind and settings."""
        whole = {"name": name, "kind": type(self).__name__, **self.settings()}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


class KnnCard(Card):
    """Weighted votes of the nearest pictures."""

    neighbours: Count = 20
    """Number of nearest pictures in the bank that vote."""
    temperature: Positive = 0.07
    """A vote has the weight exp(cosine / temperature)."""
    queries: Literal["clean", "strong"] = "clean"
    """clean: centre crops; strong: one strongly augmented view of each picture."""


class LogisticCard(Card):
    """Logistic regression on features of centre crops."""

    grid: Annotated[tuple[Positive, ...], SOME] = tuple(10 ** (-k / 2) for k in range(13))
    """L2 weights to try on a held-out fifth of the bank, from the largest down."""


class SgdCard(Card):
    """Options of plain SGD."""

    epochs: Count = 100
    batch_size: Count = 256
    momentum: Fraction = 0.9
    weight_decay: NotNegative = 0.0


class Schedule(SgdCard):
    """SGD with learning rates that fall along a cosine or in steps, updated at every epoch."""

    drops: Shares = ()
    """When the rates drop, as shares of all epochs; if empty, they fall along a cosine instead."""
    drop: Share = 0.1
    """At each drop, the rates are multiplied by this."""


class LinearCard(Schedule):
    """A linear classifier, trained on the frozen encoder's features of random crops."""

    lr: Rate = 10.0
    final_lr: NotNegative = 0.0
    """Learning rate at the end of the cosine."""
    scale: tuple[Share, Share] = (0.08, 1.0)
    """Smallest and largest share of the picture that a crop covers; half of the crops are
    mirrored."""


class LinearFastCard(Schedule):
    """A linear classifier on features of centre crops, extracted once; tries several rates."""

    rates: Annotated[tuple[Rate, ...], SOME] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Learning rates to try on a held-out fifth of the bank; the classifier is then trained on the
    whole bank with the best one."""


class FinetuneCard(Schedule):
    """Fine-tuning of all layers of a copy of the encoder, and of a new linear layer."""

    labels: str | None = None
    """Share of the labels to learn from, such as 10%; --labels replaces it."""
    lr: Rate = 0.01
    """Learning rate of the encoder."""
    head_lr: Rate = 0.2
    """Learning rate of the new layer."""
    epochs: Count = 20
    drops: Shares = (0.6, 0.8)
    drop: Share = 0.2
    scale: tuple[Share, Share] = (0.08, 1.0)

    @property
    def frozen(self) -> bool:
        return False


class LowshotCard(Card):
    """Support vector machines on a few pictures of each class."""

    shots: Annotated[tuple[Count, ...], SOME] = (1, 2, 4, 8, 16)
    """Numbers of pictures per class to learn from."""
    draws: Count = 5
    """How often to draw these pictures; the mean over the draws is reported."""
    cost: Positive = 0.5

    @property
    def headline(self) -> str:
        return f"top1-k{self.shots[-1]}"


Difficult = Literal["dropped", "negative"]


class SvmCard(Card):
    """One support vector machine per class of VOC07."""

    pictures: ClassVar = "voc"
    costs: Annotated[tuple[Positive, ...], SOME] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Values of C, of which each class takes the one with the best average precision over the
    folds; a single value is used as it is."""
    folds: Annotated[int, pydantic.Field(ge=2)] = 3
    train_difficult: Difficult = "negative"
    """What a training picture counts as for a class of which it has only difficult objects."""
    test_difficult: Difficult = "dropped"
    """The same for a test picture."""

    @property
    def headline(self) -> str:
        return "map"


class Voc07Card(SgdCard):
    """A linear layer with one logit per class of VOC07, trained at a constant rate."""

    pictures: ClassVar = "voc"
    train: str = "trainval"
    """List in ImageSets/Main to learn from."""
    lr: Rate = 0.05
    scale: tuple[Share, Share] = (0.08, 1.0)
    metric: Literal["all", "11"] = "all"
    """all: area under the envelope of precision; 11: its mean at 11 recalls."""
    train_difficult: Difficult = "dropped"
    test_difficult: Difficult = "dropped"

    @property
    def headline(self) -> str:
        return "map"


class ReleasedCard(Card):
    """What CLSA's released code computes on VOC07 (see `voc07_released`)."""

    pictures: ClassVar = "voc"
    train: str = "train"
    select: str = "val"
    """List in ImageSets/Main on which the best epoch is chosen."""
    epochs: Count = 100
    batch_size: Count = 16
    momentum: Fraction = 0.9
    lr: Rate = 0.05
    cosine_period: Count = 12
    """Epochs in which the rate falls to 0 along a cosine; it rises back in as many."""
    size: Annotated[int, pydantic.Field(ge=8)] = 300
    """Side of the crops in pixels."""
    moving_statistics: bool = True
    """Batch norm in training mode: its statistics drift although the weights are frozen."""

    @property
    def headline(self) -> str:
        return "per-image-ap"

    @property
    def frozen(self) -> bool:
        return not self.moving_statistics

"""Protocol cards of each kind: all that moves a number of a way of judging. Needs no torch."""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from clsa.options.config import Config, Count, Fraction, NotNegative, Positive, Share

Shares = tuple[Fraction, ...]
Rate = Annotated[float, pydantic.Field(gt=0, le=1e6)]

SOME = pydantic.Field(min_length=1)


class Card(Config):
    """What all protocols say of themselves; each kind adds what moves its numbers."""

    pictures: ClassVar[Literal["classes", "voc", "boxes"]] = "classes"
    """One class a picture, any form of `--data`; or the folders of VOC07; or of VOC or COCO."""
    about: str = ""
    """What is done, in a line."""
    source: str = ""
    """Whose values these are."""
    version: Count = 1

    @property
    def frozen(self) -> bool:
        """Whether the encoder's weights and statistics are the same after it, to the bit."""
        return True

    @property
    def headline(self) -> str:
        """The metric that tables and sweeps show."""
        return "top1"

    def settings(self) -> dict[str, Any]:
        """All that moves a number."""
        return self.model_dump(mode="json", exclude={"about", "source"})

    def hash(self, name: str) -> str:
        """The first 12 hexadecimal digits of the sha256 of name, kind and settings."""
        whole = {"name": name, "kind": type(self).__name__, **self.settings()}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


class KnnCard(Card):
    """Weighted votes of the nearest pictures."""

    neighbours: Count = 20
    """Pictures of the bank that vote."""
    temperature: Positive = 0.07
    """Votes weigh exp(cosine / this)."""
    queries: Literal["clean", "strong"] = "clean"
    """Centre crops, or one strongly augmented view of each picture."""


class LogisticCard(Card):
    """Logistic regression on features of centre crops."""

    grid: Annotated[tuple[Positive, ...], SOME] = tuple(10 ** (-k / 2) for k in range(13))
    """L2 weights tried on a held-out fifth of the bank, from the largest down."""


class SgdCard(Card):
    """Plain SGD."""

    epochs: Count = 100
    batch_size: Count = 256
    momentum: Fraction = 0.9
    weight_decay: NotNegative = 0.0


class Schedule(SgdCard):
    """Rates that fall along a cosine or in steps, moved at every epoch."""

    drops: Shares = ()
    """Where the rates fall, as shares of the epochs; nowhere: along a cosine."""
    drop: Share = 0.1
    """What they fall to there, as a share."""


class LinearCard(Schedule):
    """A linear classifier, trained on random crops seen by the frozen encoder."""

    lr: Rate = 10.0
    final_lr: NotNegative = 0.0
    """Where the cosine ends."""
    scale: tuple[Share, Share] = (0.08, 1.0)
    """Share of the picture that a crop takes; half of the crops are mirrored."""


class LinearFastCard(Schedule):
    """The same on features of centre crops, extracted once, at several rates together."""

    rates: Annotated[tuple[Rate, ...], SOME] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Tried on a held-out fifth of the bank; the best trains on the whole bank."""


class FinetuneCard(Schedule):
    """All layers of a copy of the encoder, and a new linear layer."""

    labels: str | None = None
    """Share of the labels it learns from, such as 10%; --labels takes its place."""
    lr: Rate = 0.01
    """Of the encoder."""
    head_lr: Rate = 0.2
    """Of the new layer."""
    epochs: Count = 20
    drops: Shares = (0.6, 0.8)
    drop: Share = 0.2
    scale: tuple[Share, Share] = (0.08, 1.0)

    @property
    def frozen(self) -> bool:
        return False


class LowshotCard(Card):
    """Support vector machines on few pictures of each class."""

    shots: Annotated[tuple[Count, ...], SOME] = (1, 2, 4, 8, 16)
    """Pictures of each class."""
    draws: Count = 5
    """Random choices of them; the mean is told."""
    cost: Positive = 0.5

    @property
    def headline(self) -> str:
        return f"top1-k{self.shots[-1]}"


Difficult = Literal["dropped", "negative"]


class SvmCard(Card):
    """One support vector machine a class of VOC07."""

    pictures: ClassVar = "voc"
    costs: Annotated[tuple[Positive, ...], SOME] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """C, chosen for each class by average precision over the folds; one: nothing is chosen."""
    folds: Annotated[int, pydantic.Field(ge=2)] = 3
    train_difficult: Difficult = "negative"
    """Classes of which a training picture has only difficult objects."""
    test_difficult: Difficult = "dropped"
    """The same at the test."""

    @property
    def headline(self) -> str:
        return "map"


class Voc07Card(SgdCard):
    """A linear layer with one logit a class of VOC07, at a constant rate."""

    pictures: ClassVar = "voc"
    train: str = "trainval"
    """List of ImageSets/Main to learn from."""
    lr: Rate = 0.05
    scale: tuple[Share, Share] = (0.08, 1.0)
    metric: Literal["all", "11"] = "all"
    """Area under the envelope of precision, or its mean at 11 recalls."""
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
    """List on which the best epoch is chosen."""
    epochs: Count = 100
    batch_size: Count = 16
    momentum: Fraction = 0.9
    lr: Rate = 0.05
    cosine_period: Count = 12
    """The rate goes to 0 in so many epochs along a cosine, and back."""
    size: Annotated[int, pydantic.Field(ge=8)] = 300
    """Side of the crops in pixels."""
    moving_statistics: bool = True
    """Batch norm in training mode, so that its statistics drift although weights are frozen."""

    @property
    def headline(self) -> str:
        return "per-image-ap"

    @property
    def frozen(self) -> bool:
        return not self.moving_statistics

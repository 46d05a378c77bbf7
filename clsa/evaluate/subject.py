"""What is judged and on what: one encoder before pictures, each kind of which is opened once."""

import logging
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from clsa import checkpoint, intake
from clsa.cards import Card, SvmCard, Voc07Card
from clsa.command_options import EvaluateOptions
from clsa.config import merge
from clsa.detect_cards import DetectCard
from clsa.errors import ClsaError
from clsa.evaluate import leaks
from clsa.evaluate.detect import Boxes, read_boxes
from clsa.evaluate.features import extract
from clsa.evaluate.results import results_path
from clsa.evaluate.split import Split, split, with_few_bank_labels
from clsa.evaluate.voc07 import Lists, read_lists
from clsa.options import DataOptions
from clsa.sources import Source


class Labelled(NamedTuple):
    """Features of pictures and what they show."""

    features: Float32[Tensor, "n F"]
    labels: Int64[Tensor, "n"]
    rows: Int64[np.ndarray, "n"]
    """Their numbers in the source: those that could be read."""


class Exam:
    """The pictures that encoders are judged on; each kind is opened when a protocol needs it.

    Args:
        options: which pictures, what seed.
        facts: of the run, whose pictures they are where `options` name none.
    """

    def __init__(self, options: EvaluateOptions, facts: checkpoint.EncoderFacts):
        self.options, self.facts = options, facts
        self.data = data_of(options.data, facts)
        self._few: dict[str, Split] = {}
        self._lists: dict[tuple[str, str | None], Lists] = {}
        self._boxes: dict[tuple[str, tuple[str, ...]], Boxes] = {}
        self._leaked: dict[int, int | None] = {}

    @cached_property
    def _train(self) -> Source:
        return intake.open_source(self.data.data, "train", self.data)

    @cached_property
    def everything(self) -> Split:
        """Pictures with a class each, all labels known."""
        val = intake.open_val(self.data, self._train.classes)
        return split(self._train, val, self.options.seed)

    def classes(self, labels: str | None) -> Split:
        """The same, learning from few labels only; drawn with the run's seed, as it drew its own.

        Args:
            labels: a share or a list (see `with_few_labels`); None: all.
        """
        if labels is None:
            return self.everything
        if labels not in self._few:
            self._few[labels] = with_few_bank_labels(self.everything, labels, self.facts.seed)
        return self._few[labels]

    def voc(self, card: Voc07Card | SvmCard) -> Lists:
        """Pictures of VOC07 of several classes each."""
        key = (card.train, card.select) if isinstance(card, Voc07Card) else ("trainval", None)
        if key not in self._lists:
            self._lists[key] = read_lists(self.options.data, *key)
        return self._lists[key]

    def boxes(self, card: DetectCard) -> Boxes:
        """Pictures of VOC or COCO with boxes."""
        key = card.measure, card.years
        if key not in self._boxes:
            self._boxes[key] = read_boxes(self.options.data, card)
        return self._boxes[key]

    def leaked(self, parts: Split | Lists | Boxes) -> int | None:
        """How many of the judged pictures the run learned from, told once; None: not looked."""
        key = id(parts.queries)
        if key not in self._leaked:
            self._leaked[key] = self._look(parts) if self.options.leaks != "off" else None
        return self._leaked[key]

    def _look(self, parts: Split | Lists | Boxes) -> int | None:
        log, data = logging.getLogger("clsa"), self.facts.data
        try:
            learned = intake.open_source(data.data, "train", data)
        except ClsaError as error:
            log.warning("warning: leaks not looked for, as %s", error)
            return None
        count, folder = len(parts.queries), results_path(self.options.run).parent
        if parts.name == "holdout" and learned.digest() == self._train.digest():
            told = "the %d evaluation pictures are held out of the pretraining set: the encoder saw"
            log.warning(f"note: {told} their pixels, never their labels", count)
            return count
        if self.options.leaks == "auto" and len(learned) > leaks.LIMIT:
            told = "note: leaks not looked for among %d pretraining pictures (--leaks all does)"
            log.warning(told, len(learned))
            return None
        known = leaks.remembered(learned, folder / "thumbnails.npy")
        found = leaks.find_leaks(known, leaks.thumbnails(parts.queries))
        leaks.warn_of_leaks(found, parts.queries, learned)
        return found.count


class Subject:
    """One encoder on the device; features of pictures are extracted once, when they are needed."""

    def __init__(self, encoder: nn.Module, exam: Exam, device: torch.device):
        self.encoder, self.exam, self.device = encoder.to(device), exam, device
        self.options, self.views = exam.options, exam.facts.views
        self._seen: dict[tuple[int, bool], Labelled] = {}

    def parts(self, card: Card) -> Split:
        """The pictures of a card: with the labels of `--labels`, or its own share of them."""
        return self.exam.classes(self.options.labels or getattr(card, "labels", None))

    def seen(
        self, source: Source, strong: bool = False
    ) -> tuple[Float32[Tensor, "n F"], Int64[Tensor, "n"]]:
        """`features` and labels alone."""
        return self.features(source, strong)[:2]

    def arrays(self, source: Source) -> tuple[Float32[np.ndarray, "n F"], Int64[np.ndarray, "n"]]:
        """`seen` of centre crops, for NumPy."""
        features, labels = self.seen(source)
        return features.cpu().numpy(), labels.cpu().numpy()

    def features(self, source: Source, strong: bool = False) -> Labelled:
        """Features of all readable pictures: of centre crops, or of strongly augmented views.

        Args:
            source: of the exam, which keeps it.
        """
        key = id(source), strong
        if key not in self._seen:
            rows, features = extract(
                self.encoder, source, np.arange(len(source), dtype=np.int64), self.views,
                self.device, self.options.batch_size, self.options.seed if strong else None,
                shared=True,
            )  # fmt: skip
            labels = torch.from_numpy(source.labels[rows]).to(self.device)
            self._seen[key] = Labelled(features, labels, rows)
        return self._seen[key]


def data_of(given: DataOptions, facts: checkpoint.EncoderFacts) -> DataOptions:
    """The pictures named on the command line, or else those that the run learned from.

    In the second case options given beside them (`val`, `workers`, ...) win over the run's.
    """
    if given.data:
        return given
    values = merge(
        facts.data.model_dump(mode="json"), given.model_dump(mode="json", exclude_defaults=True)
    )
    return DataOptions.parse(values, "encoder.safetensors: data")

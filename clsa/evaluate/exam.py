"""What evaluation works on: encoders, and the pictures they are judged on, each opened once."""

import logging
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from clsa.evaluate.classify.voc07 import Lists, read_lists
from clsa.evaluate.detect.detect import Boxes, read_boxes
from clsa.evaluate.features import leaks
from clsa.evaluate.features.extract import extract
from clsa.evaluate.features.split import Split, split, with_few_bank_labels
from clsa.evaluate.results.records import results_path
from clsa.options.cards import Card
from clsa.options.commands import EvaluateOptions
from clsa.options.detection_cards import DetectCard
from clsa.pictures import opening
from clsa.pictures.folders import tell
from clsa.pictures.sources import Source
from clsa.runs import saved_encoder
from clsa.system.errors import ClsaError


class Labelled(NamedTuple):
    """Features and labels of pictures."""

    features: Float32[Tensor, "n F"]
    labels: Int64[Tensor, "n"]
    rows: Int64[np.ndarray, "n"]
    """Numbers of these pictures, the readable ones, in the source."""


Pictures = Split | Lists | Boxes


class Exam:
    """The pictures that encoders are judged on; each kind is opened when a protocol needs it.

    Args:
        options: which pictures, what seed.
        facts: of the run; its pictures are used if `options` name none.
        cards: the protocols that will be used.

    Raises:
        ClsaError: 2 if the pictures or options do not suit all cards.
    """

    def __init__(
        self, options: EvaluateOptions, facts: saved_encoder.EncoderFacts, cards: dict[str, Card]
    ):
        self.options, self.facts = options, facts
        self.data = saved_encoder.data_of(options.data, facts)
        self._opened: dict[tuple, Pictures] = {}
        self._leaked: dict[int, int | None] = {}
        kinds = {card.pictures for card in cards.values()}
        if len(kinds) > 1:
            names = ", ".join(
                next(name for name, card in cards.items() if card.pictures == kind)
                for kind in sorted(kinds)
            )
            why = "they take different kinds of pictures"
            raise ClsaError(f"--protocol {names}", why, "use one command for each kind")
        if options.labels is not None and "classes" not in kinds:
            why = "VOC's and COCO's lists already name the pictures to learn from"
            raise ClsaError(f"--labels {options.labels}", why, "leave it out")
        if "classes" in kinds and _is_voc(self.data.data):
            hint = "use the voc07 or detect cards (clsa protocols)"
            raise ClsaError(self.data.data, "VOC's pictures have several classes", hint)

    def pictures(self, card: Card) -> Pictures:
        """The pictures that a card learns from and is judged on."""
        key = self._key(card)
        if key not in self._opened:
            self._opened[key] = self._open(card)
        return self._opened[key]

    def _key(self, card: Card) -> tuple:
        if isinstance(card, DetectCard):
            return card.measure, card.years, card.library
        if card.pictures == "voc":
            return _lists_of(card)
        return (self.options.labels or getattr(card, "labels", None),)

    def _open(self, card: Card) -> Pictures:
        if isinstance(card, DetectCard):
            return read_boxes(self.options.data, card)
        if card.pictures == "voc":
            return read_lists(self.options.data, *_lists_of(card))
        parts, (labels,) = self._everything, self._key(card)
        if labels is not None:  # with the run's seed, which drew the run's own few labels
            parts = with_few_bank_labels(parts, labels, self.facts.seed)
        if len(np.unique(parts.bank.labels)) < 2:
            why = f"{len(parts.bank)} labelled pictures of a single class"
            raise ClsaError("nothing to tell apart", why, "give labels of two classes or more")
        return parts

    @cached_property
    def _everything(self) -> Split:
        val = opening.open_val(self.data, self._train.classes)
        tell(self._train, "training pictures")
        if val is not None:
            tell(val, "val pictures")
        return split(self._train, val, self.options.seed)

    @cached_property
    def _train(self) -> Source:
        return opening.open_source(self.data.data, "train", self.data)

    def leaked(self, parts: Pictures) -> int | None:
        """How many of the judged pictures the run learned from; None if not searched.

        The search for a set of pictures, and its message, happen only once.
        """
        key = id(parts.queries)
        if key not in self._leaked:
            self._leaked[key] = self._look(parts) if self.options.leaks != "off" else None
        return self._leaked[key]

    def _look(self, parts: Pictures) -> int | None:
        log, data = logging.getLogger("clsa"), self.facts.data
        try:
            learned = opening.open_source(data.data, "train", data)
        except ClsaError as error:
            log.warning("warning: cannot search for leaks: %s", error)
            return None
        count, folder = len(parts.queries), results_path(self.options.run).parent
        if parts.name == "holdout" and learned.digest() == self._train.digest():
            note = "the %d evaluation pictures are held out of the pretraining set: the encoder saw"
            log.warning(f"note: {note} their pixels, never their labels", count)
            return count
        if self.options.leaks == "auto" and len(learned) > leaks.LIMIT:
            note = "note: no search for leaks among %d pretraining pictures (--leaks all starts it)"
            log.warning(note, len(learned))
            return None
        known = leaks.remembered(learned, folder / "thumbnails.npy")
        found = leaks.find_leaks(known, leaks.thumbnails(parts.queries))
        leaks.warn_of_leaks(found, parts.queries, learned)
        return found.count


class Subject:
    """One encoder on the device; features are extracted when first needed, and kept."""

    def __init__(self, encoder: nn.Module, exam: Exam, device: torch.device):
        self.encoder, self.exam, self.device = encoder.to(device), exam, device
        self.options, self.views = exam.options, exam.facts.views
        self._seen: dict[tuple[int, bool], Labelled] = {}

    def parts(self, card: Card) -> Split:
        """The pictures of a card whose pictures have one class each."""
        parts = self.exam.pictures(card)
        assert isinstance(parts, Split)
        return parts

    def lists(self, card: Card) -> Lists:
        """The pictures of a card that uses VOC07."""
        lists = self.exam.pictures(card)
        assert isinstance(lists, Lists)
        return lists

    def boxes(self, card: Card) -> Boxes:
        """The pictures of a card that detects objects."""
        boxes = self.exam.pictures(card)
        assert isinstance(boxes, Boxes)
        return boxes

    def seen(
        self, source: Source, strong: bool = False
    ) -> tuple[Float32[Tensor, "n F"], Int64[Tensor, "n"]]:
        """Features and labels of `features`, without the rows."""
        return self.features(source, strong)[:2]

    def arrays(self, source: Source) -> tuple[Float32[np.ndarray, "n F"], Int64[np.ndarray, "n"]]:
        """`seen` of centre crops, as NumPy arrays."""
        features, labels = self.seen(source)
        return features.cpu().numpy(), labels.cpu().numpy()

    def features(self, source: Source, strong: bool = False) -> Labelled:
        """Features of all readable pictures: of centre crops, or of strongly augmented views.

        Args:
            source: must belong to the exam, because features are kept by its identity.
            strong: take strongly augmented views.
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


def _lists_of(card: Card) -> tuple[str, str | None]:
    """Names of the lists that a VOC07 card learns from and selects an epoch on."""
    return getattr(card, "train", "trainval"), getattr(card, "select", None)


def _is_voc(spec: str) -> bool:
    """Whether a folder has the layout of VOC, for one year or several."""
    root = Path(spec)
    return (root / "JPEGImages").is_dir() or any(root.glob("VOC20??"))

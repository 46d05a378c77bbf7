"""Evaluate a run: judge its trained and its initial encoder, and write results.json."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from clsa.evaluate.classify.finetune import finetune
from clsa.evaluate.classify.knn import knn
from clsa.evaluate.classify.linear import linear
from clsa.evaluate.classify.linear_fast import linear_fast
from clsa.evaluate.classify.logistic import logistic
from clsa.evaluate.classify.svm import lowshot, voc07_svm
from clsa.evaluate.classify.voc07 import voc07
from clsa.evaluate.classify.voc07_released import voc07_released
from clsa.evaluate.detect.detect import detect
from clsa.evaluate.exam import Exam, Pictures, Subject
from clsa.evaluate.features.extract import frozen
from clsa.evaluate.results.heads import Head, HeadFacts, save_head
from clsa.evaluate.results.records import (
    Found,
    Record,
    append_records,
    findings,
    read_records,
    results_path,
)
from clsa.learning.models import build_encoder
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
from clsa.options.commands import EvaluateOptions
from clsa.options.detection_cards import DetectCard
from clsa.options.protocols import cards_of, departures
from clsa.runs import digests, saved_encoder
from clsa.system import dist
from clsa.system.machine import keep_freed_memory


class Verdict(NamedTuple):
    """Result of one protocol for one encoder."""

    found: list[Found]
    n: int
    """Number of pictures judged."""
    head: Head | None = None
    """The classifier that was learned, for `clsa predict`."""
    moved: nn.Module | None = None
    """The encoder after the protocol, if the protocol changed a copy of it."""


def by_neighbours(subject: Subject, card: KnnCard) -> Verdict:
    """Nearest neighbours by weighted and plain votes.

    Strong queries are judged with a clean bank, and with a strong one too.
    """
    parts, strong = subject.parts(card), card.queries == "strong"
    queries, count = subject.seen(parts.queries, strong), len(parts.classes)
    found = knn(subject.seen(parts.bank), queries, count, card)
    if strong:
        against = knn(subject.seen(parts.bank, strong), queries, count, card)
        found.append(against[0]._replace(metric="top1-strong-bank"))
    return Verdict(found, len(queries[1]))


def by_logistic(subject: Subject, card: LogisticCard) -> Verdict:
    """Logistic regression."""
    parts = subject.parts(card)
    bank, queries = subject.seen(parts.bank), subject.seen(parts.queries)
    found, layer = logistic(bank, queries, len(parts.classes), card, subject.options.seed)
    return Verdict(found, len(queries[1]), Head(layer))


def by_linear_fast(subject: Subject, card: LinearFastCard) -> Verdict:
    """A linear probe on features extracted once."""
    parts = subject.parts(card)
    bank, queries = subject.seen(parts.bank), subject.seen(parts.queries)
    found, layer = linear_fast(bank, queries, len(parts.classes), card, subject.options.seed)
    return Verdict(found, len(queries[1]), Head(layer))


def by_linear(subject: Subject, card: LinearCard) -> Verdict:
    """A linear probe on random crops."""
    parts, seed = subject.parts(card), subject.options.seed
    queries, size = subject.seen(parts.queries), subject.views.size
    found, layer = linear(subject.encoder, parts.bank, queries, size, card, seed, subject.exam.data)
    return Verdict(found, len(queries[1]), Head(layer))


def by_finetuning(subject: Subject, card: FinetuneCard) -> Verdict:
    """Fine-tuning of all layers of a copy, with a new linear layer."""
    parts, seed = subject.parts(card), subject.options.seed
    found, n, head = finetune(subject.encoder, parts, subject.views, card, seed, subject.exam.data)
    return Verdict(found, n, head, head.encoder)


def by_few_shots(subject: Subject, card: LowshotCard) -> Verdict:
    """Support vector machines on few pictures of each class."""
    parts = subject.parts(card)
    bank, queries = subject.arrays(parts.bank), subject.arrays(parts.queries)
    found = lowshot(bank, queries, len(parts.classes), card, subject.options.seed)
    return Verdict(found, len(queries[1]))


def by_voc07(subject: Subject, card: Voc07Card) -> Verdict:
    """A linear layer on VOC07."""
    lists, seed, size = subject.lists(card), subject.options.seed, subject.views.size
    features, _, rows = subject.features(lists.queries)
    data = subject.options.data
    found, layer = voc07(subject.encoder, lists, (features, rows), size, card, seed, data)
    return Verdict(found, len(rows), Head(layer))


def by_released_code(subject: Subject, card: ReleasedCard) -> Verdict:
    """What CLSA's code computes; without a head, as `clsa predict` prepares pictures otherwise."""
    lists = subject.lists(card)
    found, n, moved = voc07_released(subject.encoder, lists, card, subject.options.seed)
    return Verdict(found, n, moved=moved)


def by_machines(subject: Subject, card: SvmCard) -> Verdict:
    """One support vector machine per class of VOC07."""
    lists = subject.lists(card)
    seen = []
    for marked in (lists.train, lists.test):
        features, _, rows = subject.features(marked.source)
        seen.append((features.cpu().numpy(), marked.targets[rows]))
    return Verdict(voc07_svm(seen[0], seen[1], card), len(seen[1][1]))


def by_detection(subject: Subject, card: DetectCard) -> Verdict:
    """A detector around a copy of the encoder."""
    boxes, seed = subject.boxes(card), subject.options.seed
    found = detect(subject.encoder, boxes.train, boxes.test, card, seed, subject.device)
    known = {name: value for name, value in found.items() if value == value}  # not NaN
    return Verdict(findings(known, "last"), len(boxes.test.things))


JUDGES: dict[type[Card], Callable[[Subject, Any], Verdict]] = {
    KnnCard: by_neighbours,
    LogisticCard: by_logistic,
    LinearFastCard: by_linear_fast,
    LinearCard: by_linear,
    FinetuneCard: by_finetuning,
    LowshotCard: by_few_shots,
    Voc07Card: by_voc07,
    ReleasedCard: by_released_code,
    SvmCard: by_machines,
    DetectCard: by_detection,
}


def evaluate(options: EvaluateOptions) -> list[Record]:
    """Judge a run's encoder and its random initialisation by every protocol of `options`.

    When a protocol has judged both, their records are added to results.json, in the run folder or
    next to the encoder's file. The classifier of the trained encoder is written to heads/NAME.
    With several processes (torchrun), each encodes a share of the pictures. Frozen classification
    then gives the same numbers as one process, fine-tuning agrees up to rounding, and detection
    differs, because each process samples its own regions. A check makes sure that weights and
    batch-norm statistics of the encoder stay the same; protocols change only copies of it.

    Raises:
        ClsaError: if there is no encoder, no pictures, or no labels; 65 if results.json holds
            something else.
    """
    results = results_path(options.run)
    read_records(results)  # fails before the work if the file is damaged
    cards = cards_of(options.protocol, options.change)
    trained, facts = saved_encoder.load_encoder_facts(options.run)
    device = dist.pick_device(options.device)
    keep_freed_memory()
    encoders = {"random": build_encoder(facts.model, facts.seed)} if options.random else {}
    records: list[Record] = []
    with dist.process_group(device):
        exam = Exam(options, facts, cards)
        subjects = {
            name: Subject(encoder, exam, device)
            for name, encoder in {**encoders, "trained": trained}.items()
        }
        own = {name: digests.digest(each.encoder.state_dict())
                   for name, each in subjects.items()}  # fmt: skip
        pictures = {name: exam.pictures(card) for name, card in cards.items()}
        if dist.rank() == 0:
            append_records(results, [])  # fails at once if the folder is not writable
        for protocol, card in cards.items():
            parts, first = pictures[protocol], dist.rank() == 0
            leaked, data_digest = exam.leaked(parts) if first else None, parts.digest()
            fresh: list[Record] = []
            for name, subject in subjects.items():
                before = after = own[name]
                with frozen(subject.encoder):  # raises if the encoder changes
                    verdict = JUDGES[type(card)](subject, card)
                if verdict.moved is not None:
                    after = digests.digest(verdict.moved.state_dict())
                made = Record(
                    protocol, card.hash(protocol), _settings(options, protocol, card),
                    "", 0, "", None, name, parts.name, verdict.n, len(parts.bank), options.seed,
                    before, after, data_digest, leaked,
                )  # fmt: skip
                fresh += [made._replace(**found._asdict()) for found in verdict.found]
                if name == "trained" and verdict.head and first:
                    keep(verdict.head, made, parts, options, facts)
            if first:
                append_records(results, fresh)
            records += fresh
    return records


def _settings(options: EvaluateOptions, protocol: str, card: Card) -> str:
    labels = f"labels={options.labels}" if options.labels else ""
    return " ".join(filter(None, [labels, departures(protocol, card)]))


def keep(
    head: Head,
    made: Record,
    parts: Pictures,
    options: EvaluateOptions,
    facts: saved_encoder.EncoderFacts,
) -> None:
    """Save the classifier of the trained encoder."""
    about = HeadFacts(
        protocol=made.protocol, card=made.card, settings=made.settings,
        classes=tuple(parts.classes), several=parts.several,
        encoder_digest=made.encoder_digest, model=facts.model, views=facts.views,
    )  # fmt: skip
    save_head(options.run, head, about)

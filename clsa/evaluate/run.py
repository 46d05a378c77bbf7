"""From a run folder to results.json: the trained encoder against its random initialisation."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from clsa import checkpoint, dist, intake
from clsa.command_options import EvaluateOptions
from clsa.config import merge
from clsa.evaluate.features import extract, frozen
from clsa.evaluate.finetune import finetune
from clsa.evaluate.knn import knn, knn_predict
from clsa.evaluate.linear import linear
from clsa.evaluate.linear_fast import linear_fast
from clsa.evaluate.results import Record, accuracies, append_records, read_records, results_path
from clsa.evaluate.split import Split, split, with_few_bank_labels
from clsa.host import keep_freed_memory
from clsa.models import build_encoder
from clsa.options import DataOptions, ViewOptions
from clsa.sources import Source

PROBE_BANK, PROBE_QUERIES, PROBE_NEIGHBOURS = 10_000, 2_000, 20


class Labelled(NamedTuple):
    """Features of pictures and what they show."""

    features: Float32[Tensor, "n F"]
    labels: Int64[Tensor, "n"]


class Subject:
    """One frozen encoder before one set of pictures; features are extracted once, when needed."""

    def __init__(
        self,
        encoder: nn.Module,
        split: Split,
        views: ViewOptions,
        data: DataOptions,
        options: EvaluateOptions,
        device: torch.device,
    ):
        self.encoder = encoder.to(device)
        self.split, self.views, self.data, self.options = split, views, data, options
        self.device, self.num_classes = device, len(split.bank.classes)

    def _labelled(self, source: Source, strong_seed: int | None = None) -> Labelled:
        everything = np.arange(len(source), dtype=np.int64)
        size = self.options.batch_size
        rows, features = extract(
            self.encoder, source, everything, self.views, self.device, size, strong_seed
        )
        return Labelled(features, torch.from_numpy(source.labels[rows]).to(self.device))

    @cached_property
    def bank(self) -> Labelled:
        """What classifiers learn from, centre crops."""
        return self._labelled(self.split.bank)

    @cached_property
    def queries(self) -> Labelled:
        """What they are judged on, centre crops."""
        return self._labelled(self.split.queries)

    def knn(self, strong: bool) -> dict[str, float]:
        """Clean or strongly augmented queries against a clean bank."""
        queries = self._labelled(self.split.queries, self.options.seed) if strong else self.queries
        neighbours, temperature = self.options.neighbours, self.options.knn_temperature
        return knn(self.bank, queries, self.num_classes, neighbours, temperature)

    def linear_fast(self) -> dict[str, float]:
        """Logistic regression."""
        return linear_fast(self.bank, self.queries, self.num_classes, self.options.seed)

    def linear(self) -> dict[str, float]:
        """The paper's SGD."""
        return linear(
            self.encoder, self.split.bank, self.queries, self.views.size, self.options, self.data
        )

    def finetune(self) -> dict[str, float]:
        """All layers of a copy, on few labels."""
        return finetune(self.encoder, self.split, self.views, self.options, self.data)


PROTOCOLS: dict[str, Callable[[Subject], dict[str, float]]] = {
    "knn": lambda subject: subject.knn(strong=False),
    "knn-strong": lambda subject: subject.knn(strong=True),
    "linear-fast": Subject.linear_fast,
    "linear": Subject.linear,
    "finetune": Subject.finetune,
}
_KNN_SETTINGS = ("neighbours", "knn_temperature")
SETTINGS = {
    "knn": _KNN_SETTINGS,
    "knn-strong": _KNN_SETTINGS,
    "linear-fast": (),
    "linear": ("linear_epochs", "linear_lr", "batch_size"),
    "finetune": ("finetune_epochs", "finetune_lr", "finetune_head_lr", "batch_size"),
}


def evaluate(options: EvaluateOptions) -> list[Record]:
    """Judge a run's encoder by every protocol of `options`, beside its random initialisation.

    The records go to results.json too, in the run folder or beside the encoder's file. Weights and
    batch-norm statistics are checked to be the same before and after.

    Raises:
        ClsaError: without an encoder, without pictures, or without labels; 65 when there is a
            results.json that holds something else.
    """
    results = results_path(options.run)
    read_records(results)  # a damaged one is reported before the work, not after it
    trained, facts = checkpoint.load_encoder_facts(options.run)
    device = dist.pick_device(options.device)
    keep_freed_memory()
    views, data = facts.views, data_of(options.data, facts)
    train = intake.open_source(data.data, "train", data)
    parts = split(train, intake.open_val(data, train.classes), options.seed)
    if options.labels is not None:
        parts = with_few_bank_labels(parts, options.labels, facts.seed)
    encoders = {"trained": trained}
    if options.random:
        encoders = {"random": build_encoder(facts.model, facts.seed), **encoders}
    data_digest = parts.digest()
    records = []
    for name, encoder in encoders.items():
        encoder_digest = checkpoint.digest(encoder.state_dict())
        subject = Subject(encoder, parts, views, data, options, device)
        with frozen(encoder):
            for protocol in options.protocols:
                found = PROTOCOLS[protocol](subject)
                named = (*SETTINGS[protocol], *(["labels"] if options.labels else []))
                settings = " ".join(f"{key}={getattr(options, key)}" for key in named)
                records += [
                    Record(
                        protocol, metric, value, name, parts.name, len(subject.queries.labels),
                        options.seed, settings, encoder_digest, data_digest,
                    )
                    for metric, value in found.items()
                ]  # fmt: skip
    append_records(results, records)
    return records


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


def probe(encoder: nn.Module, parts: Split, views: ViewOptions, device: torch.device) -> float:
    """Top-1 in percent of weighted 20-NN on centre crops, cheap enough for every epoch.

    At most 10,000 pictures in the bank and 2,000 queries, spread evenly over the set: always the
    same ones.

    Args:
        encoder: in any mode; left as it was.
    """
    bank, queries, _ = parts
    with frozen(encoder):
        rows, known = extract(encoder, bank, _spread(len(bank), PROBE_BANK), views, device)
        asked, features = extract(
            encoder, queries, _spread(len(queries), PROBE_QUERIES), views, device
        )
    labels = torch.from_numpy(bank.labels[rows]).to(device)
    scores = knn_predict(features, known, labels, len(bank.classes), PROBE_NEIGHBOURS)
    return accuracies(scores.argmax(1).cpu(), torch.from_numpy(queries.labels[asked]))["top1"]


def _spread(count: int, limit: int) -> Int64[np.ndarray, "n"]:
    """At most `limit` of the numbers below `count`, evenly spaced."""
    return np.arange(count) if count <= limit else np.arange(limit) * count // limit

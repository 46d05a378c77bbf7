"""The online probe: measure how good the encoder is after epochs of a run."""

import numpy as np
import torch
from jaxtyping import Int64
from torch import nn

from clsa.evaluate.classify.knn import knn_predict
from clsa.evaluate.features.extract import extract, frozen
from clsa.evaluate.features.split import Split, split
from clsa.evaluate.results.records import Record, accuracies, read_records
from clsa.options.run import RunOptions, ViewOptions
from clsa.pictures.opening import open_val
from clsa.pictures.sources import Source
from clsa.runs import digests
from clsa.runs.journal import Journal
from clsa.runs.state import State
from clsa.system.errors import ClsaError
from clsa.system.signals import Asked

PROBE_BANK, PROBE_QUERIES, PROBE_NEIGHBOURS = 10_000, 2_000, 20


class OnlineProbe:
    """The online probe: 20-NN accuracy after an epoch, on rank 0, if there are labels.

    Raises:
        ClsaError: before the first step, when `--val` is given and cannot be used.
    """

    def __init__(
        self, state: State, source: Source, options: RunOptions, device: torch.device,
        journal: Journal,
    ):  # fmt: skip
        self.state, self.options, self.device, self.journal = state, options, device, journal
        self.every = options.probe_every
        self.records: list[Record] = []  # of the last probe, for results.json
        has_val = options.data.val is not None
        if not has_val and not (source.labels >= 0).any():
            self.every = 0
        if self.every:
            read_records(journal.folder.results)  # report a damaged file now, not at the end
            try:
                self.parts = split(source, open_val(options.data, source.classes), seed=0)
                self.data_digest = self.parts.digest()
            except ClsaError as error:
                if has_val:
                    raise
                journal.say(f"no online probe: {error}")
                self.every = 0

    def __call__(self, epoch: int) -> bool:
        """Evaluate after `epoch` epochs if it is due; return whether it is the best so far."""
        if not divides(self.every, epoch):
            return False
        encoder = self.state.method.network.encoder
        try:
            accuracy = probe(encoder, self.parts, self.options.views, self.device)
        except Asked as signal:
            self.journal.say(f"epoch {epoch}: no online probe, {signal} came during it")
            return False
        self.journal.write({"step": self.state.step, "epoch": epoch, "knn": accuracy})
        self.journal.say(f"epoch {epoch}: 20-NN {accuracy:.1f} %")
        num_queries = min(len(self.parts.queries), PROBE_QUERIES)
        num_bank = min(len(self.parts.bank), PROBE_BANK)
        digest = digests.digest(encoder.state_dict())
        self.records = [
            Record(
                "knn-online", "", "", "top1", accuracy, "", None, "trained", self.parts.name,
                num_queries, num_bank, 0, digest, digest, self.data_digest, None,
            )
        ]  # fmt: skip
        better = accuracy > self.state.best
        self.state.best = max(accuracy, self.state.best)
        return better


def divides(every: int, epoch: int) -> bool:
    """Whether `epoch` is a multiple of `every`; never if `every` is 0."""
    return every > 0 and epoch % every == 0


def probe(encoder: nn.Module, parts: Split, views: ViewOptions, device: torch.device) -> float:
    """Top-1 in percent of weighted 20-NN on centre crops, cheap enough for every epoch.

    The bank has at most 10,000 pictures and there are at most 2,000 queries, spread evenly over the
    set and always the same.

    Args:
        encoder: in any mode; it keeps its mode.
    """
    bank, queries, _ = parts
    with frozen(encoder):
        bank_rows, bank_features = extract(
            encoder, bank, _spread(len(bank), PROBE_BANK), views, device
        )
        query_rows, features = extract(
            encoder, queries, _spread(len(queries), PROBE_QUERIES), views, device
        )
    labels = torch.from_numpy(bank.labels[bank_rows]).to(device)
    scores = knn_predict(features, bank_features, labels, len(bank.classes), PROBE_NEIGHBOURS)
    return accuracies(scores.argmax(1).cpu(), torch.from_numpy(queries.labels[query_rows]))["top1"]


def _spread(count: int, limit: int) -> Int64[np.ndarray, "n"]:
    """At most `limit` of the numbers below `count`, evenly spaced."""
    return np.arange(count) if count <= limit else np.arange(limit) * count // limit

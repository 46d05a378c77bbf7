"""The online probe: how good the encoder is, after each epoch of a run."""

import torch

from clsa import checkpoint
from clsa.errors import ClsaError
from clsa.evaluate.results import Record
from clsa.evaluate.run import PROBE_QUERIES, probe
from clsa.evaluate.split import split
from clsa.intake import open_val
from clsa.journal import Journal
from clsa.options import RunOptions
from clsa.sources import Source
from clsa.state import State


class Judge:
    """The online probe: 20-NN accuracy after an epoch, on rank 0, where there are labels.

    Raises:
        ClsaError: before the first step, when `--val` is given and cannot judge.
    """

    def __init__(
        self, state: State, source: Source, options: RunOptions, device: torch.device,
        journal: Journal,
    ):  # fmt: skip
        self.state, self.options, self.device, self.journal = state, options, device, journal
        self.every = options.probe_every
        self.records: list[Record] = []  # of the last probe, for results.json
        given = options.data.val is not None
        if not given and not (source.labels >= 0).any():
            self.every = 0
        if self.every:
            try:
                self.parts = split(source, open_val(options.data, source.classes), seed=0)
                self.data_digest = self.parts.digest()
            except ClsaError as error:
                if given:
                    raise
                journal.say(f"no online probe: {error}")
                self.every = 0

    def __call__(self, epoch: int) -> bool:
        """Judge the encoder after `epoch` epochs if it is time; whether it is the best so far."""
        if not divides(self.every, epoch):
            return False
        encoder = self.state.method.network.encoder
        accuracy = probe(encoder, self.parts, self.options.views, self.device)
        self.journal.write({"step": self.state.step, "epoch": epoch, "knn": accuracy})
        self.journal.say(f"epoch {epoch}: 20-NN {accuracy:.1f} %")
        num_queries = min(len(self.parts.queries), PROBE_QUERIES)
        digests = checkpoint.digest(encoder.state_dict()), self.data_digest
        name, split_name = "knn-online", self.parts.name
        self.records = [
            Record(name, "top1", accuracy, "trained", split_name, num_queries, 0, "", *digests)
        ]
        better = accuracy > self.state.best
        self.state.best = max(accuracy, self.state.best)
        return better


def divides(every: int, epoch: int) -> bool:
    """Whether every so many epochs (0: never) falls on this one."""
    return every > 0 and epoch % every == 0

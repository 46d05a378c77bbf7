"""A run's networks with their projectors, as the run started and as its checkpoints hold them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from clsa.learning.models import Network, build_encoder
from clsa.options.config import read_yaml
from clsa.options.run import ModelOptions, RunOptions
from clsa.runs import checkpoint, digests, saved_encoder
from clsa.runs.folder import RunFolder
from clsa.system.errors import ClsaError, Exit

KEY_NAMES = ("key_network", "teacher")
DEFAULT_TEMPERATURE = 0.2


class Snapshot(NamedTuple):
    """One state of what a run trains."""

    name: str
    """random: at the start of the run; trained: as it is now."""
    encoder: nn.Module
    query: Network | None
    """Encoder and projector; None if only an encoder was given."""
    key: Network | None
    """The network that encodes keys; the query network if the method has no other."""
    digest: str
    """Digest of the encoder, as in results.json."""


def snapshot_of(
    name: str, encoder: nn.Module, query: Network | None = None, key: Network | None = None
) -> Snapshot:
    """A snapshot with its encoder's digest."""
    return Snapshot(name, encoder, query, key, digests.digest(encoder.state_dict()))


class Opened(NamedTuple):
    """A run, or the file of an encoder, opened for inspection."""

    facts: saved_encoder.EncoderFacts
    options: RunOptions | None
    """None if only an encoder was given."""
    snapshots: list[Snapshot]
    """The random one, then the trained one."""

    @property
    def temperature(self) -> float:
        """Temperature of the method's main loss; 0.2 if it has none (BYOL, SimSiam, supervised)."""
        method = None if self.options is None else self.options.method
        return float(getattr(method, "temperature", DEFAULT_TEMPERATURE))


def open_run(path: Path) -> Opened:
    """The start of a run and its newest checkpoint; without a checkpoint, its encoder file.

    Raises:
        ClsaError: 66 when there is neither, 77 when a file is not what clsa writes, 65 when the
            checkpoint does not fit the run's config.yaml.
    """
    folder = RunFolder(path)
    saved = checkpoint.load_newest(folder.checkpoints) if folder.config.is_file() else None
    if saved is None:
        trained, facts = saved_encoder.load_encoder_facts(path)
        random = build_encoder(facts.model, facts.seed)
        snapshots = [snapshot_of("random", random), snapshot_of("trained", trained)]
        return Opened(facts, None, snapshots)
    options = RunOptions.parse(read_yaml(folder.config), str(folder.config))
    state = saved.state["method"]
    query, key = _networks(state, options, saved.path)
    start = Network(_model_of(state, options), options.seed)
    facts = saved_encoder.EncoderFacts.of(options, saved.state["step"], saved.state["data_digest"])
    snapshots = [
        snapshot_of("random", start.encoder, start, start),
        snapshot_of("trained", query.encoder, query, key),
    ]
    return Opened(facts, options, snapshots)


def kept_encoders(path: Path, options: RunOptions) -> Iterator[tuple[str, nn.Module]]:
    """Name and encoder of every whole checkpoint of a run, oldest first; one at a time."""
    for saved in checkpoint.load_each(RunFolder(path).checkpoints):
        query, _ = _networks(saved.state["method"], options, saved.path)
        yield f"step {saved.state['step']}", query.encoder


def _model_of(state: dict[str, Any], options: RunOptions) -> ModelOptions:
    """The run's model, without a projector where its method trains none (supervised)."""
    if any(re.match(r"(base\.)*network\.projector\.", name) for name in state):
        return options.model
    return options.model.model_copy(update={"projector_layers": 0})


def _networks(state: dict[str, Any], options: RunOptions, path: Path) -> tuple[Network, Network]:
    """Query and key network of the innermost method in a method's state."""
    marks = [re.match(r"((?:base\.)*)network\.", name) for name in state]
    inner = max((mark[1] for mark in marks if mark), key=len, default="")
    model = _model_of(state, options)

    def network(name: str) -> Network | None:
        start = f"{inner}{name}."
        weights = {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
        if not weights:
            return None
        found = Network(model, seed=0)
        found.load_state_dict(weights)
        return found.requires_grad_(False)

    try:
        query = network("network")
        keys = [found for found in map(network, KEY_NAMES) if found is not None]
    except RuntimeError:
        query, keys = None, []
    if query is None:
        why = "its weights do not fit the model in config.yaml"
        raise ClsaError(str(path), why, "restore config.yaml", Exit.BAD_DATA)
    return query, keys[0] if keys else query

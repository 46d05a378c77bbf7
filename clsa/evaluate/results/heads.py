"""Classifiers (heads) that evaluation learned: save them, and load them for `clsa predict`."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from clsa.learning.models import build_encoder
from clsa.options.config import Config, nearest
from clsa.options.run import ModelOptions, ViewOptions
from clsa.runs import digests
from clsa.system import files
from clsa.system.errors import ClsaError, Exit

INIT_STD = 0.01


class Head(NamedTuple):
    """A linear layer on features, and the encoder of the features if it is not the run's own."""

    layer: nn.Linear
    encoder: nn.Module | None = None


class HeadFacts(Config):
    """Facts saved with a head: its classes, and the protocol and encoder it was learned with."""

    protocol: str
    card: str
    settings: str
    classes: tuple[str, ...]
    several: bool
    """Whether a picture can have several classes, each with its own probability."""
    encoder_digest: str
    """Digest of the run's encoder that the layer learned on, or that fine-tuning started from."""
    model: ModelOptions
    views: ViewOptions
    number: int = 0
    """Order of saving: higher than the numbers of all heads that the run saved before."""

    @property
    def name(self) -> str:
        """Name of the file: the protocol, followed by a hash if its card was changed."""
        if not self.settings:
            return self.protocol
        suffix = hashlib.sha256(f"{self.card} {self.settings}".encode()).hexdigest()[:6]
        return f"{self.protocol}-{suffix}"

    @property
    def told(self) -> str:
        """Description for the user."""
        return f"{self.protocol} ({self.settings})" if self.settings else self.protocol

    def probabilities(self, logits: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        """Probability of each class: softmax, or sigmoid if a picture can have several classes."""
        return logits.sigmoid() if self.several else logits.softmax(1)


def new_layer(features: int, num_classes: int, seed: int) -> nn.Linear:
    """A linear layer with weights from N(0, 0.01^2) and zero biases."""
    layer = nn.Linear(features, num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_(0, INIT_STD, generator=generator)
        layer.bias.zero_()
    return layer


def layer_of(weights: Float[Tensor, "C F"], biases: Float[Tensor, "C"]) -> nn.Linear:
    """A linear layer with these weights and biases."""
    layer = nn.Linear(weights.shape[1], len(weights))
    layer.load_state_dict({"weight": weights.float(), "bias": biases.float()})
    return layer


def heads_folder(run: Path) -> Path:
    """Folder of heads: in the run folder, or next to an encoder's file."""
    return (run if run.is_dir() else run.parent) / "heads"


def save_head(run: Path, head: Head, facts: HeadFacts) -> Path:
    """Write heads/NAME.safetensors; an older head with the same settings is replaced."""
    numbers = [number for _, number in saved_heads(run)]
    facts = facts.model_copy(update={"number": max(numbers, default=0) + 1})
    path = heads_folder(run) / f"{facts.name}.safetensors"
    with files.output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    modules = {"layer": head.layer, "encoder": head.encoder}
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in modules.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }
    metadata = {"clsa": json.dumps(facts.model_dump(mode="json"))}
    data = safetensors.torch.save(tensors, metadata=metadata)
    files.write_atomic(path, lambda file: file.write(data))
    return path


def saved_heads(run: Path) -> list[tuple[str, int]]:
    """Names of a run's heads and the numbers they were saved under, in the order of saving."""
    found = []
    for path in heads_folder(run).glob("*.safetensors"):
        try:
            with safetensors.safe_open(path, framework="pt") as opened:  # pyright: ignore
                facts = json.loads((opened.metadata() or {})["clsa"])
            found.append((path.stem, int(facts["number"])))
        except (safetensors.SafetensorError, OSError, LookupError, TypeError, ValueError):
            found.append((path.stem, 0))  # damaged: `load_head` reports it
    return sorted(found, key=lambda head: (head[1], head[0]))


def load_head(run: Path, name: str | None, encoder: nn.Module) -> tuple[Head, HeadFacts]:
    """Load the head with this name or, if `name` is None, the one saved last.

    Args:
        encoder: of the run; a head of another encoder is refused.

    Raises:
        ClsaError: 66 if there is no such head, 77 if the file is not one that `save_head` wrote, 2
            if the head belongs to another encoder.
    """
    folder, names = heads_folder(run), [head for head, _ in saved_heads(run)]
    if not names or (name is not None and name not in names):
        what = f"head {name}" if name else str(folder)
        close = nearest(name or "", names)
        hint = f"did you mean {close}?" if close else f"clsa evaluate {run} --protocol linear-clsa"
        raise ClsaError(what, "no such head is saved yet", hint, Exit.NO_INPUT)
    path = folder / f"{names[-1] if name is None else name}.safetensors"
    try:
        with safetensors.safe_open(path, framework="pt") as opened:  # pyright: ignore
            facts = HeadFacts.model_validate(json.loads((opened.metadata() or {})["clsa"]))
            tensors = {key: opened.get_tensor(key) for key in list(opened.keys())}
        layer = layer_of(tensors["layer.weight"], tensors["layer.bias"])
        tuned = {key[8:]: value for key, value in tensors.items() if key.startswith("encoder.")}
        own = build_encoder(facts.model, seed=0) if tuned else None
        if own is not None:
            own.load_state_dict(tuned)
            own.eval()
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, RuntimeError,
            ClsaError) as error:  # fmt: skip
        why = f"not a head of clsa ({type(error).__name__})"
        raise ClsaError(str(path), why, "evaluate again to write it", Exit.UNTRUSTED) from error
    if digests.digest(encoder.state_dict()) != facts.encoder_digest:
        why = "it was learned on another encoder's features"
        raise ClsaError(str(path), why, f"clsa evaluate {run} --protocol {facts.protocol}")
    return Head(layer, own), facts

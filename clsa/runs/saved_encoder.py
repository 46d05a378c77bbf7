"""The file of a trained encoder: its weights, and what is needed to build, feed and judge it."""

import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from clsa.learning.models import build_encoder
from clsa.options.config import Config, merge
from clsa.options.run import DataOptions, ModelOptions, RunOptions, ViewOptions
from clsa.system import files
from clsa.system.errors import ClsaError, Exit


class EncoderFacts(Config):
    """What is saved with an encoder's weights: how to build, feed and judge it."""

    model: ModelOptions
    views: ViewOptions
    data: DataOptions
    recipe: str
    seed: int
    step: int
    data_digest: str

    @classmethod
    def of(cls, options: RunOptions, step: int, data_digest: str) -> "EncoderFacts":
        """The facts of a run at a step."""
        return cls(
            model=options.model, views=options.views, data=options.data, recipe=options.recipe,
            seed=options.seed, step=step, data_digest=data_digest,
        )  # fmt: skip


def save_encoder(path: Path, encoder: nn.Module, facts: EncoderFacts) -> None:
    """Write the encoder's weights as safetensors, with `facts` as JSON in its metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    data = safetensors.torch.save(
        tensors, metadata={"clsa": json.dumps(facts.model_dump(), default=str)}
    )
    files.write_atomic(path, lambda file: file.write(data))


def load_encoder_facts(path: Path) -> tuple[nn.Module, EncoderFacts]:
    """Encoder in eval mode and the facts saved with it, from a run folder or a safetensors file.

    Raises:
        ClsaError: 66 when there is none, 77 when the file is not what `save_encoder` writes.
    """
    file = path / "encoder.safetensors" if path.is_dir() else path
    if not file.is_file() or not os.access(file, os.R_OK):
        hint = (
            "finish the run first (the same command resumes it)"
            if path.is_dir()
            else "check the path"
        )
        raise ClsaError(str(file), "no such readable file", hint, Exit.NO_INPUT)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:  # pyright: ignore
            facts = EncoderFacts.model_validate(json.loads((opened.metadata() or {})["clsa"]))
            names = list(opened.keys())  # `opened` is no mapping
            tensors = {name: opened.get_tensor(name) for name in names}
        encoder = build_encoder(facts.model, seed=0)
        encoder.load_state_dict(tensors)
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, RuntimeError,
            ClsaError) as error:  # fmt: skip
        why = f"not an encoder of clsa ({type(error).__name__})"
        raise ClsaError(str(file), why, "give a file that clsa wrote", Exit.UNTRUSTED) from error
    return encoder.eval(), facts


def load_encoder(path: str | Path) -> nn.Module:
    """The trained encoder of a run folder or of an encoder.safetensors, in eval mode.

    Takes (B, 3, S, S) pictures, scaled to [0, 1] and normalised by `clsa.views.transform.MEAN` and
    `STD`,
    and returns (B, F) features.
    """
    return load_encoder_facts(Path(path))[0]


def data_of(given: DataOptions, facts: EncoderFacts) -> DataOptions:
    """The pictures named on the command line, or else those that the run learned from.

    In the second case other options on the command line (`val`, `workers`, ...) override the run's.
    Both are scaled as the run's were (`value_range`), unless another range is given.
    """
    if given.data:
        scale = given.value_range or facts.data.value_range
        return given.model_copy(update={"value_range": scale})
    values = merge(
        facts.data.model_dump(mode="json"), given.model_dump(mode="json", exclude_defaults=True)
    )
    return DataOptions.parse(values, "encoder.safetensors: data")

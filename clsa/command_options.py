"""Options of every command but `pretrain`, and their defaults; needs no torch."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import tyro

from clsa.config import Config, Count, Positive
from clsa.options import DataOptions, Seed

Protocol = Literal["knn", "knn-strong", "linear-fast", "linear", "finetune"]

Diagnosis = Literal["similarity", "neighbours", "classes", "spread", "operations"]


class EvaluateOptions(Config):
    """How features are judged."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or an encoder.safetensors."""
    data: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    protocols: tuple[Protocol, ...] = (
        "knn",
        "knn-strong",
        "linear-fast",
    )
    """knn: clean queries; knn-strong: strongly augmented ones; linear-fast: logistic regression on
    cached features; linear: the paper's 100 epochs of SGD; finetune: all layers of a copy of the
    encoder, on the labels given."""
    labels: str | None = None
    """Few labels to learn from, as `clsa pretrain --labels` takes them: a share such as 10% (of the
    run's seed, so that they are the run's own) or a list (default: all)."""
    random: bool = True
    """Judge the same encoder at its random initialisation beside the trained one."""
    neighbours: Count = 20
    """Nearest pictures of the bank that vote in knn."""
    knn_temperature: Positive = 0.07
    """Votes weigh exp(cosine / this)."""
    linear_epochs: Count = 100
    """Length of `linear`."""
    linear_lr: Positive = 10.0
    """Learning rate of `linear`, falling to 0.01 along a cosine."""
    finetune_epochs: Count = 20
    """Length of `finetune`."""
    finetune_lr: Positive = 0.01
    """Learning rate of the encoder in `finetune`, a fifth of it after 0.6 and after 0.8 of it."""
    finetune_head_lr: Positive = 0.2
    """The same for its new linear layer."""
    seed: Seed = 0
    """Of the strong queries and, where there are no test pictures, of the hold-out."""
    batch_size: Count = 256
    """Pictures at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class EmbedOptions(Config):
    """Features of pictures as a table."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or an encoder.safetensors."""
    data: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    split: Literal["train", "val"] = "train"
    """Which split of a named set or of an ImageNet layout."""
    out: Path = Path("embeddings.parquet")
    """Parquet file: path, label, vector (one row a picture)."""
    batch_size: Count = 256
    """Pictures at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class PreviewOptions(Config):
    """Pictures of what a run goes by."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    neighbours: bool = False
    """Pictures with their positives, the nearest first, and a mixed query of each (--clim)."""
    out: Path | None = None
    """PNG file (default: neighbours.png in the run folder)."""
    count: Count = 8
    """How many pictures, spread over the set."""
    data: str | None = None
    """Where the pictures are now (default: where the run found them)."""


class PackOptions(Config):
    """Pictures, once, into tar shards that are quick to read."""

    data: str = ""
    """Pictures, in any form that `clsa pretrain --data` takes."""
    out: Path = Path("packed")
    """Folder of the shards; `clsa pretrain --data` takes it. The same command again goes on where
    it was interrupted."""
    split: Literal["train", "val"] = "train"
    """Which split of a named set or of an ImageNet layout. With OUT/train and OUT/val packed,
    `--data OUT` has both."""
    size: Annotated[int, pydantic.Field(ge=8)] = 320
    """Pictures whose short side is longer, in pixels, become JPEGs of this short side; the bytes
    of others are kept."""
    quality: Annotated[int, pydantic.Field(ge=1, le=100)] = 92
    """Of those JPEGs."""
    shard_mb: Positive = 256.0
    """A new shard is begun after this many megabytes."""
    workers: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Processes that decode and encode (default: one a core). They do not change a byte."""


class SweepOptions(Config):
    """A grid of runs with seeds, and one table of them."""

    sweep: Annotated[str, tyro.conf.Positional]
    """YAML file of a grid, or a preset: table5, table7, head-depth, augmentation-strength,
    num-negatives, methods, clim, clim-selection, clim-resolution, clim-clusters, clim-alpha,
    clim-mixing, suncet, continual."""
    out: Path | None = None
    """Folder of the sweep (default: runs/NAME). The same command again goes on."""
    data: str | None = None
    """Pictures in place of the file's, in any form that `clsa pretrain --data` takes."""
    seeds: tuple[Seed, ...] | None = None
    """In place of the file's."""
    epochs: Count | None = None
    """Of every run, in place of the file's."""
    protocols: tuple[Protocol, ...] | None = None
    """How the encoders are judged, in place of the file's."""
    max_minutes: Positive | None = None
    """Stop each run after this long; it is judged as it stands."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Check everything and list the runs; run nothing."""


class DiagnoseOptions(Config):
    """What a run's networks make of pictures, beside their random start."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder (of a run in stages, one of its stage-N), or an encoder.safetensors."""
    data: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    out: Path | None = None
    """Folder of diagnostics.json and the figures (default: diagnostics in the run folder)."""
    only: tuple[Diagnosis, ...] = ()
    """Parts (default: all). similarity: probability of positives and variance of negatives, weak
    and strong queries; neighbours: 20-NN of centre crops and strong queries, kept checkpoints too;
    classes: cosines within and between classes, t-SNE; spread: alignment, uniformity, RankMe;
    operations: which distortions at which magnitude break retrieval."""
    num_pictures: Annotated[int, pydantic.Field(ge=4)] = 2000
    """Pictures, spread over the set, of neighbours, classes and spread."""
    queries: Annotated[int, pydantic.Field(ge=4)] = 2000
    """Pictures, spread over the set, whose weak and strong views are queries of similarity."""
    bank: Annotated[int, pydantic.Field(ge=4)] = 65536
    """Keys of other pictures that they are compared with, at most what the set has."""
    num_distorted: Annotated[int, pydantic.Field(ge=4)] = 500
    """Pictures, spread over the set, of operations."""
    seed: Seed = 0
    """Of the views, of t-SNE and, where there are no test pictures, of the hold-out."""
    batch_size: Count = 256
    """Pictures at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class DemoOptions(Config):
    """Pretrain on the embedded drawings, then compare random and trained encoder."""

    out: Path = Path("runs/demo")
    """Folder of the run."""
    recipe: str = "clsa-small"
    """Any recipe that ends in -small (`clsa recipes`)."""
    epochs: Count = 14
    """Passes over the drawings."""
    seed: Seed = 0
    """Of everything random."""

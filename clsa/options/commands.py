"""Options of every command but `pretrain`, and their defaults; needs no torch."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import tyro

from clsa.options.config import Config, Count, Positive
from clsa.options.protocols import Name
from clsa.options.run import DataOptions, Seed

Diagnosis = Literal["similarity", "neighbours", "classes", "spread", "operations"]


class ExtendOptions(Config):
    """A run, for longer than it was begun."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder. What is computed is as its config.yaml has it; of its limits, max_steps and
    max_minutes, none holds."""
    epochs: Count
    """The new total. Rates follow the schedule of a run of so many epochs from the step where the
    run stands, so that the result is not that of such a run from the start; after the end of a
    cosine they rise again."""
    max_minutes: Positive | None = None
    """Stop after this long; the same command goes on."""
    accept_data_change: bool = False
    """Begin the epoch anew with pictures that have changed, as `clsa pretrain` does."""
    data: str | None = None
    """Where the pictures are now (default: where the run found them)."""
    workers: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Processes that decode pictures (default: the run's)."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N (default: the run's)."""


class EvaluateOptions(Config):
    """How features are judged: protocol cards (`clsa protocols` lists them)."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or an encoder.safetensors."""
    protocol: Annotated[tuple[Name, ...], pydantic.Field(min_length=1)] = (
        "knn-20",
        "knn-strong",
        "logistic",
    )
    """Cards to judge by; those of voc07 and detect take --data VOCdevkit or COCO."""
    data: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    change: tuple[str, ...] = ()
    """Departures from the cards, FIELD=VALUE or CARD.FIELD=VALUE, such as linear-clsa.epochs=10;
    results.json tells them, and the changed card's hash."""
    labels: str | None = None
    """Few labels to learn from, as `clsa pretrain --labels` takes them: a share such as 10% (of the
    run's seed, so that they are the run's own) or a list (default: all, or the card's share); for
    pictures of one class each."""
    random: bool = True
    """Judge the same encoder at its random initialisation beside the trained one."""
    leaks: Literal["auto", "all", "off"] = "auto"
    """Look for evaluation pictures among those the run learned from (exact or near duplicates):
    auto does in up to 50,000 pictures."""
    seed: Seed = 0
    """Of the strong queries, the classifiers and, where there are no test pictures, of the
    hold-out."""
    batch_size: Count = 256
    """Pictures encoded at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class ReplayOptions(Config):
    """A step that went bad, taken again."""

    bundle: Annotated[Path, tyro.conf.Positional]
    """RUN/bad/step-NNNNNN.ckpt, which a run writes when a step is not finite."""
    data: str | None = None
    """Where the pictures lie now (default: where they lay)."""
    precision: Literal["auto", "bf16", "fp32"] | None = None
    """To compute in (default: the run's)."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N (default: the run's)."""


class PredictOptions(Config):
    """Labels of pictures, by a classifier that evaluation learned."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or an encoder.safetensors."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, or one set in any form that --data takes."""
    head: str | None = None
    """The protocol whose classifier is used (default: the one learned last)."""
    out: Path = Path("predictions.csv")
    """CSV, or JSON if it ends in .json: path, then labels and probabilities, the likeliest
    first."""
    top: Count = 3
    """Labels for each picture."""
    batch_size: Count = 256
    """Pictures encoded at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class ProtocolsOptions(Config):
    """The protocol cards."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """Card to show in full."""


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
    protocol: tuple[Name, ...] | None = None
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


class ExportOptions(Config):
    """An encoder for another library."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or an encoder.safetensors."""
    to: Literal["detectron2"] = "detectron2"
    """The library: weights, configurations of the papers, and the script that trains them."""
    out: Path = Path("exported")
    """Folder to write to."""


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


class ScenesOptions(Config):
    """Scenes with known objects, made of the embedded drawings."""

    out: Path = Path("scenes")
    """Folder to write, new or empty."""
    layout: Literal["coco", "voc"] = "coco"
    """coco: train/, val/ and annotations/ with boxes and masks; voc: VOCdevkit/VOC2007 with boxes
    and, for objects hidden by more than half, the flag `difficult`."""
    size: Annotated[int, pydantic.Field(ge=32, le=512)] = 128
    """Side of a scene in pixels; its objects are 0.19 to 0.5 of it."""
    train: Count = 400
    """Scenes to learn from, of the train drawings."""
    test: Count = 200
    """Scenes to judge on, of the val drawings."""
    classes: Annotated[int, pydantic.Field(ge=1, le=10)] = 8
    """The first so many of flag, people, vehicle, card, mammal, arrow, tool, fruit-veg, plant,
    music: those of the most drawings first."""
    backgrounds: str | None = None
    """Photographs to cut the grounds from, in any form that `clsa pretrain --data` takes (default:
    seeded textures)."""
    seed: Seed = 0
    """Of what is pasted where, and of the textures."""

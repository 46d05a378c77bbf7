"""Options of every command except `pretrain`, and their defaults. Needs no torch."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import tyro

from clsa.options.config import Config, Count, Limit, Positive, Range
from clsa.options.protocols import Name
from clsa.options.run import DataOptions, Seed

Diagnosis = Literal["similarity", "neighbours", "classes", "spread", "operations"]


class ExtendOptions(Config):
    """Options of `clsa extend`, which trains a run for more epochs."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder. Its config.yaml sets what is computed, except for its limits max_steps and
    max_minutes, which no longer apply."""
    epochs: Count
    """The new total. From the run's current step on, the learning rate follows the schedule of a
    run of this many epochs. The result therefore differs from a run of this length from the start,
    and after the end of a cosine the learning rate rises again."""
    max_minutes: Positive | None = None
    """Stop after this many minutes; the same command continues the run."""
    accept_data_change: bool = False
    """If the pictures have changed, start the epoch again with the new ones, as `clsa pretrain`
    does."""
    data: str | None = None
    """Where the pictures are now (default: where the run found them)."""
    workers: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Processes that decode pictures (default: as in the run)."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N (default: as in the run)."""


class EvaluateOptions(Config):
    """Options of `clsa evaluate`, which judges an encoder by protocol cards."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or an encoder.safetensors file."""
    protocol: Annotated[tuple[Name, ...], pydantic.Field(min_length=1)] = (
        "knn-20",
        "knn-strong",
        "logistic",
    )
    """Cards to judge by (`clsa protocols` lists them). The voc07 cards need --data VOCdevkit, the
    detect cards --data VOCdevkit or COCO."""
    data: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    change: tuple[str, ...] = ()
    """Changes to the cards, as FIELD=VALUE or CARD.FIELD=VALUE, such as linear-clsa.epochs=10.
    results.json records them and the hash of the changed card."""
    labels: str | None = None
    """Learn from a few labels only, given as for `clsa pretrain --labels`: a share such as 10%
    (drawn with the run's seed, so that it is the run's own share) or a list (default: all labels,
    or the card's share). Only for pictures of one class each."""
    random: bool = True
    """Also judge the same encoder at its random initialisation, to compare."""
    leaks: Literal["auto", "all", "off"] = "auto"
    """Look for evaluation pictures among those the run learned from (exact or near duplicates).
    auto: only if there are at most 50,000 of those; all: always; off: never."""
    seed: Seed = 0
    """Seed of the strong queries, of the classifiers and, if there are no test pictures, of the
    choice of pictures held out for testing."""
    batch_size: Count = 256
    """Number of pictures to encode at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class ReplayOptions(Config):
    """Options of `clsa replay`, which computes a bad step again."""

    bundle: Annotated[Path, tyro.conf.Positional]
    """RUN/bad/step-NNNNNN.ckpt, which a run writes when a step is not finite."""
    data: str | None = None
    """Where the pictures are now (default: where the run found them)."""
    precision: Literal["auto", "bf16", "fp32"] | None = None
    """Precision to compute in (default: as in the run)."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N (default: as in the run)."""


class PredictOptions(Config):
    """Options of `clsa predict`, which labels pictures with a classifier from `clsa evaluate`."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or an encoder.safetensors file."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, or one set in any form that --data takes."""
    head: str | None = None
    """Protocol whose classifier to use (default: the one learned last)."""
    out: Path = Path("predictions.csv")
    """File to write: JSON if its name ends in .json, otherwise CSV. It holds path, labels and
    probabilities of each picture, the likeliest label first."""
    top: Count = 3
    """Number of labels per picture."""
    batch_size: Count = 256
    """Number of pictures to encode at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class ProtocolsOptions(Config):
    """Options of `clsa protocols`, which shows the protocol cards."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """Card to show in full (default: list all cards)."""


class EmbedOptions(Config):
    """Options of `clsa embed`, which writes features of pictures to a table."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or an encoder.safetensors file."""
    data: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    split: Literal["train", "val"] = "train"
    """Which split of a named set, or of a folder with train/ and val/, to use."""
    out: Path = Path("embeddings.parquet")
    """Parquet file to write: path, label and vector, one row per picture."""
    batch_size: Count = 256
    """Number of pictures to encode at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class PreviewOptions(Config):
    """Options of `clsa preview`, which draws what a run learns from."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    neighbours: bool = False
    """For a run with --clim: draw pictures with their positives, the nearest first, and a mixed
    query of each."""
    out: Path | None = None
    """PNG file to write (default: neighbours.png in the run folder)."""
    count: Count = 8
    """Number of pictures to draw, taken evenly from the set."""
    data: str | None = None
    """Where the pictures are now (default: where the run found them)."""


class PackOptions(Config):
    """Options of `clsa pack`, which writes pictures into tar shards that are quick to read."""

    data: str = ""
    """Pictures, in any form that `clsa pretrain --data` takes."""
    out: Path = Path("packed")
    """Folder for the shards; give it to `clsa pretrain --data`. After an interruption, the same
    command continues the packing."""
    split: Literal["train", "val"] = "train"
    """Which split of a named set, or of a folder with train/ and val/, to pack. If you pack both,
    to OUT/train and OUT/val, then `--data OUT` has both."""
    size: Annotated[int, pydantic.Field(ge=8)] = 320
    """Pictures with a longer short side are shrunk to this short side in pixels and stored as
    JPEGs; the bytes of all others are kept."""
    quality: Annotated[int, pydantic.Field(ge=1, le=100)] = 92
    """Quality of those JPEGs."""
    shard_mb: Positive = 256.0
    """Start a new shard after this many megabytes."""
    value_range: Range | None = None
    """Values that become black and white, for gray pictures of 16 or 32 bits, such as 0 4095.
    Kept in the set, so that whoever reads it uses the same."""
    max_unreadable: Limit | None = None
    """Refuse to finish when more pictures than this cannot be read: a number, or a share such as
    1% (default: 0.1 %, but at least 10). All of them are named in OUT/quarantine.jsonl."""
    workers: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Processes that decode and encode (default: one per core). Their number does not change a
    byte of the shards."""


class SweepOptions(Config):
    """Options of `clsa sweep`, which runs a grid with several seeds and tabulates the results."""

    sweep: Annotated[str, tyro.conf.Positional]
    """YAML file of a grid, or a preset: table5, table7, head-depth, augmentation-strength,
    num-negatives, methods, clim, clim-selection, clim-resolution, clim-clusters, clim-alpha,
    clim-mixing, suncet, continual."""
    out: Path | None = None
    """Folder of the sweep (default: runs/NAME). The same command continues a sweep."""
    data: str | None = None
    """Pictures to use instead of the grid's, in any form that `clsa pretrain --data` takes."""
    seeds: tuple[Seed, ...] | None = None
    """Seeds to use instead of the grid's."""
    epochs: Count | None = None
    """Epochs of every run, instead of the grid's."""
    protocol: tuple[Name, ...] | None = None
    """Protocol cards to judge the encoders by, instead of the grid's."""
    max_minutes: Positive | None = None
    """Stop each run after this many minutes and judge it in the state that it has then."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Check everything and list the runs; run nothing."""


class DiagnoseOptions(Config):
    """Options of `clsa diagnose`, which compares a run's networks with their random start."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder (for a run in stages: one of its stage-N folders), or an encoder.safetensors
    file."""
    data: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    out: Path | None = None
    """Folder for diagnostics.json and the figures (default: diagnostics in the run folder)."""
    only: tuple[Diagnosis, ...] = ()
    """Parts to compute (default: all). similarity: probability of positives and variance of
    negatives, for weak and strong queries; neighbours: 20-NN of centre crops and strong queries,
    also for kept checkpoints; classes: cosines within and between classes, t-SNE; spread:
    alignment, uniformity, RankMe; operations: which distortions, at which magnitude, break
    retrieval."""
    num_pictures: Annotated[int, pydantic.Field(ge=4)] = 2000
    """Number of pictures for neighbours, classes and spread, taken evenly from the set."""
    queries: Annotated[int, pydantic.Field(ge=4)] = 2000
    """Number of pictures for similarity, taken evenly from the set; their weak and strong views are
    the queries."""
    bank: Annotated[int, pydantic.Field(ge=4)] = 65536
    """Number of keys of other pictures to compare these queries with, at most as many as the set
    has."""
    num_distorted: Annotated[int, pydantic.Field(ge=4)] = 500
    """Number of pictures for operations, taken evenly from the set."""
    seed: Seed = 0
    """Seed of the views, of t-SNE and, if there are no test pictures, of the choice of pictures
    held out for testing."""
    batch_size: Count = 256
    """Number of pictures to encode at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class ExportOptions(Config):
    """Options of `clsa export`, which writes an encoder for another library."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or an encoder.safetensors file."""
    to: Literal["detectron2"] = "detectron2"
    """Library to write for. detectron2: the weights, the papers' configurations, and a script that
    trains with them."""
    out: Path = Path("exported")
    """Folder to write to."""


class DemoOptions(Config):
    """Options of `clsa demo`, which pretrains on the embedded drawings and judges the result."""

    out: Path = Path("runs/demo")
    """Folder of the run."""
    recipe: str = "clsa-small"
    """Any recipe that ends in -small (`clsa recipes`)."""
    epochs: Count = 14
    """Number of passes over the drawings."""
    seed: Seed = 0
    """Seed of everything random."""


class ScenesOptions(Config):
    """Options of `clsa scenes`, which makes pictures with known objects for detection."""

    out: Path = Path("scenes")
    """Folder to write to, new or empty."""
    layout: Literal["coco", "voc"] = "coco"
    """coco: train/, val/ and annotations/ with boxes and masks; voc: VOCdevkit/VOC2007 with boxes
    and the flag `difficult` for objects of which more than half is hidden."""
    size: Annotated[int, pydantic.Field(ge=32, le=512)] = 128
    """Side of a scene in pixels; its objects are 0.19 to 0.5 of this size."""
    train: Count = 400
    """Number of scenes to learn from, made of the train drawings."""
    test: Count = 200
    """Number of scenes to judge on, made of the val drawings."""
    classes: Annotated[int, pydantic.Field(ge=1, le=10)] = 8
    """How many classes to use, those with the most drawings first: flag, people, vehicle, card,
    mammal, arrow, tool, fruit-veg, plant, music."""
    backgrounds: str | None = None
    """Photographs to cut the backgrounds from, in any form that `clsa pretrain --data` takes
    (default: seeded textures)."""
    seed: Seed = 0
    """Seed of the textures and of which drawing is pasted where."""

"""Options of the learning methods, one class per method. Needs no torch.

Defaults are those of each paper on ImageNet. `RunOptions.method` is one of these classes, found by
its `name`; a recipe chooses it.
"""

from typing import Annotated, Any, Literal

import pydantic

from clsa.options.config import Config, Count, Fraction, NotNegative, Positive


class MoCoOptions(Config):
    """MoCo v1 and v2; with several weak queries, also the contrastive part of CLSA*."""

    name: Literal["moco"] = "moco"
    """Chosen by the recipe."""
    key_momentum: Fraction = 0.999
    """The key network moves by 1 - key_momentum towards the query network at each step."""
    final_key_momentum: Fraction | None = None
    """Key momentum at the end of the run, reached along a cosine (default: constant)."""
    queue_size: Count = 65536
    """Number of past keys to compare with."""
    bank: Literal["queue", "batch+queue"] = "batch+queue"
    """What a query is compared with. queue: its own key and the queue (the papers); batch+queue:
    also all other keys of the batch (the official code)."""
    temperature: Positive = 0.2
    """Temperature of the contrastive loss."""
    reduce: Literal["sum", "mean"] = "sum"
    """Sum the terms of several weak queries (as the official code does) or average them."""
    symmetric: bool = False
    """Use each of the two views once as query and once as key; the loss is the mean of both."""
    strong_query: bool = False
    """Use strong views as queries, at the sizes of the weak ones (CLSA's Table 5)."""
    strong_key: bool = False
    """Use strong views as keys too."""


class SimCLROptions(Config):
    """SimCLR: the other pictures of the batch are the negatives."""

    name: Literal["simclr"] = "simclr"
    """Chosen by the recipe."""
    temperature: Positive = 0.1
    """Temperature of the contrastive loss."""


class BYOLOptions(Config):
    """BYOL: predict the momentum network's projection of the other view."""

    name: Literal["byol"] = "byol"
    """Chosen by the recipe."""
    key_momentum: Fraction = 0.996
    """Momentum of the target network at the first step; use a lower one for short runs."""
    final_key_momentum: Fraction | None = 1.0
    """Momentum of the target network at the end of the run, reached along a cosine."""
    predictor_hidden: Count = 4096
    """Width of the predictor's hidden layer."""
    queue_size: Count = 65536
    """Number of past target projections to keep; only the divergence of --stronger uses them."""


class SimSiamOptions(Config):
    """SimSiam: predict the same network's projection of the other view, without its gradient."""

    name: Literal["simsiam"] = "simsiam"
    """Chosen by the recipe."""
    predictor_hidden: Count = 512
    """Width of the predictor's hidden layer."""
    fixed_predictor_rate: bool = True
    """Keep the predictor's learning rate at its peak instead of following the schedule."""
    queue_size: Count = 4096
    """Number of past projections to keep; only the divergence of --stronger uses them."""


class SwAVOptions(Config):
    """SwAV: predict a view's assignment to prototypes from another view."""

    name: Literal["swav"] = "swav"
    """Chosen by the recipe."""
    num_prototypes: Count = 3000
    """Number of trained prototypes."""
    temperature: Positive = 0.1
    """Temperature of the predicted assignments."""
    epsilon: Positive = 0.05
    """Weight of the entropy in Sinkhorn's algorithm; smaller values give harder assignments."""
    sinkhorn_iterations: Count = 3
    """Rounds of Sinkhorn's algorithm; with more rounds the prototypes are better balanced."""
    queue_size: Annotated[int, pydantic.Field(ge=0)] = 3840
    """Number of past projections that are assigned together with the batch (0: none)."""
    queue_epoch: Annotated[int, pydantic.Field(ge=0)] = 15
    """Epoch from which past projections are collected; they are used once the queue is full."""
    freeze_steps: Annotated[int, pydantic.Field(ge=0)] = 5005
    """Number of first steps in which the prototypes do not change."""


class AdCoOptions(Config):
    """AdCo: the negatives are learned, as adversaries of the network."""

    name: Literal["adco"] = "adco"
    """Chosen by the recipe."""
    key_momentum: Fraction = 0.999
    """The key network moves by 1 - key_momentum towards the query network at each step."""
    num_negatives: Count = 65536
    """Number of learned negatives."""
    temperature: Positive = 0.12
    """Temperature of the network's contrastive loss."""
    negative_temperature: Positive = 0.02
    """Temperature of the loss that the negatives maximise."""
    negative_lr: Positive = 3.0
    """Learning rate of the negatives; it is constant."""
    negative_momentum: Fraction = 0.9
    """Momentum of the negatives: the share of the last update that is kept in the next."""
    negative_decay: NotNegative = 1e-4
    """Weight decay of the negatives."""
    reduce: Literal["sum", "mean"] = "sum"
    """Sum the terms of several weak queries (as the official code does) or average them."""


class InstDiscOptions(Config):
    """Instance discrimination against a memory with one row per picture."""

    name: Literal["instdisc"] = "instdisc"
    """Chosen by the recipe."""
    temperature: Positive = 0.07
    """Temperature of the similarities."""
    num_negatives: Annotated[int, pydantic.Field(ge=0)] = 4096
    """Memory rows drawn at each step for noise-contrastive estimation (0: softmax over all
    rows)."""
    row_momentum: Fraction = 0.5
    """Share of a memory row that is kept when its picture is seen."""


class PIRLOptions(Config):
    """PIRL: a picture and its shuffled patches are compared with the picture's memory row."""

    name: Literal["pirl"] = "pirl"
    """Chosen by the recipe."""
    temperature: Positive = 0.07
    """Temperature of the similarities."""
    jigsaw_weight: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.5
    """Weight of the patches' loss; the whole picture's loss has the rest of 1."""
    num_negatives: Count = 32000
    """Memory rows drawn at each step."""
    row_momentum: Fraction = 0.5
    """Share of a memory row that is kept when its picture is seen."""
    grid: Annotated[int, pydantic.Field(ge=2, le=5)] = 3
    """Patches per side: the crop is cut into grid x grid patches."""
    jigsaw_size: Annotated[int, pydantic.Field(ge=16)] = 255
    """Side in pixels of the crop that is cut into patches."""
    jigsaw_scale: tuple[Fraction, Fraction] = (0.6, 1.0)
    """Smallest and largest share of the picture's area that this crop covers."""
    patch_size: Annotated[int, pydantic.Field(ge=8)] = 64
    """Side in pixels of a patch, which is cut at a random place in its cell."""


class PCLOptions(Config):
    """PCL: MoCo, plus a contrast with the centres of clusters."""

    name: Literal["pcl"] = "pcl"
    """Chosen by the recipe."""
    key_momentum: Fraction = 0.999
    """The key network moves by 1 - key_momentum towards the query network at each step."""
    queue_size: Count = 16384
    """Number of past keys to compare with."""
    temperature: Positive = 0.2
    """Temperature of the contrast with keys; the clusters' concentrations have this mean."""
    num_clusters: Annotated[
        tuple[Annotated[int, pydantic.Field(ge=2)], ...], pydantic.Field(min_length=1)
    ] = (25000, 50000, 100000)
    """Number of clusters in each of several k-means runs, whose terms are averaged."""
    warmup_epochs: Annotated[int, pydantic.Field(ge=0)] = 20
    """Epochs before the first clustering."""
    num_negatives: Count = 16384
    """Number of other clusters' centres to compare with, drawn at each step."""


class MoCoV3Options(Config):
    """MoCo v3: compare with the momentum network's keys of the other view, in large batches without
    a queue."""

    name: Literal["moco-v3"] = "moco-v3"
    """Chosen by the recipe."""
    key_momentum: Fraction = 0.996
    """Momentum of the key network at the first step; use a lower one for short runs."""
    final_key_momentum: Fraction | None = 1.0
    """Momentum of the key network at the end of the run, reached along a cosine."""
    temperature: Positive = 1.0
    """Temperature of the contrastive loss."""
    predictor_hidden: Count = 4096
    """Width of the predictor's hidden layer."""
    predictor_norm: Literal["hidden", "all"] = "hidden"
    """Batch norm in the predictor: after its hidden layer, or after its last layer too (all, for
    ViT)."""
    freeze_patches: bool = True
    """ViT: the patch embedding keeps its random initial weights."""
    queue_size: Count = 4096
    """Number of past keys to keep; only the divergence of --stronger uses them."""


class DINOOptions(Config):
    """DINO: follow the momentum network's centred and sharpened assignment to prototypes."""

    name: Literal["dino"] = "dino"
    """Chosen by the recipe."""
    num_prototypes: Count = 65536
    """Number of prototypes: the rows of the last layer."""
    temperature: Positive = 0.1
    """Temperature of the student."""
    teacher_temperature: Positive = 0.07
    """Temperature of the teacher after its warm-up."""
    first_teacher_temperature: Positive = 0.04
    """Temperature of the teacher at the first step."""
    teacher_warmup_epochs: NotNegative = 30.0
    """Epochs over which the teacher's temperature moves linearly from first to final."""
    center_momentum: Fraction = 0.9
    """Share of the centre that is kept at each step."""
    key_momentum: Fraction = 0.996
    """Momentum of the teacher at the first step; use a lower one for short runs."""
    final_key_momentum: Fraction | None = 1.0
    """Momentum of the teacher at the end of the run, reached along a cosine."""
    freeze_epochs: NotNegative = 1.0
    """Number of first epochs in which the last layer does not change."""


class SupervisedOptions(Config):
    """Cross-entropy with the labels: the reference row of every table."""

    name: Literal["supervised"] = "supervised"
    """Chosen by the recipe."""
    label_smoothing: Fraction = 0.0
    """Share of the target that is spread over all classes."""


def _tag(value: Any) -> str:
    name = value.get("name", "moco") if isinstance(value, dict) else getattr(value, "name", "")
    return f"<{name}>"


# Tags are in angle brackets so that `Config.parse` can drop them from the keys in its errors.
MethodOptions = Annotated[
    Annotated[MoCoOptions, pydantic.Tag("<moco>")]
    | Annotated[SimCLROptions, pydantic.Tag("<simclr>")]
    | Annotated[BYOLOptions, pydantic.Tag("<byol>")]
    | Annotated[SimSiamOptions, pydantic.Tag("<simsiam>")]
    | Annotated[SwAVOptions, pydantic.Tag("<swav>")]
    | Annotated[AdCoOptions, pydantic.Tag("<adco>")]
    | Annotated[InstDiscOptions, pydantic.Tag("<instdisc>")]
    | Annotated[PIRLOptions, pydantic.Tag("<pirl>")]
    | Annotated[PCLOptions, pydantic.Tag("<pcl>")]
    | Annotated[MoCoV3Options, pydantic.Tag("<moco-v3>")]
    | Annotated[DINOOptions, pydantic.Tag("<dino>")]
    | Annotated[SupervisedOptions, pydantic.Tag("<supervised>")],
    pydantic.Discriminator(_tag),
]
KINDS: dict[str, type[Config]] = {
    str(kind.model_fields["name"].default): kind
    for kind in (
        MoCoOptions, SimCLROptions, BYOLOptions, SimSiamOptions, SwAVOptions, AdCoOptions,
        InstDiscOptions, PIRLOptions, PCLOptions, MoCoV3Options, DINOOptions, SupervisedOptions,
    )
}  # fmt: skip

"""Options of the learning methods, one class a method; needs no torch.

Defaults are those of each paper on ImageNet. `RunOptions.method` is one of these classes,
by `name`; a recipe chooses it.
"""

from typing import Annotated, Any, Literal

import pydantic

from clsa.options.config import Config, Count, Fraction, NotNegative, Positive


class MoCoOptions(Config):
    """MoCo v1 and v2; with several weak queries also the contrast of CLSA*."""

    name: Literal["moco"] = "moco"
    """Chosen by the recipe."""
    key_momentum: Fraction = 0.999
    """The key network moves by 1 - key_momentum towards the query network at each step."""
    final_key_momentum: Fraction | None = None
    """Key momentum at the end of the run, reached along a cosine (default: constant)."""
    queue_size: Count = 65536
    """Number of past keys to compare with."""
    bank: Literal["queue", "batch+queue"] = "batch+queue"
    """queue: own key and queue (the papers); batch+queue: all keys of the batch too (the code)."""
    temperature: Positive = 0.2
    """Temperature of the contrastive loss."""
    reduce: Literal["sum", "mean"] = "sum"
    """Whether the terms of several weak queries are summed (the official code) or averaged."""
    symmetric: bool = False
    """Each of two views is query and key in turn; the loss is the mean of both."""
    strong_query: bool = False
    """Queries are strong views at the weak sizes (CLSA's Table 5)."""
    strong_key: bool = False
    """Keys are strong views too."""


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
    """Momentum of the target network at the first step; lower it for short runs."""
    final_key_momentum: Fraction | None = 1.0
    """Momentum of the target network at the end of the run, reached along a cosine."""
    predictor_hidden: Count = 4096
    """Width of the predictor's hidden layer."""
    queue_size: Count = 65536
    """Past target projections, which only the divergence of --stronger compares with."""


class SimSiamOptions(Config):
    """SimSiam: predict the same network's projection of the other view, held constant."""

    name: Literal["simsiam"] = "simsiam"
    """Chosen by the recipe."""
    predictor_hidden: Count = 512
    """Width of the predictor's hidden layer."""
    fixed_predictor_rate: bool = True
    """The predictor's learning rate stays at its peak."""
    queue_size: Count = 4096
    """Past projections, which only the divergence of --stronger compares with."""


class SwAVOptions(Config):
    """SwAV: predict a view's assignment to prototypes from another view."""

    name: Literal["swav"] = "swav"
    """Chosen by the recipe."""
    num_prototypes: Count = 3000
    """Trained prototypes."""
    temperature: Positive = 0.1
    """Temperature of the predicted assignments."""
    epsilon: Positive = 0.05
    """Entropy of the assignments by Sinkhorn's algorithm."""
    sinkhorn_iterations: Count = 3
    """Rounds of Sinkhorn's algorithm; more balance the prototypes better."""
    queue_size: Annotated[int, pydantic.Field(ge=0)] = 3840
    """Past projections that are assigned together with the batch (0: none)."""
    queue_epoch: Annotated[int, pydantic.Field(ge=0)] = 15
    """Epoch from which they are collected; they are used once the queue is full."""
    freeze_steps: Annotated[int, pydantic.Field(ge=0)] = 5005
    """The prototypes stay as they are for the first steps."""


class AdCoOptions(Config):
    """AdCo: the negatives are learned, against the network."""

    name: Literal["adco"] = "adco"
    """Chosen by the recipe."""
    key_momentum: Fraction = 0.999
    """The key network moves by 1 - key_momentum towards the query network at each step."""
    num_negatives: Count = 65536
    """Learned negatives."""
    temperature: Positive = 0.12
    """Temperature of the network's contrastive loss."""
    negative_temperature: Positive = 0.02
    """Temperature of the loss that the negatives ascend."""
    negative_lr: Positive = 3.0
    """Learning rate of the negatives, constant."""
    negative_momentum: Fraction = 0.9
    """Share of the negatives' last update in the next."""
    negative_decay: NotNegative = 1e-4
    """Weight decay of the negatives."""
    reduce: Literal["sum", "mean"] = "sum"
    """Whether the terms of several weak queries are summed (the official code) or averaged."""


class InstDiscOptions(Config):
    """Instance discrimination against a memory with one row a picture."""

    name: Literal["instdisc"] = "instdisc"
    """Chosen by the recipe."""
    temperature: Positive = 0.07
    """Temperature of the similarities."""
    num_negatives: Annotated[int, pydantic.Field(ge=0)] = 4096
    """Rows drawn at each step for noise-contrastive estimation (0: softmax over all rows)."""
    row_momentum: Fraction = 0.5
    """Share of a memory row that stays when its picture is seen."""


class PIRLOptions(Config):
    """PIRL: a picture and its shuffled patches are compared with the picture's memory row."""

    name: Literal["pirl"] = "pirl"
    """Chosen by the recipe."""
    temperature: Positive = 0.07
    """Temperature of the similarities."""
    jigsaw_weight: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.5
    """Share of the patches' loss; the rest is the whole picture's."""
    num_negatives: Count = 32000
    """Memory rows drawn at each step."""
    row_momentum: Fraction = 0.5
    """Share of a memory row that stays when its picture is seen."""
    grid: Annotated[int, pydantic.Field(ge=2, le=5)] = 3
    """Patches a side."""
    jigsaw_size: Annotated[int, pydantic.Field(ge=16)] = 255
    """Side in pixels of the crop that is cut into patches."""
    jigsaw_scale: tuple[Fraction, Fraction] = (0.6, 1.0)
    """Share of the picture's area that it takes."""
    patch_size: Annotated[int, pydantic.Field(ge=8)] = 64
    """Side in pixels of a patch, cut at a random place of its cell."""


class PCLOptions(Config):
    """PCL: MoCo, and contrast with the centres of clusters."""

    name: Literal["pcl"] = "pcl"
    """Chosen by the recipe."""
    key_momentum: Fraction = 0.999
    """The key network moves by 1 - key_momentum towards the query network at each step."""
    queue_size: Count = 16384
    """Number of past keys to compare with."""
    temperature: Positive = 0.2
    """Temperature of the contrast with keys, and mean concentration of the clusters."""
    num_clusters: Annotated[
        tuple[Annotated[int, pydantic.Field(ge=2)], ...], pydantic.Field(min_length=1)
    ] = (25000, 50000, 100000)
    """Clusters of each k-means, one run each; the terms are averaged."""
    warmup_epochs: Annotated[int, pydantic.Field(ge=0)] = 20
    """Epochs before the first clustering."""
    num_negatives: Count = 16384
    """Other clusters' centres to compare with, drawn at each step."""


class MoCoV3Options(Config):
    """MoCo v3: the momentum network's keys of the other view, in large batches without a queue."""

    name: Literal["moco-v3"] = "moco-v3"
    """Chosen by the recipe."""
    key_momentum: Fraction = 0.996
    """Momentum of the key network at the first step; lower it for short runs."""
    final_key_momentum: Fraction | None = 1.0
    """Momentum of the key network at the end of the run, reached along a cosine."""
    temperature: Positive = 1.0
    """Temperature of the contrastive loss."""
    predictor_hidden: Count = 4096
    """Width of the predictor's hidden layer."""
    predictor_norm: Literal["hidden", "all"] = "hidden"
    """Batch norm in the predictor: after its hidden layer, or after its last too (ViT)."""
    freeze_patches: bool = True
    """ViT: the patch embedding stays as it was drawn."""
    queue_size: Count = 4096
    """Past keys, which only the divergence of --stronger compares with."""


class DINOOptions(Config):
    """DINO: follow the momentum network's centred and sharpened assignment to prototypes."""

    name: Literal["dino"] = "dino"
    """Chosen by the recipe."""
    num_prototypes: Count = 65536
    """Rows of the last layer."""
    temperature: Positive = 0.1
    """Temperature of the student."""
    teacher_temperature: Positive = 0.07
    """Temperature of the teacher after its warm-up."""
    first_teacher_temperature: Positive = 0.04
    """Temperature of the teacher at the first step."""
    teacher_warmup_epochs: NotNegative = 30.0
    """Epochs from the one to the other, along a line."""
    center_momentum: Fraction = 0.9
    """Share of the centre that stays at each step."""
    key_momentum: Fraction = 0.996
    """Momentum of the teacher at the first step; lower it for short runs."""
    final_key_momentum: Fraction | None = 1.0
    """Momentum of the teacher at the end of the run, reached along a cosine."""
    freeze_epochs: NotNegative = 1.0
    """The last layer stays as it is for the first epochs."""


class SupervisedOptions(Config):
    """Cross-entropy with the labels: the reference row of every table."""

    name: Literal["supervised"] = "supervised"
    """Chosen by the recipe."""
    label_smoothing: Fraction = 0.0
    """Share of the target spread over all classes."""


def _tag(value: Any) -> str:
    name = value.get("name", "moco") if isinstance(value, dict) else getattr(value, "name", "")
    return f"<{name}>"


# Tags are in angle brackets, so that `Config.parse` can leave them out of the names it tells.
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

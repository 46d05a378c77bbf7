"""Options of what wraps a method: stronger views, mixtures, few labels, stages. Needs no torch."""

from typing import Annotated, Literal

import pydantic

from clsa.options.config import Config, Count, Fraction, NotNegative, Positive

Sizes = tuple[Annotated[int, pydantic.Field(ge=8)], ...]


class Operations(Config):
    """Random operations after the weak recipe: `rounds` times, one is drawn from a pool."""

    pool: Literal["paper", "official", "randaugment"] = "official"
    """paper: CLSA's 14 operations, including Invert, with continuous ranges; official: Identity
    instead of Invert, and nine levels; randaugment: InfoMin's operations, at full strength."""
    rounds: Annotated[int, pydantic.Field(ge=0, le=20)] = 5
    """How many times an operation is drawn for each view."""
    probability: Fraction = 0.5
    """Probability of applying each drawn operation."""


class StrongOptions(Operations):
    """What --stronger adds (CLSA): strong views, and the divergence that makes them follow the weak
    ones. A strong view is the weak recipe, then `rounds` random operations instead of
    views.weak.ops."""

    sizes: Sizes = (96,)
    """Sides of the strong query crops in pixels, one query per side."""
    beta: NotNegative = 1.0
    """Weight of the divergence in the loss."""
    temperature: Positive = 0.2
    """Temperature of the strong views' distribution."""
    target_temperature: Positive = 0.2
    """Temperature of the weak views' distribution, the target."""
    target: Literal["query", "key", "one-hot"] = "query"
    """What the strong views follow. query: the weak query's distribution; key: the key's
    distribution; one-hot: the positive alone."""
    reduce: Literal["sum", "mean"] = "sum"
    """Sum the terms of all pairs of weak and strong queries (as the official code does) or average
    them."""


class MixtureOptions(Config):
    """What --clim adds (CLIM, center-wise local image mixture): views mixed with a neighbour nearer
    to the centre of the picture's cluster, and views of several resolutions."""

    selection: Literal["center-wise", "random", "knn", "k-means", "knn+k-means", "cluster-mean"] = (
        "center-wise"
    )
    """Which pictures to mix with. center-wise: nearest neighbours in the same cluster that are no
    farther from its centre than the picture is; cluster-mean: nearest neighbours in the same
    cluster that are no farther from its centre than its pictures are on average; the others are the
    paper's alternatives."""
    mixing: Literal["cutmix", "mixup", "none"] = "cutmix"
    """cutmix: paste a box of the neighbour into the picture; mixup: average the pixels of both;
    none: leave the picture as it is and use its neighbour's key as a second positive."""
    alpha: Positive = 2.0
    """The picture's own share in the mixture is drawn from Beta(alpha, alpha)."""
    num_clusters: Annotated[int, pydantic.Field(ge=2)] = 10000
    """Number of k-means clusters (the paper's value, for 1.28 million pictures)."""
    neighbours: Count = 40
    """Number of nearest neighbours among which to select."""
    num_positives: Count = 10
    """How many selected neighbours to keep for each picture; each time the picture is shown, one
    of them is drawn."""
    fill: Literal["nearest", "truncate"] = "nearest"
    """If fewer are selected: fill up with the nearest other neighbours (nearest), or keep fewer
    (truncate)."""
    refresh_epochs: Count = 5
    """Compute clusters and neighbours again after this many epochs."""
    start: Fraction = 0.05
    """Share of the run after which they are computed first; until then nothing is mixed."""
    resolutions: Sizes = ()
    """Further sides in pixels: every crop is also shown at these sizes (multi-resolution)."""
    reduce: Literal["mean", "sum"] = "mean"
    """Average the terms of all pairs of resolutions, or sum them (as the paper does)."""


class SuNCEtOptions(Config):
    """What --labels adds (SuNCEt, supervised noise contrastive estimation): labelled pictures with
    each batch, and a loss that pulls pictures of one class together."""

    classes: Annotated[int, pydantic.Field(ge=2)] = 20
    """Number of classes drawn for each step (all classes, if there are fewer)."""
    per_class: Count = 2
    """Labelled pictures per class; a class with fewer gives each of them in turn."""
    views: Annotated[int, pydantic.Field(ge=1, le=2)] = 2
    """Weak views of each labelled picture (SuNCEt's code: 1). Two need the memory of twice the
    pictures, but let a class with a single picture have a positive."""
    temperature: Positive = 0.1
    """Temperature of the similarities."""
    weight: NotNegative = 1.0
    """Weight of this loss."""
    epochs: Count | None = None
    """Use labels only in this many first epochs (default: in all epochs)."""


class ContinualOptions(Config):
    """What --stages adds (CCSSL; Lin, Wang and Lin 2021): some pictures of earlier stages are kept
    as exemplars and shown again, and distillation keeps the network near its earlier state."""

    keep: Literal["distill", "replay", "nothing"] = "distill"
    """distill: exemplars, extra queue and self-supervised distillation; replay: exemplars only;
    nothing: plain fine-tuning, the baseline."""
    exemplars: Count = 20
    """Number of pictures kept from each cluster of a stage."""
    clusters: Count | None = None
    """Clusters per stage (default: its number of classes, or 10 without labels)."""
    extra_keys: Count = 256
    """Length of the extra queue: keys of exemplars that every query is also compared with."""
    extra_weight: NotNegative = 0.1
    """Weight of the contrast with the extra queue."""
    distill_weight: NotNegative = 0.1
    """Weight of the distillation."""
    temperature: Positive = 0.07
    """Temperature of the student's similarities in the distillation."""
    teacher_temperature: Positive = 0.04
    """Temperature of the teacher's similarities in the distillation."""
    teacher_momentum: Fraction = 0.996
    """The teacher moves by 1 - teacher_momentum towards the network after each epoch."""

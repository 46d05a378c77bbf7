"""Options of what goes around a method: stronger views, mixtures, few labels, stages; no torch."""

from typing import Annotated, Literal

import pydantic

from clsa.options.config import Config, Count, Fraction, NotNegative, Positive

Sizes = tuple[Annotated[int, pydantic.Field(ge=8)], ...]


class Operations(Config):
    """Random operations on top of the weak recipe: `rounds` times one of a pool."""

    pool: Literal["paper", "official", "randaugment"] = "official"
    """paper: CLSA's 14, Invert among them, continuous ranges; official: Identity in its place, nine
    levels; randaugment: InfoMin's, at full strength."""
    rounds: Annotated[int, pydantic.Field(ge=0, le=20)] = 5
    """How many times an operation is drawn."""
    probability: Fraction = 0.5
    """Probability of applying each drawn operation."""


class StrongOptions(Operations):
    """What --stronger adds: strong views (the weak recipe, then `rounds` random operations, in
    place of views.weak.ops) and the divergence that makes them follow the weak ones (CLSA)."""

    sizes: Sizes = (96,)
    """Sides of the strong query crops in pixels, one query each."""
    beta: NotNegative = 1.0
    """Weight of the divergence."""
    temperature: Positive = 0.2
    """Temperature of the strong views' distribution."""
    target_temperature: Positive = 0.2
    """Temperature of the weak views' distribution, the target."""
    target: Literal["query", "key", "one-hot"] = "query"
    """The target comes from the weak query, from the key, or is the positive alone."""
    reduce: Literal["sum", "mean"] = "sum"
    """Whether the terms of all pairs of weak and strong queries are summed (the official code) or
    averaged."""


class MixtureOptions(Config):
    """What --clim adds: pictures mixed with a neighbour on the way to the centre of their cluster
    (CLIM, center-wise local image mixture), and views of several resolutions."""

    selection: Literal["center-wise", "random", "knn", "k-means", "knn+k-means", "cluster-mean"] = (
        "center-wise"
    )
    """center-wise: nearest neighbours of the same cluster that are no farther from its centre;
    the others are the paper's alternatives; cluster-mean: nearest neighbours of the same cluster
    that are no farther from its centre than its mean."""
    mixing: Literal["cutmix", "mixup", "none"] = "cutmix"
    """cutmix: a box of the neighbour is pasted; mixup: pixels are averaged; none: the picture
    itself, its neighbour's key being a second positive."""
    alpha: Positive = 2.0
    """The share of the picture itself follows Beta(alpha, alpha)."""
    num_clusters: Annotated[int, pydantic.Field(ge=2)] = 10000
    """Clusters of k-means (the paper's for 1.28 million pictures)."""
    neighbours: Count = 40
    """Nearest neighbours that are looked at."""
    num_positives: Count = 10
    """How many of them are kept for a picture; one is drawn at each visit."""
    fill: Literal["nearest", "truncate"] = "nearest"
    """Where fewer remain: take the nearest of the neighbours too, or stay with fewer."""
    refresh_epochs: Count = 5
    """Clusters and neighbours are found anew every so many epochs."""
    start: Fraction = 0.05
    """Share of the run before the first are found; nothing is mixed before."""
    resolutions: Sizes = ()
    """Sides in pixels at which every crop is seen besides its own size (multi-resolution)."""
    reduce: Literal["mean", "sum"] = "mean"
    """Whether the terms of all pairs of resolutions are averaged or summed (the paper)."""


class SuNCEtOptions(Config):
    """What --labels adds: labelled pictures beside each batch, and a loss that pulls those of one
    class together (SuNCEt, supervised noise contrastive estimation)."""

    classes: Annotated[int, pydantic.Field(ge=2)] = 20
    """Classes drawn for each step (all, where there are fewer)."""
    per_class: Count = 2
    """Labelled pictures of each, drawn with replacement where there are fewer."""
    temperature: Positive = 0.1
    """Temperature of the similarities."""
    weight: NotNegative = 1.0
    """Weight of the loss."""
    epochs: Count | None = None
    """Labels are used in the first so many epochs (default: in all)."""


class ContinualOptions(Config):
    """What --stages adds: some pictures of earlier stages are kept and shown again, and the network
    stays near what it knew (CCSSL, Lin, Wang and Lin 2021)."""

    keep: Literal["distill", "replay", "nothing"] = "distill"
    """distill: exemplars, extra queue and self-supervised distillation; replay: exemplars alone;
    nothing: plain fine-tuning, the baseline."""
    exemplars: Count = 20
    """Pictures kept of each cluster of a stage."""
    clusters: Count | None = None
    """Clusters of a stage (default: its number of classes, 10 without labels)."""
    extra_keys: Count = 256
    """Keys of exemplars that every query is compared with besides."""
    extra_weight: NotNegative = 0.1
    """Weight of that contrast."""
    distill_weight: NotNegative = 0.1
    """Weight of the distillation."""
    temperature: Positive = 0.07
    """Temperature of the student's similarities."""
    teacher_temperature: Positive = 0.04
    """Temperature of the teacher's."""
    teacher_momentum: Fraction = 0.996
    """The teacher moves by 1 - this towards the network after each epoch."""

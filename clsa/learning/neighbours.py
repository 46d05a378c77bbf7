"""Selects positives for each picture (CLIM): neighbours nearer to the centre of its cluster."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor, nn

from clsa.learning import clustering
from clsa.learning.clustering import Nearest
from clsa.loading.order import Companions, Order, Rows
from clsa.options.wrappers import MixtureOptions
from clsa.system import dist, ranks
from clsa.views import rng

NEAR = ("center-wise", "knn", "knn+k-means", "cluster-mean")  # rules that look at neighbours
CLUSTERED = ("center-wise", "k-means", "knn+k-means", "cluster-mean")


class Partners(Companions):
    """One positive for each picture of the order, drawn again each epoch, with its own view.

    Args:
        positives: n x P numbers of pictures; free places hold the picture's own number.
        count: pictures per step.
    """

    def __init__(self, positives: Int[np.ndarray, "n P"], count: int):
        self.positives, self.count = positives, count

    def rows(self, order: Order, step: int) -> Rows:
        """Partners in the order of the anchors; a picture without positives is its own partner."""
        anchors = order.indices(step)
        chosen = self.chosen(order.seed, order.epoch(step), anchors)
        return Rows(chosen, order.count + anchors)

    def chosen(
        self, seed: int, epoch: int, anchors: Int64[np.ndarray, " b"]
    ) -> Int64[np.ndarray, " b"]:
        """The partner of each anchor in an epoch: one of its positives at random."""
        given = self.positives[anchors]
        counts = np.maximum((given != anchors[:, None]).sum(1), 1)
        draws = rng.uniforms(seed, epoch, anchors, rng.PARTNERS, np.arange(1))
        places = (draws[:, 0] * counts).astype(np.int64)
        return given[np.arange(len(anchors)), places].astype(np.int64)


class Found(NamedTuple):
    """Result of `find`."""

    positives: Int64[np.ndarray, "n P"]
    """Numbers of pictures, nearest first (rules in `NEAR`); free places hold the picture's own."""
    numbers: dict[str, float]
    """To log: mean positives per picture before filling, seconds of clustering and of search."""


def near_enough(
    rule: str,
    own: Int64[np.ndarray, " b"],
    near: Int64[np.ndarray, "b k"],
    clusters: Nearest | None,
) -> Bool[np.ndarray, "b k"]:
    """Which neighbours are positives.

    center-wise: Omega_p = {x in Omega_1 and Omega_2 : |v_x - c| <= |v_i - c|}, c the centre of the
    anchor's cluster, Omega_1 that cluster and Omega_2 the neighbours (CLIM, Section 3.2.1).

    Args:
        rule: see `MixtureOptions.selection`.
        own: the anchors.
        near: neighbours of the anchors, -1 for none.
        clusters: clusters of all rows; None for knn.
    """
    if rule == "knn" or clusters is None:
        return near >= 0
    _, assignment, distances = clusters
    same = (near >= 0) & (assignment[near] == assignment[own][:, None])
    if rule == "knn+k-means":
        return same
    limit = distances[own]
    if rule == "cluster-mean":
        counts = np.maximum(np.bincount(assignment), 1)
        limit = (np.bincount(assignment, distances) / counts)[assignment[own]]
    return same & (distances[near] <= limit[:, None])


def kept(
    positive: Bool[np.ndarray, "b k"],
    near: Int64[np.ndarray, "b k"],
    own: Int64[np.ndarray, " b"],
    draws: Float[np.ndarray, "b k"],
    options: MixtureOptions,
) -> Int64[np.ndarray, "b P"]:
    """Choose `num_positives` of the positives at random and return them nearest first.

    Free places get the nearest other neighbours or the row itself, as `fill` says.

    Args:
        draws: uniform in [0, 1); the lowest are taken.
    """
    count, places = options.num_positives, np.arange(near.shape[1])
    fills = (options.fill == "nearest") & (near >= 0) & ~positive
    ranks = np.where(positive, draws, np.where(fills, 1.0 + places, np.inf))
    chosen = np.argsort(ranks, axis=1, kind="stable")[:, :count]
    taken = np.isfinite(np.take_along_axis(ranks, chosen, 1))
    chosen = np.sort(np.where(taken, chosen, near.shape[1]), axis=1)  # the nearest first
    padded = np.concatenate([near, own[:, None]], axis=1)
    result = np.take_along_axis(padded, chosen, 1)
    room = np.repeat(own[:, None], count, axis=1)
    room[:, : result.shape[1]] = result
    return room


def of_same_group(
    groups: Int64[np.ndarray, " n"], draws: Float[np.ndarray, "n P"]
) -> Int64[np.ndarray, "n P"]:
    """For each row P random others of its group, with replacement; itself if it is alone."""
    order = np.argsort(groups, kind="stable")
    counts = np.bincount(groups)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    first, count = (np.cumsum(counts) - counts)[groups], counts[groups]
    step = 1 + (draws * (count - 1)[:, None]).astype(np.int64)
    within = (place - first)[:, None] + np.where(count[:, None] > 1, step, 0)
    return order[first[:, None] + within % count[:, None]]


def find(
    features: Float[np.ndarray, "n D"], options: MixtureOptions, seed: int, epoch: int
) -> Found:
    """Positives of every picture, by `options.selection`.

    Args:
        features: unit rows of any floating type, possibly stored on disk. Rows of zeros stand for
            unreadable pictures: each is its own positive and nobody else's.
        seed, epoch: decide every draw.
    """
    rule, begun = options.selection, time.monotonic()
    read = np.concatenate(
        [
            start + np.flatnonzero(features[start : start + clustering.BLOCK].any(1))
            for start in range(0, len(features), clustering.BLOCK)
        ]
    )
    num = min(options.neighbours, len(read) - 1)
    clusters = None

    def rows(start: int, end: int) -> Float32[np.ndarray, "b D"]:
        return np.ascontiguousarray(features[read[start:end]], np.float32)

    if rule in CLUSTERED or (rule in NEAR and len(read) > clustering.EXACT):
        draw = rng.uniforms(seed, epoch, np.zeros(1, np.int64), rng.POSITIVES, np.arange(1))
        clusters = clustering.k_means(
            rows(0, len(read)), options.num_clusters, int(draw[0, 0] * 2**31)
        )
    clustered = time.monotonic()
    table = np.repeat(np.arange(len(features))[:, None], options.num_positives, axis=1)
    total = 0
    if rule in NEAR:
        start = 0
        centroids = None if clusters is None else clusters.centroids
        for near in clustering.nearest_rows(rows, len(read), num, centroids):
            own = np.arange(start, start + len(near))
            positive = near_enough(rule, own, near, clusters)
            draws = rng.uniforms(seed, epoch, 1 + read[own], rng.POSITIVES, np.arange(num))
            table[read[own]] = read[kept(positive, near, own, draws, options)]
            start, total = start + len(near), total + int(positive.sum())
    else:
        one_group = np.zeros(len(read), np.int64)
        groups = one_group if clusters is None else clusters.assignment
        slots = np.arange(options.num_positives)
        draws = rng.uniforms(seed, epoch, 1 + read, rng.POSITIVES, slots)
        table[read] = read[of_same_group(groups, draws)]
        total = int((np.bincount(groups)[groups] - 1).sum())
    numbers = {
        "positives": round(total / max(len(read), 1), 3),
        "clustering_s": round(clustered - begun, 3),
        "search_s": round(time.monotonic() - clustered, 3),
    }
    return Found(table, numbers)


class Neighbours(nn.Module):
    """The positives of the whole set as of the last refresh, the same on every rank.

    They are a buffer of fixed shape, so a run that resumes during an epoch has the positives that
    the epoch began with. Before the first refresh every picture is its own positive.

    Args:
        num_pictures: n, size of the set.
        options: how positives are selected.
        seed: decides every draw.

    Raises:
        ClsaError: for fewer than 10 pictures per cluster, or without faiss.
    """

    positives: Int[Tensor, "n P"]
    found: Bool[Tensor, ""]
    holds_pictures = True  # same flag as `Method`

    def __init__(self, num_pictures: int, options: MixtureOptions, seed: int):
        super().__init__()
        self.options, self.seed = options, seed
        searches = options.selection in NEAR
        if options.selection in CLUSTERED or (searches and num_pictures > clustering.EXACT):
            clustering.require_pictures("mixture.num_clusters", options.num_clusters, num_pictures)
        elif searches:
            clustering.require_faiss()
        own = torch.arange(num_pictures, dtype=torch.int32)[:, None]
        self.register_buffer("positives", own.repeat(1, options.num_positives))
        self.register_buffer("found", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, embed: Callable[[], Float[Tensor, "n D"]], epoch: int) -> dict[str, float]:
        """Select positives again on rank 0 and send them to all ranks; the others wait.

        Args:
            embed: returns unit rows of the whole set, in its order; called on every rank.
            epoch: epoch of the draws.

        Returns:
            Values to log.
        """
        begun = time.monotonic()
        features = embed()
        numbers = {"embedding_s": round(time.monotonic() - begun, 3)}
        with ranks.first_alone():
            if dist.rank() == 0:
                table, more = find(features.numpy(), self.options, self.seed, epoch)
                numbers = {"positives": more.pop("positives"), **numbers, **more}
                self.positives.copy_(torch.from_numpy(table))
        dist.from_first(self.positives)
        self.found.fill_(True)
        return numbers

    def partners(self, count: int) -> Partners | None:
        """Partners for `count` pictures per step; None before the first refresh."""
        return Partners(self.positives.cpu().numpy(), count) if self.found else None

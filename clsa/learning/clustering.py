"""Clusters and neighbours of a whole set's features, by faiss; centres to compare queries with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor, nn

from clsa.system import dist, ranks
from clsa.system.errors import ClsaError
from clsa.system.extras import require
from clsa.system.machine import num_cores

LEAST, MOST = 10, 1000  # pictures a cluster that k-means is trained on
ITERATIONS, REPEATS = 20, 5
EXACT = 100_000  # rows up to which nearest neighbours are looked for among all
PROBED = 32  # clusters that they are looked for in beyond
BLOCK = 1 << 14  # rows at a time


class Nearest(NamedTuple):
    """Centres of k-means, and the one that each row belongs to."""

    centroids: Float32[np.ndarray, "k D"]
    """As k-means left them: means of unit rows, shorter than 1."""
    assignment: Int64[np.ndarray, "n"]
    distances: Float32[np.ndarray, "n"]
    """Euclidean, to the own centre; not squared."""


def require_faiss() -> Any:
    """The module faiss.

    Raises:
        ClsaError: when it is not installed.
    """
    return require("faiss", "clustering", "k-means")


@contextmanager
def on_all_cores() -> Iterator[Any]:
    """faiss on every core (torchrun asks for one), then as many threads as before.

    torch computes with the same threads: their number may not change in the middle of a run.
    """
    faiss = require_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_cores())
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


def require_pictures(option: str, num_clusters: int, num_pictures: int) -> None:
    """Raise for fewer than 10 pictures a cluster, or without faiss; `option` sets the number."""
    require_faiss()
    if num_pictures < LEAST * num_clusters:
        why = f"k-means needs {LEAST} pictures a cluster, and there are {num_pictures}"
        most = num_pictures // LEAST
        hint = f"ask for at most {most}" if most > 1 else "train on more pictures"
        raise ClsaError(f"{option} {num_clusters}", why, hint)


def k_means(features: Float32[np.ndarray, "n D"], num_clusters: int, seed: int) -> Nearest:
    """Euclidean k-means: the best of 5 runs of 20 rounds, as in PCL's code, on the CPU.

    A run looks at 1000 rows a cluster at most, drawn by `seed`; all rows are assigned. The same
    arguments give the same clusters on one machine. It takes about 200 n k D / 10^11 seconds of one
    core: 4 s for 20,000 rows, 1000 clusters and D = 128, but 13 hours for PCL's 175,000 clusters
    on ImageNet, for which its code uses a GPU.

    Args:
        features: unit rows, at least `num_clusters` of them.
        num_clusters: k >= 1.
        seed: of the first centres, below 2^31.
    """
    features = np.ascontiguousarray(features, np.float32)
    with on_all_cores() as faiss:
        clustering = faiss.Clustering(features.shape[1], num_clusters)
        clustering.niter, clustering.nredo, clustering.seed = ITERATIONS, REPEATS, seed
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = LEAST, MOST
        index = faiss.IndexFlatL2(features.shape[1])
        clustering.train(features, index)  # leaves the centres of the best run in the index
        squared, nearest = index.search(features, 1)
        centroids = faiss.vector_to_array(clustering.centroids).reshape(num_clusters, -1)
    distances = np.sqrt(np.maximum(squared[:, 0], 0))
    return Nearest(centroids, nearest[:, 0].astype(np.int64), distances)


def nearest_rows(
    rows: Callable[[int, int], Float32[np.ndarray, "b D"]],
    count: int,
    num: int,
    centroids: Float32[np.ndarray, "k D"] | None = None,
) -> Iterator[Int64[np.ndarray, "b num"]]:
    """The nearest other rows of each row, the nearest first, in blocks: Euclidean, on the CPU.

    Up to 100,000 rows all are looked at, beyond them those of the 32 clusters whose centres are
    nearest. The row itself is none of its neighbours, whatever equals it; -1 where those clusters
    hold fewer.

    Args:
        rows: gives the rows from one place to another; all are asked for twice, in blocks.
        count: how many rows there are.
        num: neighbours wanted, fewer than `count`.
        centroids: of `k_means`, needed beyond 100,000 rows.
    """
    starts, dim = range(0, count, BLOCK), rows(0, 1).shape[1]
    with on_all_cores() as faiss:
        centres = faiss.IndexFlatL2(dim)
        index = centres
        if count > EXACT:
            assert centroids is not None
            centres.add(centroids)
            index = faiss.IndexIVFFlat(centres, dim, len(centroids))
            index.train(centroids)  # the centres stand already
            index.nprobe = PROBED
        for start in starts:
            index.add(rows(start, min(start + BLOCK, count)))
        for start in starts:
            own = np.arange(start, min(start + BLOCK, count))
            _, found = index.search(rows(start, int(own[-1]) + 1), num + 1)
            itself_last = np.argsort(found == own[:, None], axis=1, kind="stable")
            yield np.take_along_axis(found, itself_last, 1)[:, :num]


def raw_concentrations(
    distances: Float[np.ndarray, "n"], assignment: Int64[np.ndarray, "n"], num_clusters: int
) -> Float[np.ndarray, "k"]:
    """How wide each cluster is (PCL, Section 3.3); clusters are denser the smaller phi is.

    phi_c = sum_{i in c} |z_i - c| / (n_c ln(n_c + 10)), over the n_c rows of cluster c.
    Clusters of one row or none take the largest phi of the others.
    """
    counts = np.bincount(assignment, minlength=num_clusters)
    sums = np.bincount(assignment, distances.astype(np.float64), num_clusters)
    phi = sums / np.maximum(counts, 1) / np.log(counts + 10)
    several = counts > 1
    return np.where(several, phi, np.max(phi, where=several, initial=0.0))


def concentrations(raw: Float[np.ndarray, "k"], temperature: float) -> Float[np.ndarray, "k"]:
    """Raw phi, clipped to its 10th and 90th percentile and scaled to the mean `temperature`.

    Deviation from PCL's code: no phi is less than a hundredth of the largest, since a cluster of
    equal pictures would otherwise divide by zero.
    """
    phi = np.clip(raw, *np.percentile(raw, [10, 90]))
    phi = np.maximum(phi, max(0.01 * phi.max(), 1e-12))
    return temperature * phi / phi.mean()


class Compared(NamedTuple):
    """Some of the centres as a bank for `losses.info_nce`."""

    bank: Float[Tensor, "M D"]
    """c / phi_c, for temperature 1."""
    positive: Int[Tensor, " b"]
    """Bank row of the cluster that each picture belongs to."""
    candidates: Bool[Tensor, "b M"]
    """The bank has room for as many clusters as pictures; what this leaves over is hidden."""


class Clusters(nn.Module):
    """One clustering of the whole set (PCL, Li et al. 2021), the same on every rank.

    Everything is a buffer of fixed shape, so a run resumes in the middle of an epoch with the
    clusters that the epoch began with. Before the first `fit` the centres are random unit rows and
    all pictures belong to the first.

    Args:
        num_pictures: n, size of the set.
        num_clusters: k.
        dim: projection dim D.
        temperature: mean of phi.
        seed: of the first centres.

    Raises:
        ClsaError: for fewer than 10 pictures a cluster, or without faiss.
    """

    centroids: Float[Tensor, "k D"]
    concentrations: Float[Tensor, "k"]
    assignment: Int[Tensor, "n"]

    def __init__(
        self, num_pictures: int, num_clusters: int, dim: int, temperature: float, seed: int
    ):
        super().__init__()
        require_pictures("method.num_clusters", num_clusters, num_pictures)
        self.temperature = temperature
        generator = torch.Generator().manual_seed(seed)
        rows = F.normalize(torch.randn(num_clusters, dim, generator=generator))
        self.register_buffer("centroids", rows)
        self.register_buffer("concentrations", torch.full((num_clusters,), temperature))
        self.register_buffer("assignment", torch.zeros(num_pictures, dtype=torch.int64))

    @torch.no_grad()
    def fit(self, features: Float[Tensor, "n D"], seed: int) -> None:
        """Cluster `features` anew on rank 0 and send what it found to all; the others wait."""
        with ranks.first_alone():
            if dist.rank() == 0:
                self._cluster(features, seed)
        for buffer in (self.centroids, self.concentrations, self.assignment):
            dist.from_first(buffer)

    def _cluster(self, features: Float[Tensor, "n D"], seed: int) -> None:
        read = features.any(1).nonzero()[:, 0]  # rows of unreadable pictures are zeros
        found = k_means(features[read].numpy(), len(self.centroids), seed)
        raw = raw_concentrations(found.distances, found.assignment, len(self.centroids))
        phi = concentrations(raw, self.temperature)
        self.centroids.copy_(F.normalize(torch.from_numpy(found.centroids)))
        self.concentrations.copy_(torch.from_numpy(phi))
        nearest = torch.from_numpy(found.assignment).to(self.assignment)
        self.assignment.zero_().index_copy_(0, read.to(nearest.device), nearest)

    @torch.no_grad()
    def compare(
        self, index: Int[Tensor, " b"], draws: Float[Tensor, "k"], num_others: int
    ) -> Compared:
        """The clusters of the global batch, once each, and `num_others` others by lot.

        Deviations from PCL's code: it takes the clusters of one GPU's pictures, one row a picture,
        so that a cluster of several pictures counts several times; and it fails where there are
        fewer others than asked for, here all of them are then taken.

        Args:
            index: places in the data set of this rank's pictures.
            draws: uniform in [0, 1), the same on every rank; the least win.
            num_others: r.
        """
        own = self.assignment[index]
        everyone = dist.all_gather(own)
        belongs = torch.zeros_like(draws, dtype=torch.bool).index_fill_(0, everyone, True)
        room = min(len(draws), len(everyone) + num_others)
        order = torch.where(belongs, -1.0, draws).topk(room, largest=False).indices
        places = torch.arange(room, device=own.device)
        candidates = (places < belongs.sum() + num_others).expand(len(own), -1)
        place_of = torch.zeros_like(draws, dtype=torch.int64).index_copy_(0, order, places)
        bank = self.centroids[order] / self.concentrations[order][:, None]
        return Compared(bank, place_of[own], candidates)

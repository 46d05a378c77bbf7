"""k-means clusters and nearest neighbours of a whole set, by faiss; cluster centres as a bank."""

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

LEAST, MOST = 10, 1000  # least and most pictures per cluster to train k-means on
ITERATIONS, REPEATS = 20, 5
EXACT = 100_000  # most rows for which the search for neighbours looks at all rows
PROBED = 32  # clusters in which it looks for neighbours if there are more rows
BLOCK = 1 << 14  # rows per block


class Nearest(NamedTuple):
    """Centres of k-means, and the cluster that each row belongs to."""

    centroids: Float32[np.ndarray, "k D"]
    """Means of unit rows, not normalised: shorter than 1."""
    assignment: Int64[np.ndarray, "n"]
    distances: Float32[np.ndarray, "n"]
    """Euclidean distance of a row to the centre of its cluster, not squared."""


def require_faiss() -> Any:
    """The module faiss.

    Raises:
        ClsaError: when it is not installed.
    """
    return require("faiss", "clustering", "k-means")


@contextmanager
def on_all_cores() -> Iterator[Any]:
    """Let faiss use every core (torchrun sets one thread), then restore the number of threads.

    torch computes with the same threads, and their number must not change during a run.
    """
    faiss = require_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_cores())
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


def require_pictures(option: str, num_clusters: int, num_pictures: int) -> None:
    """Raise for fewer than 10 pictures per cluster, or without faiss; the error names `option`."""
    require_faiss()
    if num_pictures < LEAST * num_clusters:
        why = f"k-means needs {LEAST} pictures per cluster, and there are {num_pictures}"
        most = num_pictures // LEAST
        hint = f"set it to at most {most}" if most > 1 else "train on more pictures"
        raise ClsaError(f"{option} {num_clusters}", why, hint)


def k_means(features: Float32[np.ndarray, "n D"], num_clusters: int, seed: int) -> Nearest:
    """Euclidean k-means: the best of 5 runs of 20 rounds, as in PCL's code, on the CPU.

    A run trains on at most 1000 rows per cluster, drawn by `seed`; then all rows are assigned. On
    one machine the same arguments give the same clusters. It takes about 200 n k D / 10^11 seconds
    of one core: 4 s for 20,000 rows, 1000 clusters and D = 128, but 13 hours for PCL's 175,000
    clusters on ImageNet, for which PCL's code uses a GPU.

    Args:
        features: unit rows, at least `num_clusters` of them.
        num_clusters: k >= 1.
        seed: seed of the first centres, below 2^31.
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
    """The nearest other rows of each row, nearest first, in blocks: Euclidean, on the CPU.

    Up to 100,000 rows the search looks at all rows. With more rows it looks only at rows of the 32
    clusters whose centres are nearest; if these hold too few rows, -1 fills the free places. A row
    is never its own neighbour, even if other rows equal it.

    Args:
        rows: returns the rows from a start to an end; each block is read twice.
        count: how many rows there are.
        num: neighbours wanted, fewer than `count`.
        centroids: centres from `k_means`, needed for more than 100,000 rows.
    """
    starts, dim = range(0, count, BLOCK), rows(0, 1).shape[1]
    with on_all_cores() as faiss:
        centres = faiss.IndexFlatL2(dim)
        index = centres
        if count > EXACT:
            assert centroids is not None
            centres.add(centroids)
            index = faiss.IndexIVFFlat(centres, dim, len(centroids))
            index.train(centroids)  # the centres are already set
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
    """phi, how wide each cluster is (PCL, Section 3.3): the smaller phi, the denser the cluster.

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

    Deviation from PCL's code: no phi is less than a hundredth of the largest, because a cluster of
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
    """The bank has room for as many clusters as pictures; rows that are not needed are hidden."""


class Clusters(nn.Module):
    """One clustering of the whole set (PCL, Li et al. 2021), the same on every rank.

    All state is in buffers of fixed shape, so a run that resumes during an epoch has the clusters
    that the epoch began with. Before the first `fit` the centres are random unit rows and all
    pictures belong to the first cluster.

    Args:
        num_pictures: n, size of the set.
        num_clusters: k.
        dim: projection dim D.
        temperature: mean of phi.
        seed: seed of the first centres.

    Raises:
        ClsaError: for fewer than 10 pictures per cluster, or without faiss.
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
        """Cluster `features` on rank 0 and send the result to all ranks; the others wait."""
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
        """The clusters of the global batch, once each, and `num_others` other clusters at random.

        Deviations from PCL's code: that code takes the clusters of one GPU's pictures, one row per
        picture, so that a cluster of several pictures counts several times. It also fails if there
        are fewer other clusters than asked for; here all of them are then taken.

        Args:
            index: places in the data set of this rank's pictures.
            draws: uniform in [0, 1), the same on every rank; the lowest are taken.
            num_others: r, clusters that no picture of the batch belongs to.
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

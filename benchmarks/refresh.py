"""The cost of finding neighbours again (CLIM), for several sizes of the set.

    python -m benchmarks.refresh                 # about a minute

Clusters, nearest neighbours and the choice of positives, for synthetic unit rows of 128 numbers
around as many centres as there are clusters; embedding the pictures is not included. The peer is
scikit-learn: its k-means with the same numbers of centres, rounds and repeats, and its exact
neighbours.
"""

import sys
import time
from typing import NamedTuple

import numpy as np

from benchmarks import report
from benchmarks.report import Row, versus
from clsa.learning import clustering
from clsa.learning.neighbours import find
from clsa.options.wrappers import MixtureOptions
from clsa.system.machine import num_cores

DIM, NEIGHBOURS = 128, 40


class Size(NamedTuple):
    """Pictures and clusters."""

    pictures: int
    clusters: int
    peer: bool
    """Whether scikit-learn is measured too; for the largest size it takes minutes."""


SIZES = (Size(1_000, 10, True), Size(10_000, 80, True), Size(100_000, 780, False))


def rows_of(size: Size) -> np.ndarray:
    """Unit rows around random centres, the same in every call."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((size.clusters, DIM))
    rows = centres[np.arange(size.pictures) % size.clusters]
    rows = rows + 1.5 * generator.standard_normal(rows.shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def ours(rows: np.ndarray, size: Size) -> tuple[float, dict[str, float]]:
    """Seconds of a whole selection, and the seconds of its parts."""
    options = MixtureOptions(num_clusters=size.clusters, neighbours=NEIGHBOURS)
    begun = time.perf_counter()
    found = find(rows, options, 0, 0)
    return time.perf_counter() - begun, found.numbers


def peer(rows: np.ndarray, size: Size) -> float:
    """Seconds of scikit-learn's k-means and neighbours."""
    from sklearn.cluster import KMeans
    from sklearn.neighbors import NearestNeighbors

    begun = time.perf_counter()
    KMeans(
        size.clusters, init="random", n_init=clustering.REPEATS, max_iter=clustering.ITERATIONS,
        tol=0.0, random_state=0,
    ).fit(rows)  # fmt: skip
    NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute").fit(rows).kneighbors(rows)
    return time.perf_counter() - begun


def rows_told(size: Size) -> list[Row]:
    """The rows of one size."""
    rows = rows_of(size)
    seconds, parts = ours(rows, size)
    claim = f"{size.pictures:,} pictures, {size.clusters} clusters"
    whole = f"{claim}: k-means, {NEIGHBOURS} neighbours, positives"
    told = [Row(whole, seconds, unit="s")]
    if size.peer:
        told = [versus(whole, seconds, peer(rows, size), "s", "scikit-learn", None, True)]
    told.append(Row(f"{claim}: k-means alone", parts["clustering_s"], unit="s"))
    return told


def main() -> None:
    """Measure every size."""
    args = report.parser(__doc__).parse_args()
    report.require("faiss", "sklearn")
    sizes = (Size(400, 4, True),) if args.quick else SIZES
    found = []
    for size in sizes:
        found += rows_told(size)
        print(f"{size.pictures:,} pictures: done", file=sys.stderr)
    title, packages = "Neighbours found anew (CLIM)", ("faiss-cpu", "scikit-learn")
    report.publish("refresh", title, found, args, __doc__, threads=num_cores(), peers=packages)


if __name__ == "__main__":
    report.run(main)

"""Selection rules against slow loops over all pairs, the fill rule, and who may be a partner."""

from typing import Any

import numpy as np
import pytest
import torch

from clsa.learning import clustering
from clsa.learning.clustering import k_means, nearest_rows
from clsa.learning.neighbours import Neighbours, Partners, find, kept, near_enough
from clsa.loading.order import Order
from clsa.options.wrappers import MixtureOptions
from clsa.system.errors import ClsaError

RULES = ["center-wise", "cluster-mean", "knn+k-means", "knn", "k-means", "random"]


def features_of(count: int = 120, dim: int = 6, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def options_of(rule: str = "center-wise", **over: Any) -> MixtureOptions:
    values = {"num_clusters": 5, "neighbours": 12, "num_positives": 12, "fill": "truncate"}
    return MixtureOptions.parse({"selection": rule, **values, **over}, "test")


def slow_positives(rows: np.ndarray, rule: str, num: int, clusters: Any) -> list[list[int]]:
    """Omega_p of every row, nearest first, by loops over all pairs in float64."""
    rows, found = rows.astype(np.float64), []
    centres = clusters.centroids.astype(np.float64)

    def to_centre(x: int, c: int) -> float:
        return float(np.linalg.norm(rows[x] - centres[c]))

    cluster = [
        min(range(len(centres)), key=lambda c, i=i: to_centre(i, c)) for i in range(len(rows))
    ]
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        others.sort(key=lambda j, i=i: float(np.linalg.norm(rows[i] - rows[j])))
        members = [j for j in range(len(rows)) if cluster[j] == cluster[i]]
        mean = sum(to_centre(j, cluster[i]) for j in members) / len(members)
        limit = {"center-wise": to_centre(i, cluster[i]), "cluster-mean": mean}.get(rule, np.inf)
        near = others[:num] if rule != "k-means" else others
        found.append(
            [
                j
                for j in near
                if rule == "knn"
                or (cluster[j] == cluster[i] and to_centre(j, cluster[i]) <= limit + 1e-7)
            ]
        )
    return found


@pytest.mark.parametrize("rule", ["center-wise", "cluster-mean", "knn+k-means", "knn"])
def test_rules_equal_slow_loops(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = features_of()
    monkeypatch.setattr(clustering, "BLOCK", 50)  # several blocks
    seen = []

    def watched(*args: Any) -> Any:
        seen.append(k_means(*args))
        return seen[-1]

    monkeypatch.setattr(clustering, "k_means", watched)
    found = find(rows, options_of(rule), 0, 3)
    clusters = seen[0] if seen else k_means(rows, 5, 0)
    wanted = slow_positives(rows, rule, 12, clusters)
    for i, (given, right) in enumerate(zip(found.positives.tolist(), wanted, strict=True)):
        assert given == right + [i] * (12 - len(right))
    assert found.numbers["positives"] == pytest.approx(np.mean([len(x) for x in wanted]), abs=1e-3)


def test_no_positive_is_farther_from_the_centre_and_the_nearest_to_it_has_none() -> None:
    rows = features_of(400)
    clusters = k_means(rows, 5, 1)
    (near,) = nearest_rows(lambda a, b: rows[a:b], 400, 40)
    own = np.arange(400)
    mask = near_enough("center-wise", own, near, clusters)
    distances, assignment = clusters.distances, clusters.assignment
    assert mask.any()
    for i in own:
        chosen = near[i][mask[i]]
        assert (assignment[chosen] == assignment[i]).all()
        assert (distances[chosen] <= distances[i]).all() and i not in chosen
    for c in range(5):
        members = np.flatnonzero(assignment == c)
        assert not mask[members[distances[members].argmin()]].any()


def test_duplicates_are_positives_of_each_other_and_nobody_is_its_own() -> None:
    rows = np.repeat(features_of(30), 4, axis=0)
    found = find(rows, options_of(neighbours=3, num_positives=3), 0, 0)
    for i, given in enumerate(found.positives.tolist()):
        group = set(range(i // 4 * 4, i // 4 * 4 + 4)) - {i}
        assert set(given) == group


def test_the_fill_rule_takes_the_nearest_of_the_others() -> None:
    near, own = np.array([[7, 3, 9, 4, 5, -1]]), np.array([1])
    positive = np.array([[False, False, True, False, True, False]])
    draws = np.zeros((1, 6))
    nearest = options_of(num_positives=4, fill="nearest")
    assert kept(positive, near, own, draws, nearest).tolist() == [[7, 3, 9, 5]]
    truncate = options_of(num_positives=4, fill="truncate")
    assert kept(positive, near, own, draws, truncate).tolist() == [[9, 5, 1, 1]]
    many = options_of(num_positives=8, fill="nearest")
    assert kept(positive, near, own, draws, many).tolist() == [[7, 3, 9, 4, 5, 1, 1, 1]]
    lots = np.array([[0.9, 0.1, 0.8, 0.2, 0.3, 0.0]])
    all_six = np.ones((1, 6), bool)
    all_six[0, 5] = False
    two = options_of(num_positives=2, fill="nearest")
    assert kept(all_six, near, own, lots, two).tolist() == [[3, 4]]  # by the draws, not the nearest


def test_k_means_draws_from_the_cluster_alone_and_random_from_all() -> None:
    rows = features_of(200)
    options = options_of("k-means", num_positives=40)
    found = find(rows, options, 0, 0).positives
    assert (found != np.arange(200)[:, None]).all()
    groups = [set(line) | {i} for i, line in enumerate(found.tolist())]
    for i, line in enumerate(found.tolist()):
        assert all(groups[j] & groups[i] for j in line)
    anyone = find(rows, options_of("random", num_positives=40), 0, 0).positives
    assert (anyone != np.arange(200)[:, None]).all()
    assert len(np.unique(anyone)) == 200
    counts = np.bincount(anyone.ravel(), minlength=200)
    assert counts.std() < 2 * np.sqrt(40)


@pytest.mark.parametrize("rule", RULES)
def test_unreadable_pictures_are_positives_of_themselves_only(rule: str) -> None:
    rows = features_of()
    rows[[0, 17, 119]] = 0
    found = find(rows, options_of(rule, fill="nearest", num_positives=4), 0, 0).positives
    assert (found[[0, 17, 119]] == np.array([[0], [17], [119]])).all()
    others = np.delete(found, [0, 17, 119], axis=0)
    assert not np.isin(others, [0, 17, 119]).any()


@pytest.mark.parametrize("rule", RULES)
def test_draws_depend_on_seed_and_epoch_and_float16_is_accepted(rule: str) -> None:
    rows, options = features_of(), options_of(rule, num_positives=3, fill="nearest")
    first = find(rows, options, 0, 5).positives
    assert np.array_equal(first, find(rows, options, 0, 5).positives)
    assert not np.array_equal(first, find(rows, options, 0, 6).positives)
    assert not np.array_equal(first, find(rows, options, 1, 5).positives)
    half = rows.astype(np.float16)
    same = find(half, options, 0, 5).positives
    assert np.array_equal(same, find(half.astype(np.float32), options, 0, 5).positives)


def test_beyond_the_exact_size_neighbours_come_from_the_nearest_clusters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = features_of(1000, 4)
    (exact,) = nearest_rows(lambda a, b: rows[a:b], 1000, 5)
    monkeypatch.setattr(clustering, "EXACT", 500)
    centroids = k_means(rows, 20, 0).centroids
    for probed, share in ((20, 1.0), (4, 0.9)):
        monkeypatch.setattr(clustering, "PROBED", probed)
        (found,) = nearest_rows(lambda a, b: rows[a:b], 1000, 5, centroids)
        assert (found == exact).mean() >= share
    table = find(rows, options_of("knn", num_clusters=20, fill="nearest"), 0, 0).positives
    assert (table != np.arange(1000)[:, None]).all()


def test_faiss_leaves_torch_its_threads() -> None:
    before = torch.get_num_threads()
    rows = features_of()
    k_means(rows, 5, 0)
    list(nearest_rows(lambda a, b: rows[a:b], 120, 5))
    assert torch.get_num_threads() == before


def test_partners_are_drawn_anew_each_epoch_with_views_of_their_own() -> None:
    positives = np.array([[1, 2, 3], [1, 1, 1], [5, 2, 2], [0, 5, 3], [0, 1, 2], [4, 3, 5]])
    order, partners = Order(6, 3, seed=0), Partners(positives, 3)
    seen: dict[int, set[int]] = {i: set() for i in range(6)}
    for step in range(80):
        index, drawn = partners.rows(order, step)
        anchors = order.indices(step)
        assert drawn.tolist() == (6 + anchors).tolist()
        for anchor, partner in zip(anchors.tolist(), index.tolist(), strict=True):
            seen[anchor].add(partner)
    assert seen == {0: {1, 2, 3}, 1: {1}, 2: {5}, 3: {0, 5}, 4: {0, 1, 2}, 5: {4, 3}}


def test_there_are_no_partners_before_the_first_refresh() -> None:
    neighbours = Neighbours(120, options_of(), seed=0)
    assert neighbours.partners(4) is None
    numbers = neighbours.fit(lambda: torch.from_numpy(features_of()), 0)
    assert list(numbers) == ["positives", "embedding_s", "clustering_s", "search_s"]
    partners = neighbours.partners(4)
    assert partners is not None and partners.count == 4


def test_more_clusters_than_pictures_can_fill_are_refused_where_they_are_needed() -> None:
    with pytest.raises(ClsaError, match=r"mixture\.num_clusters 5 .* at most 4"):
        Neighbours(49, options_of(), seed=0)
    for rule in ("knn", "random"):
        Neighbours(49, options_of(rule), seed=0)

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clsa.learning.clustering import Clusters, concentrations, k_means, raw_concentrations
from clsa.system.errors import ClsaError


def blobs(num: int, each: int, dim: int = 8, spread: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around `num` axes in shuffled order, and the axis of each."""
    draw = np.random.default_rng(0)
    names = draw.permutation(np.repeat(np.arange(num), each))
    rows = np.eye(dim)[names] + spread * draw.standard_normal((num * each, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), names


def test_separated_blobs_are_found_exactly() -> None:
    rows, names = blobs(5, 30)
    found = k_means(rows, 5, seed=1)
    pairs = set(zip(names.tolist(), found.assignment.tolist(), strict=True))
    assert len(pairs) == 5
    for name, cluster in pairs:
        mean = rows[names == name].mean(0)
        np.testing.assert_allclose(found.centroids[cluster], mean, atol=1e-5)
        own = np.linalg.norm(rows[names == name] - mean, axis=1)
        np.testing.assert_allclose(found.distances[names == name], own, atol=1e-3)


def test_same_seed_same_clusters_and_every_row_has_its_nearest_centre() -> None:
    rows = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    first, again, other = (k_means(rows, 7, seed) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(first.centroids, other.centroids)
    apart = np.linalg.norm(rows[:, None] - first.centroids, axis=2)
    assert np.array_equal(apart.argmin(1), first.assignment)
    np.testing.assert_allclose(apart.min(1), first.distances, rtol=1e-4)


def phi_by_loop(distances: list[float], assignment: list[int], num: int) -> list[float]:
    members = [
        [d for d, a in zip(distances, assignment, strict=True) if a == c] for c in range(num)
    ]
    phi = [sum(m) / (len(m) * math.log(len(m) + 10)) if len(m) > 1 else 0.0 for m in members]
    return [p if len(m) > 1 else max(phi) for p, m in zip(phi, members, strict=True)]


def test_two_points_at_distance_one() -> None:
    phi = raw_concentrations(np.ones(2), np.zeros(2, np.int64), 1)
    assert phi[0] == pytest.approx(1 / math.log(12)) == pytest.approx(0.402430, abs=1e-6)


def test_raw_concentrations_equal_the_loop_and_clusters_of_one_take_the_largest() -> None:
    draw = np.random.default_rng(0)
    distances, assignment = draw.random(60), draw.integers(0, 6, 60)
    assignment[assignment == 2], assignment[7] = 3, 2  # cluster 2 has one row, cluster 6 none
    phi = raw_concentrations(distances, assignment, 7)
    wanted = phi_by_loop(distances.tolist(), assignment.tolist(), 7)
    np.testing.assert_allclose(phi, wanted, rtol=1e-12)
    assert phi[2] == phi[6] == phi.max()


def test_concentrations_are_clipped_and_have_the_temperature_as_mean() -> None:
    raw = np.arange(1.0, 12.0)
    phi = concentrations(raw, 0.2)
    assert phi.mean() == pytest.approx(0.2)
    clipped = np.clip(raw, 2, 10)  # the 2nd and 10th of eleven numbers
    np.testing.assert_allclose(phi, 0.2 * clipped / clipped.mean())
    np.testing.assert_allclose(concentrations(np.full(4, 3.0), 0.2), 0.2)


@pytest.mark.parametrize("zeros", [3, 8, 10])
def test_clusters_of_equal_pictures_do_not_divide_by_zero(zeros: int) -> None:
    raw = np.ones(10)
    raw[:zeros] = 0
    phi = concentrations(raw, 0.2)
    assert phi.mean() == pytest.approx(0.2) and phi.min() >= 0.01 * phi.max() > 0


def fitted(num: int = 5) -> tuple[Clusters, np.ndarray]:
    rows, names = blobs(num, 30)
    clusters = Clusters(len(rows), num, rows.shape[1], 0.2, seed=0)
    clusters.fit(torch.from_numpy(rows), seed=1)
    return clusters, names


def test_fit_fills_buffers_of_fixed_shape_with_unit_centres() -> None:
    fresh = Clusters(150, 5, 8, 0.2, seed=0)
    clusters, _ = fitted()
    before, after = fresh.state_dict(), clusters.state_dict()
    shapes = {"centroids": (5, 8), "concentrations": (5,), "assignment": (150,)}
    for name, shape in shapes.items():
        assert before[name].shape == after[name].shape == shape
        assert before[name].dtype == after[name].dtype
    torch.testing.assert_close(clusters.centroids.norm(dim=1), torch.ones(5))
    assert clusters.concentrations.mean().item() == pytest.approx(0.2)
    fresh.load_state_dict(after)
    assert torch.equal(fresh.assignment, clusters.assignment)


@pytest.mark.parametrize("num_others", [0, 1, 2, 3, 100])
def test_a_batch_is_compared_with_its_own_clusters_and_others_by_lot(num_others: int) -> None:
    clusters, names = fitted()
    chosen = np.concatenate([np.flatnonzero(names == name)[:2] for name in (0, 3)])
    index, draws = torch.from_numpy(chosen), torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7]).double()
    bank, positive, candidates = clusters.compare(index, draws, num_others)
    assert bank.shape == (min(5, 4 + num_others), 8) and not bank.requires_grad
    own = clusters.assignment[index]
    rows = clusters.centroids / clusters.concentrations[:, None]
    assert torch.equal(bank[positive], rows[own])
    others = sorted(set(range(5)) - set(own.tolist()), key=lambda c: float(draws[c]))
    wanted = set(own.tolist()) | set(others[:num_others])
    for seen in candidates:
        found = [rows.sub(row).abs().sum(1).argmin().item() for row in bank[seen]]
        assert len(found) == len(wanted) and set(found) == wanted  # each of them once


def test_all_centres_and_equal_concentrations_give_plain_cross_entropy() -> None:
    from clsa.learning.losses import info_nce

    clusters, _ = fitted()
    clusters.concentrations.fill_(0.2)
    index, generator = torch.arange(6), torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(6, 8, generator=generator))
    draws = torch.rand(5, generator=generator).double()
    bank, positive, candidates = clusters.compare(index, draws, 5)
    got = info_nce(query, bank, positive, 1.0, candidates)
    logits = query @ clusters.centroids.T / 0.2
    torch.testing.assert_close(got, F.cross_entropy(logits, clusters.assignment[index]))


def test_rows_of_unreadable_pictures_do_not_move_the_centres() -> None:
    rows, _ = blobs(5, 30)
    with_gaps = np.insert(rows, [0, 40, 150], np.zeros(8, np.float32), axis=0)
    whole, gaps = (Clusters(len(x), 5, 8, 0.2, seed=0) for x in (rows, with_gaps))
    whole.fit(torch.from_numpy(rows), seed=3)
    gaps.fit(torch.from_numpy(with_gaps), seed=3)
    assert torch.equal(whole.centroids, gaps.centroids)
    assert torch.equal(whole.concentrations, gaps.concentrations)
    read = torch.from_numpy(with_gaps).any(1)
    assert torch.equal(gaps.assignment[read], whole.assignment) and read.sum() == len(rows)


def test_too_few_pictures_are_refused_before_training() -> None:
    Clusters(50, 5, 8, 0.2, seed=0)
    with pytest.raises(ClsaError, match=r"num_clusters 5 - .*10 pictures.*49.*at most 4"):
        Clusters(49, 5, 8, 0.2, seed=0)
    with pytest.raises(ClsaError, match="more pictures"):
        Clusters(12, 2, 8, 0.2, seed=0)


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ClsaError, match=r"faiss is not installed.*clsa\[clustering\]"):
        Clusters(50, 5, 8, 0.2, seed=0)

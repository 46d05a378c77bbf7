import numpy as np
import pytest
import torch

from clsa.views import rng


def test_numpy_and_torch_give_the_same_numbers() -> None:
    index, slots = np.array([0, 1, 7, 2**40, 2**62]), np.arange(50)
    for seed, epoch, view in [(0, 0, 0), (5, 199, 3), (2**31, 1, 1_000_001)]:
        ours = rng.uniforms(seed, epoch, index, view, slots)
        theirs = rng.uniforms(seed, epoch, torch.from_numpy(index), view, torch.from_numpy(slots))
        assert ours.shape == (5, 50) and ours.dtype == np.float64
        assert np.array_equal(ours, theirs.numpy())


def splitmix_reference(*words: int) -> int:
    """The same hash with Python's unbounded integers."""
    mask, state = 2**64 - 1, 0
    for word in words:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state


@pytest.mark.parametrize("words", [(0, 0, 0, 0, 0), (1, 2, 3, 4, 5), (9, 0, 2**50, 1_000_003, 40)])
def test_hash_equals_splitmix64_in_unbounded_integers(words: tuple[int, ...]) -> None:
    seed, epoch, index, view, slot = words
    bits = rng.hash_bits(seed, epoch, np.array([index]), view, np.array([slot]))
    assert int(bits[0, 0]) % 2**64 == splitmix_reference(*words)


@pytest.mark.parametrize("axis", ["seed", "epoch", "index", "view", "slot"])
def test_uniform_along_every_axis(axis: str) -> None:
    count = 1 << 16
    base = {"seed": 0, "epoch": 0, "view": 0}
    if axis in base:  # plain integers: one call per value, so few values and many slots
        calls = [base | {axis: value} for value in range(count // 64)]
        zero = np.zeros(1, np.int64)
        draws = [rng.uniforms(c["seed"], c["epoch"], zero, c["view"], np.arange(64)) for c in calls]
        u = np.concatenate(draws).ravel()
    else:
        many, one = np.arange(count), np.zeros(1, np.int64)
        index, slots = (many, one) if axis == "index" else (one, many)
        u = rng.uniforms(0, 0, index, 0, slots).ravel()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 4 / np.sqrt(12 * count)
    assert abs(u.var() - 1 / 12) < 4 / np.sqrt(180 * count)
    counts = np.bincount((u * 256).astype(int), minlength=256)
    chi_square = ((counts - count / 256) ** 2 / (count / 256)).sum()
    assert abs(chi_square - 255) < 4 * np.sqrt(2 * 255)
    neighbours = np.corrcoef(u[:-1], u[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(count)


def test_all_coordinates_matter() -> None:
    index, slots = np.arange(10), np.arange(5)
    base = rng.uniforms(1, 2, index, 3, slots)
    for other in [(2, 2, index, 3), (1, 3, index, 3), (1, 2, index + 10, 3), (1, 2, index, 4)]:
        assert not np.isclose(base, rng.uniforms(*other, slots)).any()
    assert not np.isclose(base, rng.uniforms(2, 1, index, 3, slots)).any()


def test_rows_drawn_alone_equal_rows_drawn_together() -> None:
    index, slots = np.random.default_rng(0).permutation(1000)[:64], np.arange(20)
    together = rng.uniforms(4, 5, index, 1, slots)
    for i, row in zip(index, together, strict=True):
        assert np.array_equal(rng.uniforms(4, 5, np.array([i]), 1, slots)[0], row)
    some = rng.uniforms(4, 5, index[::-1], 1, slots[3:7])
    assert np.array_equal(some, together[::-1, 3:7])


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation_holds_every_number_once(count: int) -> None:
    order = rng.permutation(0, 0, count)
    assert np.array_equal(np.sort(order), np.arange(count))


def test_permutations_differ_and_repeat() -> None:
    first = rng.permutation(0, 0, 1000)
    assert np.array_equal(first, rng.permutation(0, 0, 1000))
    for other in [(1, 0, 1000), (0, 1, 1000), (0, 0, 1000, rng.HOLDOUT)]:
        kept = (first == rng.permutation(*other)).sum()
        assert kept < 10  # a random permutation keeps one place on average

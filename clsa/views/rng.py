"""Randomness from a counter: every draw is a pure function of (seed, epoch, index, view, slot).

There is no generator, so there is no state to save. The same views come out for any number of
workers or processes, and wherever a run is resumed. The arithmetic uses only 64-bit integer
`* + ^ >> &`, which overflow in the same way in NumPy and torch, so CPU and CUDA agree to the bit.

The hash is SplitMix64's finaliser (Steele, Lea, Flood 2014), applied once per absorbed word.
"""

from typing import TypeVar

import numpy as np
from torch import Tensor

Ints = TypeVar("Ints", np.ndarray, Tensor)

# Streams that are not views: their numbers are far above those of views.
ORDER, REPLACEMENT, PERMUTATION, HOLDOUT = 1_000_001, 1_000_002, 1_000_003, 1_000_004
SECOND_PERMUTATION, NEGATIVES, JIGSAW, CLUSTERS = 1_000_005, 1_000_006, 1_000_007, 1_000_008
FEW_LABELS, CLASSES, STAGES, LOWSHOT = 1_000_009, 1_000_010, 1_000_011, 1_000_012
POSITIVES, PARTNERS, MIXTURE = 1_000_020, 1_000_021, 1_000_022
MIXTURE_KEYS = 1_000_100  # the first of several streams, one for each set of keys


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Ints, bits: int) -> Ints:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, not arithmetic


def _mix(x: Ints) -> Ints:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def hash_bits(seed: int, epoch: int, index: Ints, view: int, slots: Ints) -> Ints:
    """64 hashed bits for every pair of `index` (any shape) and `slots` (S,): shape (..., S), int64.

    `index` and `slots` are int64, both arrays or both tensors, on one device.
    """
    state = index * 0
    for word in (seed, epoch):
        state = _mix((state ^ word) + _GOLDEN)
    for word in (index, view):
        state = _mix((state ^ word) + _GOLDEN)
    return _mix((state[..., None] ^ slots) + _GOLDEN)


def uniforms(seed: int, epoch: int, index: Ints, view: int, slots: Ints) -> Ints:
    """Uniform numbers in [0, 1) on a grid of 2^-24, shape (..., S).

    float64 for arrays, float32 for tensors; both hold every point of the grid exactly.
    """
    return _shift_right(hash_bits(seed, epoch, index, view, slots), 40) * 2.0**-24


def permutation(seed: int, epoch: int, count: int, stream: int = ORDER) -> np.ndarray:
    """A permutation of range(count), int64: the order of the samples of one epoch."""
    bits = hash_bits(seed, epoch, np.arange(count, dtype=np.int64), stream, np.zeros(1, np.int64))
    return np.argsort(bits[:, 0], kind="stable")

"""The machine that a process runs on: its cores, its allocator, the way to its device."""

import ctypes
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def num_cores() -> int:
    """Cores that this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return len(allowed) or os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have the C library keep up to 2 GB of freed memory for the next tensors of this process.

    By default glibc gives large blocks back to the system as they are freed, and every step pays
    for their page faults again: 600 ms instead of 500 ms a step of clsa-small on 2 cores, a third
    of the time of features. Older glibc does so for blocks of up to 32 MiB only; elsewhere than
    under glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    most = (1 << 31) - 1
    # The first must succeed: after the others alone, blocks from 128 kB on would be given back.
    if mallopt and (mallopt(_M_MMAP_THRESHOLD, most) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)):
        mallopt(_M_TRIM_THRESHOLD, most)
        mallopt(_M_TOP_PAD, 256 << 20)


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one dtype as tensors on the device, sent together and without waiting."""
    joined = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        joined = joined.pin_memory().to(device, non_blocking=True)
    parts = joined.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

"""The machine that a process runs on: its cores, its memory allocator, copies to its device."""

import ctypes
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clsa.system import quota

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def num_cores() -> int:
    """Cores that this process may use, by affinity, a container's quota and SLURM's share.

    A quota of 1.5 cores counts as 2: one thread could not use it.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    there = len(allowed) or os.cpu_count() or 1
    given = min(there, quota.cgroup_cores(), quota.slurm_cores())
    return max(1, math.floor(given + 0.5))


def share_of_cores() -> int:
    """Cores for this process, if the others that torchrun started here take as many each."""
    return max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def keep_freed_memory() -> None:
    """Have the C library keep up to 2 GB of freed memory for the next tensors of this process.

    By default glibc returns large freed blocks to the system, and every step pays for their page
    faults again: a step of clsa-small on 2 cores takes 600 ms instead of 500 ms, and computing
    features loses a third of its time. Older glibc can keep only blocks of up to 32 MiB. Without
    glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    most = (1 << 31) - 1
    # The mmap threshold must be set first: with only the others, blocks over 128 kB would be
    # returned.
    if mallopt and (mallopt(_M_MMAP_THRESHOLD, most) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)):
        mallopt(_M_TRIM_THRESHOLD, most)
        mallopt(_M_TOP_PAD, 256 << 20)


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one dtype as tensors on the device, sent in one copy without waiting for it."""
    joined = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        joined = joined.pin_memory().to(device, non_blocking=True)
    parts = joined.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

"""The machine: freed memory stays with the process, uploads keep values and shapes."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from clsa.system.machine import upload

COUNT = """
import resource, sys
import torch
from clsa.system.machine import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(10):
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", COUNT, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_tensors_are_not_given_back_to_the_system() -> None:
    assert faults("keep") < 100 < faults("leave")


def test_upload_keeps_values_and_shapes() -> None:
    arrays = [np.arange(6).reshape(2, 3), np.zeros((0,), np.int64), np.arange(4)[::2]]
    for tensor, array in zip(upload(arrays, torch.device("cpu")), arrays, strict=True):
        assert np.array_equal(tensor.numpy(), array)

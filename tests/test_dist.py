"""With one process every function is the identity; several processes are in test_train.py."""

import numpy as np
import pytest
import torch

from clsa import dist
from clsa.errors import ClsaError


def test_one_process_is_the_identity() -> None:
    rows = torch.randn(4, 3, requires_grad=True)
    assert torch.equal(dist.all_gather(rows), rows) and not dist.all_gather(rows).requires_grad
    turned = dist.permuted(rows, np.array([2, 0, 3, 1]))
    assert torch.equal(turned, rows[[2, 0, 3, 1]]) and not turned.requires_grad
    assert torch.equal(dist.all_max(rows.detach()), rows)
    assert (dist.rank(), dist.world_size()) == (0, 1)
    with dist.process_group(torch.device("cpu")):
        assert dist.world_size() == 1


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "tpu"])
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(ClsaError, match=f"device {name}"):
        dist.pick_device(name)


def test_auto_finds_a_device() -> None:
    assert dist.pick_device("auto").type in ("cpu", "cuda")
    assert dist.pick_device("cpu") == torch.device("cpu")

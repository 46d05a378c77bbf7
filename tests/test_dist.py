"""With one process every function is the identity; several processes are in test_train.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as td
from torch.multiprocessing import spawn

from clsa import dist, rng
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


def _permute(rank: int, world: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    rows = torch.arange(24.0).reshape(4, 3, 2) + 100 * rank
    orders = [rng.permutation(seed, 0, 4 * world) for seed in range(5)]
    orders.append(np.arange(4 * world))  # nobody sends to another
    for order in orders:
        whole = dist.all_gather(rows)[torch.from_numpy(order)]
        share = dist.permuted(rows, order)
        assert torch.equal(share, whole[4 * rank : 4 * rank + 4])
    Path(out, f"{rank}").touch()
    td.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_permuted_is_a_share_of_what_gathering_gives(world: int, tmp_path: Path) -> None:
    spawn(_permute, (world, str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=world)
    assert all((tmp_path / f"{rank}").exists() for rank in range(world))


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "tpu"])
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(ClsaError, match=f"device {name}"):
        dist.pick_device(name)


def test_auto_finds_a_device() -> None:
    assert dist.pick_device("auto").type in ("cpu", "cuda")
    assert dist.pick_device("cpu") == torch.device("cpu")

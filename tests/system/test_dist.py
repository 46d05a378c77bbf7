"""With one process every function is the identity; with several, values and gradients are
compared with hand-made ones.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as td
from torch.multiprocessing import spawn

from clsa.system import dist
from clsa.system.errors import ClsaError
from clsa.views import rng


def test_one_process_is_the_identity() -> None:
    rows = torch.randn(4, 3, requires_grad=True)
    assert torch.equal(dist.all_gather(rows), rows) and not dist.all_gather(rows).requires_grad
    turned = dist.permuted(rows, np.array([2, 0, 3, 1]))
    assert torch.equal(turned, rows[[2, 0, 3, 1]]) and not turned.requires_grad
    assert torch.equal(dist.all_max(rows.detach()), rows)
    assert dist.all_sum(rows) is rows and dist.all_gather_with_grad(rows) is rows
    assert dist.from_first(rows) is rows
    assert (dist.rank(), dist.world_size()) == (0, 1)
    with dist.process_group(torch.device("cpu")):
        assert dist.world_size() == 1


def _permute(rank: int, world: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    rows = torch.arange(24.0).reshape(4, 3, 2) + 100 * rank
    orders = [rng.permutation(seed, 0, 4 * world) for seed in range(5)]
    orders.append(np.arange(4 * world))  # no rank sends rows to another
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


def _draw(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _exchange(rank: int, world: int, rendezvous: str, out: str) -> None:
    """Sums and gathers with losses that weigh every number differently on every rank."""
    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    everyone, ranks = _draw((world, 3, 2), 0), range(world)

    value = everyone[rank].clone().requires_grad_()
    total = dist.all_sum(value)
    torch.testing.assert_close(total.detach(), everyone.sum(0))
    weights = [_draw((3, 2), 10 + each) for each in ranks]
    (weights[rank] * total**2).sum().backward()
    expected = sum((2 * each * everyone.sum(0) for each in weights), torch.zeros(3, 2))
    torch.testing.assert_close(value.grad, expected)
    torch.testing.assert_close(value.detach(), everyone[rank])  # not summed in place

    rows = everyone[rank].clone().requires_grad_()
    gathered = dist.all_gather_with_grad(rows)
    assert torch.equal(gathered.detach(), everyone.flatten(0, 1))
    assert torch.equal(gathered.detach(), dist.all_gather(rows))
    weights = [_draw((3 * world, 2), 20 + each) for each in ranks]
    (weights[rank] * gathered**2).sum().backward()
    own = slice(3 * rank, 3 * rank + 3)
    expected = sum((2 * each[own] * everyone[rank] for each in weights), torch.zeros(3, 2))
    torch.testing.assert_close(rows.grad, expected)

    columns = everyone[rank].T.clone().requires_grad_()  # not contiguous
    dist.all_sum(columns.T).sum().backward()
    torch.testing.assert_close(columns.grad, torch.full((2, 3), float(world)).double())

    mine = everyone[rank].clone()
    assert dist.from_first(mine) is mine and torch.equal(mine, everyone[0])
    Path(out, f"{rank}").touch()
    td.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_sums_and_gathers_give_gradients_of_all_ranks_losses(world: int, tmp_path: Path) -> None:
    spawn(_exchange, (world, str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=world)
    assert all((tmp_path / f"{rank}").exists() for rank in range(world))


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "tpu"])
def test_devices_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(ClsaError, match=f"device {name}"):
        dist.pick_device(name)


def test_auto_finds_a_device() -> None:
    assert dist.pick_device("auto").type in ("cpu", "cuda")
    assert dist.pick_device("cpu") == torch.device("cpu")

"""The memory of InstDisc and PIRL, and the loss of noise-contrastive estimation."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from clsa.learning.bank import Memory
from clsa.learning.losses import info_nce, noise_contrastive
from tests.support import reference_memory


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


# ---- noise-contrastive estimation


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_estimate_equals_a_float64_loop(temperature: float) -> None:
    query, own, sampled = unit(5, 6), unit(5, 6, seed=1), unit(11, 6, seed=2)
    total = reference_memory.normalizer(query, own, sampled, 40, temperature)
    log = torch.tensor(math.log(total), dtype=torch.float64)
    got = noise_contrastive(query, own, sampled, log, 40, temperature).item()
    wanted = reference_memory.noise_contrastive(query, own, sampled, total, 40, temperature)
    assert got == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize(("count", "value"), [(4096, 9.317888), (1, 2 * math.log(2))])
def test_probabilities_of_noise_give_the_hand_computed_value(count: int, value: float) -> None:
    """methods 3.8: P = 1/n everywhere gives ln(1 + m) + m ln((m + 1) / m)."""
    query, rows = torch.tensor([[0.0, 1, 0, 0]] * 3), torch.tensor([[1.0, 0, 0, 0]])
    own, sampled = rows.expand(3, 4), rows.expand(count, 4)
    loss = noise_contrastive(query, own, sampled, torch.tensor(math.log(50_000)), 50_000)
    assert loss.item() == pytest.approx(value, abs=1e-4)
    assert value == pytest.approx(math.log1p(count) + count * math.log1p(1 / count), abs=1e-6)


def test_gradient_equals_finite_differences_and_reaches_the_query_only() -> None:
    query = unit(3, 4).requires_grad_()
    own, sampled = unit(3, 4, seed=1).requires_grad_(), unit(5, 4, seed=2).requires_grad_()
    log = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q: noise_contrastive(q, own, sampled, log, 20, 0.5), query
    )
    noise_contrastive(query, own, sampled, log, 20, 0.5).backward()
    assert query.grad is not None
    assert own.grad is None and sampled.grad is None and log.grad is None


def test_many_negatives_approach_the_softmax() -> None:
    """With the true Z and m -> infinity the gradient is that of the softmax over all n rows."""
    rows = unit(40, 6)
    query = unit(4, 6, seed=1).requires_grad_()
    (wanted,) = torch.autograd.grad(info_nce(query, rows, torch.arange(4), 0.5), query)
    errors = []
    for rounds in (10, 1000):  # every row equally often: no sampling noise
        sampled, total = rows.repeat(rounds, 1), torch.zeros(())
        lse = (query.detach() @ rows.T / 0.5).logsumexp(1)
        for i in range(4):  # each query with its own Z
            part = noise_contrastive(query[i : i + 1], rows[i : i + 1], sampled, lse[i], 40, 0.5)
            total = total + part / 4
        (got,) = torch.autograd.grad(total, query)
        errors.append(float((got - wanted).norm() / wanted.norm()))
    assert errors[1] < 1e-4 < errors[0] < 0.01


def test_low_temperatures_stay_finite_also_in_half_precision_and_under_autocast() -> None:
    query, own, sampled = unit(4, 64), unit(4, 64), unit(300, 64, seed=2)
    half = query.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = noise_contrastive(
            half, own.float(), sampled.float(), torch.tensor(20.0), 10_000, 0.005
        )
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert half.grad is not None and half.grad.isfinite().all()
    exact = noise_contrastive(
        half.detach().double(), own, sampled, torch.tensor(20.0).double(), 10_000, 0.005
    )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


# ---- the memory


def test_first_rows_are_uniform_about_unit_length_and_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    rows = Memory(2000, 128, seed=3).rows
    torch.manual_seed(2)
    assert torch.equal(rows, Memory(2000, 128, seed=3).rows)
    assert not torch.equal(rows, Memory(2000, 128, seed=4).rows)
    bound = math.sqrt(3 / 128)
    assert rows.abs().max() <= bound and rows.min() < -0.999 * bound and rows.max() > 0.999 * bound
    assert (rows.norm(dim=1) ** 2).mean().item() == pytest.approx(1, abs=0.005)


def test_update_moves_the_rows_of_the_batch_and_no_other() -> None:
    memory = Memory(20, 6, seed=0)
    before, index, features = memory.rows.clone(), torch.tensor([7, 0, 19]), unit(3, 6).float()
    memory.update(index, features, 0.5)
    for place, feature in zip(index, features, strict=True):
        wanted = torch.tensor(reference_memory.moved(before[place], feature, 0.5)).float()
        torch.testing.assert_close(memory.rows[place], wanted)
    others = torch.ones(20, dtype=torch.bool)
    others[index] = False
    assert torch.equal(memory.rows[others], before[others])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_rows_have_unit_length_after_every_update(momentum: float) -> None:
    memory = Memory(12, 6, seed=0)
    for step in range(6):
        memory.update(torch.arange(12).roll(step)[:8], unit(8, 6, seed=step).float(), momentum)
    torch.testing.assert_close(memory.rows.norm(dim=1), torch.ones(12))
    memory.update(torch.arange(8), unit(8, 6, seed=9).float(), 0.0)
    torch.testing.assert_close(memory.rows[:8], unit(8, 6, seed=9).float())


def test_bank_is_own_rows_then_the_drawn_ones_seen_by_all() -> None:
    memory, index = Memory(30, 6, seed=0), torch.tensor([4, 2, 25, 11])
    bank, positive, candidates = memory.compare(index, 9, seed=5, step=3)
    assert bank.shape == (13, 6) and positive.tolist() == [0, 1, 2, 3]
    assert torch.equal(bank[:4], memory.rows[index])
    assert candidates is not None and torch.equal(candidates, torch.eye(4, dtype=torch.bool))
    for row in bank[4:]:
        assert (memory.rows == row).all(1).any()
    kept = bank.clone()
    memory.update(index, unit(4, 6).float(), 0.0)
    assert torch.equal(bank, kept), "the bank of a step does not move with the memory"


def test_the_draw_depends_on_seed_and_step_and_not_on_the_batch() -> None:
    memory = Memory(1000, 2, seed=0)

    def drawn(index: list[int], seed: int, step: int) -> Tensor:
        return memory.compare(torch.tensor(index), 50, seed, step)[0][len(index) :]

    assert torch.equal(drawn([1, 2], 0, 7), drawn([5, 4, 3], 0, 7))
    assert not torch.equal(drawn([1, 2], 0, 7), drawn([1, 2], 0, 8))
    assert not torch.equal(drawn([1, 2], 0, 7), drawn([1, 2], 1, 7))


def test_draws_are_uniform_over_all_rows() -> None:
    memory = Memory(50, 1, seed=0)
    memory.rows.copy_(torch.arange(50.0)[:, None])
    bank, _, _ = memory.compare(torch.tensor([0]), 100_000, seed=0, step=0)
    counts = bank[1:, 0].long().bincount(minlength=50)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 85, "49 degrees of freedom: beyond 85 once in 1,000"


def test_without_a_draw_the_bank_is_the_whole_memory() -> None:
    memory, index = Memory(30, 6, seed=0), torch.tensor([4, 2])
    bank, positive, candidates = memory.compare(index, 0, seed=0, step=0)
    assert bank is memory.rows and positive is index and candidates is None


def test_rows_are_part_of_a_checkpoint() -> None:
    memory, other = Memory(10, 4, seed=0), Memory(10, 4, seed=1)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(memory.rows, other.rows)


def _update_share(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    td.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    memory, index = Memory(20, 6, seed=0), torch.tensor([7, 0, 19, 3])
    mine = slice(2 * rank, 2 * rank + 2)
    memory.update(index[mine], unit(4, 6).float()[mine], 0.5)
    torch.save(memory.rows, Path(out) / f"{rank}.pt")
    td.destroy_process_group()


def test_two_processes_write_the_rows_of_both(tmp_path: Path) -> None:
    spawn(_update_share, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    alone = Memory(20, 6, seed=0)
    alone.update(torch.tensor([7, 0, 19, 3]), unit(4, 6).float(), 0.5)
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), alone.rows)

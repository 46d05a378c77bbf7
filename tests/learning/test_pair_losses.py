"""Losses of two views: SimCLR's over the global batch, and the regression of BYOL and SimSiam."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from clsa.learning.optim import build_optimizer, set_lr
from clsa.learning.pair_losses import cosine_regression, nt_xent
from clsa.methods import simsiam
from clsa.methods.byol import BYOL
from clsa.methods.method import Batch, Method, sum_of
from clsa.methods.simsiam import SimSiam, spread
from clsa.options.run import OptimOptions
from clsa.system import dist
from tests.support import reference
from tests.support.contract import EXTENT, tiny


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_nt_xent_equals_a_float64_loop(rows: int, temperature: float) -> None:
    first, second = unit(rows, 6), unit(rows, 6, seed=1)
    wanted = reference.nt_xent(first, second, temperature)
    assert nt_xent(first, second, temperature).item() == pytest.approx(wanted, abs=1e-10)
    single = nt_xent(first.float(), second.float(), temperature)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(wanted, abs=1e-5, rel=1e-5)


def test_nt_xent_of_hand_computed_cases() -> None:
    """methods 3.3: two orthogonal pairs of equal views; all rows equal."""
    pairs = torch.eye(2, dtype=torch.float64)
    assert nt_xent(pairs, pairs, 0.5).item() == pytest.approx(0.239545, abs=1e-6)
    equal = unit(1, 6).expand(4, 6)
    assert nt_xent(equal, equal, 0.1).item() == pytest.approx(1.945910, abs=1e-6)


def test_a_row_never_sees_itself() -> None:
    """With one picture the other view is the only candidate: no loss, whatever the angle."""
    loss = nt_xent(unit(1, 6).requires_grad_(), unit(1, 6, seed=1), 0.1)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    long = 30 * unit(1, 6).expand(3, 6)
    assert nt_xent(long, long, 1.0).item() == pytest.approx(math.log(5), abs=1e-9)


def test_both_views_of_nt_xent_get_the_gradient_of_the_whole() -> None:
    first, second = unit(3, 4).requires_grad_(), unit(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (first, second))


def test_nt_xent_stays_in_float32_under_autocast_and_finite_when_cold() -> None:
    first, second = unit(8, 64).bfloat16(), unit(8, 64, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(first, second, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.nt_xent(first, second, 0.1), abs=1e-5)
    rows = unit(8, 6).float().requires_grad_()
    nt_xent(rows, unit(8, 6, seed=1).float(), 0.001).backward()
    assert rows.grad is not None and rows.grad.isfinite().all()


def _one_rank(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    td.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    torch.save(_weighted(slice(rank * 6 // world, (rank + 1) * 6 // world)), f"{out}/{rank}.pt")
    td.destroy_process_group()


def _weighted(mine: slice) -> dict[str, Tensor]:
    """Loss and gradient of a shared weight, averaged over ranks as DistributedDataParallel does."""
    weight = unit(4, 4, seed=2).requires_grad_()
    first, second = (unit(6, 4, seed=seed)[mine] @ weight for seed in (0, 1))
    loss = nt_xent(first, second, 0.3)
    (gradient,) = torch.autograd.grad(loss, weight)
    mean = dist.all_sum(torch.cat([loss.detach()[None], gradient.flatten()])) / dist.world_size()
    return {"loss": mean[0], "gradient": mean[1:]}


def test_nt_xent_of_two_processes_equals_that_of_one(tmp_path: Path) -> None:
    spawn(_one_rank, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    alone = _weighted(slice(None))
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(shared, alone, atol=1e-12, rtol=0)


# ---- regression of one view's target by the other's prediction


def test_cosine_regression_equals_a_float64_loop_and_the_cosine() -> None:
    prediction, target = unit(5, 6), unit(5, 6, seed=1)
    loss = cosine_regression(prediction, target).item()
    assert loss == pytest.approx(reference.cosine_regression(prediction, target), abs=1e-12)
    negative = -F.cosine_similarity(prediction, target).mean().item()
    assert loss / 2 - 1 == pytest.approx(negative, abs=1e-12)


def test_parallel_rows_cost_nothing_and_opposite_ones_four() -> None:
    rows = unit(5, 6)
    assert cosine_regression(rows, rows).item() == pytest.approx(0, abs=1e-12)
    assert cosine_regression(rows, -rows).item() == pytest.approx(4, abs=1e-12)


def test_gradient_of_a_raw_prediction_is_tangent_and_none_reaches_the_target() -> None:
    """methods 3.4: dL/du = -2 (I - u^ u^T) t^ / |u|, over B rows; u . dL/du = 0."""
    raw = (3 * unit(5, 6)).requires_grad_()
    target = unit(5, 6, seed=1).requires_grad_()
    cosine_regression(F.normalize(raw, dim=1), target).backward()
    assert target.grad is None and raw.grad is not None
    for row, gradient, towards in zip(raw.detach(), raw.grad, target.detach(), strict=True):
        along = row / row.norm()
        projection = torch.eye(6, dtype=torch.float64) - torch.outer(along, along)
        wanted = -2 * projection @ towards / row.norm() / 5
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)
        assert abs(row @ gradient) < 1e-12


def test_regression_of_half_precision_is_summed_in_float32() -> None:
    prediction, target = unit(5, 64).bfloat16(), unit(5, 64, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cosine_regression(prediction, target)
    assert loss.dtype == torch.float32
    wanted = (2 - 2 * (prediction.double() * target.double()).sum(1)).mean().item()
    assert loss.item() == pytest.approx(wanted, abs=1e-6)


# ---- what keeps a method without negatives from the constant solution


def spread_after(method: Method, steps: int = 30) -> float:
    """Spread of the projections after training on 64 noisy pictures, as a share of 1/sqrt(D)."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(64, 3, 16, 16, generator=generator)
    optimizer = build_optimizer(method, OptimOptions())
    set_lr(optimizer, 0.2)
    for step in range(steps):
        rows = torch.randperm(64, generator=generator)[:32]
        noise = torch.randn(2, 32, 3, 16, 16, generator=generator)
        views = list(pictures[rows] + 0.3 * noise)
        output = method(Batch(views, rows, torch.full((32,), -1), step))
        sum_of(output.losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(output.state, step)
    with torch.no_grad():
        return spread(method.network(pictures)).item() * method.network.dim**0.5


MOMENTUM = {"key_momentum": 0.5, "final_key_momentum": None}


def small(kind: type[Method]) -> Method:
    """Without batch norm after the last layer, which would slow the collapse down."""
    model = {"projector_layers": 2, "projector_norm": "hidden", "zero_init_last": False}
    name, method = ("byol", MOMENTUM) if kind is BYOL else ("simsiam", {})
    options = tiny(name, batch_size=32, model={**model, "norm_groups": 1}, method=method)
    return kind(options, EXTENT)


@pytest.mark.parametrize("kind", [BYOL, SimSiam])
def test_without_the_predictor_the_projections_collapse(kind: type[Method]) -> None:
    whole, bare = small(kind), small(kind)
    bare.predictor = nn.Identity()
    healthy, collapsed = spread_after(whole), spread_after(bare)
    assert healthy > 0.8 and collapsed < 0.4, (healthy, collapsed)


def test_without_the_stopped_gradient_the_projections_collapse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def everywhere(prediction: Tensor, target: Tensor) -> Tensor:
        return (2 - 2 * (prediction * target).sum(1)).mean()

    monkeypatch.setattr(simsiam, "cosine_regression", everywhere)
    monkeypatch.setattr(dist, "all_gather", lambda rows: rows)
    assert spread_after(small(SimSiam)) < 0.4

"""SimSiam's loss, its monitor of collapse, and the rate of its predictor. Collapse itself is in
test_pair_losses.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsa.learning.optim import build_optimizer, set_lr
from clsa.methods.simsiam import SimSiam, spread
from clsa.options.run import OptimOptions
from tests.support.contract import EXTENT, batch_of, tiny


def build(**method: object) -> SimSiam:
    return SimSiam(tiny("simsiam", method=method), EXTENT)


def test_loss_is_half_the_negative_cosines_of_both_directions() -> None:
    method = build().eval()
    batch = batch_of(method)
    projections = [method.network.project(view).detach().double() for view in batch.views]
    predicted = [method.predictor(rows.float()).double() for rows in projections]
    cosines = [
        F.cosine_similarity(predicted[0], projections[1]).mean(),
        F.cosine_similarity(predicted[1], projections[0]).mean(),
    ]
    wanted = -(cosines[0] + cosines[1]).item() / 2
    assert method(batch).losses["regression"].item() == pytest.approx(wanted, abs=1e-6)


def test_aligned_outputs_give_minus_one() -> None:
    method = build().eval()
    method.predictor = nn.Identity()
    batch = batch_of(method)
    same = batch._replace(views=[batch.views[0], batch.views[0]])
    assert method(same).losses["regression"].item() == pytest.approx(-1, abs=1e-6)


def test_nothing_flows_through_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient equals that of the same loss with constant targets."""
    method = build().eval()
    batch = batch_of(method)
    method(batch).losses["regression"].backward()
    got = [p.grad for p in method.parameters() if p.grad is not None]
    method.zero_grad()
    with torch.no_grad():
        first, second = (method.network(view) for view in batch.views)
    loss = torch.zeros(())
    for view, target in zip(batch.views, (second, first), strict=True):
        loss = loss - (method.query(view, batch) * target).sum(1).mean() / 2
    loss.backward()
    wanted = [p.grad for p in method.parameters() if p.grad is not None]
    for mine, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-4)
    monkeypatch.setattr(method, "query", lambda view: method.network(view).detach())
    monkeypatch.setattr(method, "_predict", lambda rows: F.normalize(rows.detach(), dim=1))
    assert not method(batch).losses["regression"].requires_grad


def test_spread_distinguishes_health_from_collapse() -> None:
    """methods 3.5: 1/sqrt(2048) = .0221 for Gaussian rows, 0 for equal ones."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(512, 2048, generator=generator), dim=1)
    assert spread(rows).item() == pytest.approx(0.0221, abs=1e-4)
    assert spread(rows[:1].expand(512, 2048)).item() == pytest.approx(0, abs=1e-6)
    method = build()
    output = method(batch_of(method))
    torch.testing.assert_close(output.metrics["channel_std"], spread(output.state[0]))


@pytest.mark.parametrize("fixed", [True, False])
def test_the_predictors_rate_stays_at_its_peak_unless_asked_not_to(fixed: bool) -> None:
    method = build(fixed_predictor_rate=fixed)
    optimizer = build_optimizer(method, OptimOptions(), method.fixed_rate)
    set_lr(optimizer, 0.01, peak=0.5)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[p] for p in method.predictor.parameters()} == {0.5 if fixed else 0.01}
    assert {rates[p] for p in method.network.parameters()} == {0.01}


def test_projections_are_queued_and_predictions_are_queries() -> None:
    method = build().eval()
    batch = batch_of(method)
    output = method(batch)
    first, second = (method.network(view).detach() for view in batch.views)
    for keys, wanted in zip(output.state, (second, first), strict=True):
        assert torch.equal(keys, wanted)
    for view, comparison in zip(batch.views, output.comparisons, strict=True):
        (query,) = comparison.queries
        assert isinstance(query, Tensor) and torch.equal(query, method.query(view, batch))
        assert torch.equal(comparison.bank[8:], method.queue.rows)
    method.after_step(output.state, 0)
    assert int(method.queue.pointer) == 16 % 12

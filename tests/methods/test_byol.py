"""BYOL's loss, its momentum copy, and the bank that only the divergence uses."""

import copy

import pytest
import torch
from torch import Tensor, nn

from clsa.learning.optim import momentum_at
from clsa.methods.byol import BYOL
from clsa.options.methods import BYOLOptions
from tests.support import reference
from tests.support.contract import EXTENT, batch_of, tiny, train


def build(**method: object) -> BYOL:
    return BYOL(tiny("byol", method=method), EXTENT)


def test_momentum_rises_along_a_cosine() -> None:
    """methods 3.4: m_0 = .996, .998 in the middle, m_K = 1."""
    options = BYOLOptions()
    assert momentum_at(options, 0, 1000) == pytest.approx(0.996, abs=1e-12)
    assert momentum_at(options, 500, 1000) == pytest.approx(0.998, abs=1e-12)
    assert momentum_at(options, 1000, 1000) == pytest.approx(1.0, abs=1e-12)


def test_loss_sums_the_squared_distances_of_both_directions() -> None:
    method = build().eval()
    batch = batch_of(method)
    predicted = [method.predictor(method.network.project(view)).detach() for view in batch.views]
    with torch.no_grad():
        targets = [method.key_network.project(view) for view in batch.views]
    wanted = reference.cosine_regression(predicted[0], targets[1])
    wanted += reference.cosine_regression(predicted[1], targets[0])
    assert method(batch).losses["regression"].item() == pytest.approx(wanted, abs=1e-5)


def test_perfect_predictions_cost_nothing() -> None:
    method = build().eval()
    method.predictor = nn.Identity()
    batch = batch_of(method)
    same = batch._replace(views=[batch.views[0], batch.views[0]])
    assert method(same).losses["regression"].item() == pytest.approx(0, abs=1e-6)


def test_the_predictor_makes_queries_and_never_keys() -> None:
    method = build().eval()
    batch = batch_of(method)
    output = method(batch)
    for view, comparison in zip(batch.views, output.comparisons, strict=True):
        (query,) = comparison.queries
        assert isinstance(query, Tensor) and torch.equal(query, method.query(view, batch))
    with torch.no_grad():
        wanted = [method.key_network(view) for view in reversed(batch.views)]
    for keys, expected in zip(output.state, wanted, strict=True):
        assert torch.equal(keys, expected)


def test_the_key_network_sees_batch_statistics_and_gets_no_gradient() -> None:
    method = build()
    assert all(module.training for module in method.key_network.modules())
    output = method(batch_of(method))
    output.losses["regression"].backward()
    for parameter in method.key_network.parameters():
        assert parameter.grad is None and not parameter.requires_grad
    assert not any(keys.requires_grad for keys in output.state)


def test_the_key_network_moves_by_the_momentum_of_its_step() -> None:
    method = build(key_momentum=0.5, final_key_momentum=1.0)
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(1.0)
    old = copy.deepcopy(method.key_network)
    method.after_step([], 6)  # of 12 steps: half way from .5 to 1
    for before, after, towards in zip(
        old.parameters(), method.key_network.parameters(), method.network.parameters(), strict=True
    ):
        torch.testing.assert_close(after, 0.75 * before + 0.25 * towards)


def test_the_bank_is_the_other_views_keys_and_past_ones_only() -> None:
    method = build()
    output = method(batch_of(method))
    for comparison, keys in zip(output.comparisons, output.state, strict=True):
        assert torch.equal(comparison.bank, torch.cat([keys, method.queue.rows]))
        assert comparison.candidates is None and comparison.positive is not None
        assert torch.equal(comparison.bank[comparison.positive], keys)
        assert not any(torch.equal(key, row) for key in keys for row in method.queue.rows)
    train(method, 1)
    assert int(method.queue.pointer) == 16 % 12  # both views' keys

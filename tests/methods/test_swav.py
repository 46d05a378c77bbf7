"""SwAV: what is assigned together, when the queue helps, and what moves the prototypes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa.learning.optim import build_optimizer, set_lr
from clsa.methods.swav import SwAV
from clsa.options.run import OptimOptions
from tests.support import reference_assignments as reference
from tests.support.contract import EXTENT, batch_of, tiny, train


def build(views: dict[str, Any] | None = None, **method: Any) -> SwAV:
    """Ten prototypes, a queue of 12 from the first epoch on, batches of 8; two small crops."""
    return SwAV(tiny("swav", method=method, views=views or {}), EXTENT)


def projections(method: SwAV, views: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [method.network(view) for view in views]


def expected(method: SwAV, views: list[Tensor], past: list[Tensor] | None = None) -> float:
    """The loss by slow loops; `past`: queued projections of each of the two full-size views."""
    rows = method.prototypes.rows.detach()
    queries = projections(method, views)
    targets = []
    for view in (0, 1):
        pictures = torch.cat([queries[view], past[view]]) if past else queries[view]
        codes = reference.sinkhorn(pictures @ rows.T, 0.05, 3)
        targets.append(codes[: len(queries[view])])
    return reference.swapped_prediction(targets, [query @ rows.T for query in queries], 0.1)


def loss_of(method: SwAV, step: int) -> float:
    return method(batch_of(method, step)).losses["swapped_prediction"].item()


def test_full_size_views_are_assigned_and_all_are_predicted() -> None:
    method = build().eval()
    assert [spec.name for spec in method.view_specs] == ["weak0", "weak1", "local0", "local1"]
    assert loss_of(method, 0) == pytest.approx(expected(method, batch_of(method).views), abs=2e-5)
    without = build({"local": {"sizes": ()}}).eval()
    assert len(without.view_specs) == 2
    views = batch_of(without).views
    assert loss_of(without, 0) == pytest.approx(expected(without, views), abs=2e-5)


def test_the_queue_is_used_from_the_step_at_which_it_is_full() -> None:
    """Collected from epoch 1 (step 3) in batches of 8: by step 5, 16 rows have filled the 12."""
    method = build(queue_epoch=1).eval()
    assert method.queue is not None
    seen: list[list[Tensor]] = []
    for step in range(8):
        views = batch_of(method, step).views
        queued = seen[3:step]  # oldest first
        past = (
            [torch.cat([pair[view] for pair in queued])[-12:] for view in (0, 1)] if queued else []
        )
        full = len(queued) * 8 >= 12
        assert full == (step >= 5)
        wanted = expected(method, views, past if full else None)
        assert loss_of(method, step) == pytest.approx(wanted, abs=2e-5), step
        if full:
            assert abs(wanted - expected(method, views)) > 1e-3
        seen.append(projections(method, views)[:2])
        method.after_step(method(batch_of(method, step)).state, step)


def test_the_queue_is_scored_with_the_current_prototypes() -> None:
    method = build().eval()
    for step in range(2):
        method.after_step(method(batch_of(method, step)).state, step)
    past = [projections(method, batch_of(method, step).views) for step in range(2)]
    with torch.no_grad():
        method.prototypes.rows.copy_(method.prototypes.rows.flip(1))
    queued = [torch.cat([past[0][view], past[1][view]])[-12:] for view in (0, 1)]
    wanted = expected(method, batch_of(method, 2).views, queued)
    assert loss_of(method, 2) == pytest.approx(wanted, abs=2e-5)


def test_positives_are_queued_only_after_their_step_and_each_view_apart() -> None:
    method = build()
    assert method.queue is not None
    before = method.queue.rows.clone()
    keys = method(batch_of(method)).state
    assert torch.equal(method.queue.rows, before) and not keys.requires_grad
    method.after_step(keys, 0)
    assert torch.equal(method.queue.rows[:8], keys) and method.queue.rows.shape == (12, 32)
    both = projections(method.eval(), batch_of(method).views[:2])
    state = method(batch_of(method)).state
    torch.testing.assert_close(state, torch.cat(both, dim=1))


def test_nothing_is_collected_before_its_epoch_and_none_without_a_queue() -> None:
    method = build(queue_epoch=2)
    assert method.queue is not None
    before = method.queue.rows.clone()
    train(method, 6)
    assert torch.equal(method.queue.rows, before)
    train(method, 1, 6)
    assert not torch.equal(method.queue.rows, before)
    bare = build(queue_size=0)
    assert bare.queue is None
    train(bare, 3)


def test_prototypes_are_of_unit_length_after_every_step_and_move() -> None:
    method = build()
    first = method.prototypes.rows.detach().clone()
    for step in range(4):
        train(method, 1, step)
        torch.testing.assert_close(method.prototypes.rows.norm(dim=1), torch.ones(10))
    assert not torch.allclose(method.prototypes.rows, first, atol=1e-3)


@pytest.mark.parametrize("optim", [{"momentum": 0.9, "weight_decay": 0.1}, {"name": "adamw"},
                                   {"name": "lars"}])  # fmt: skip
def test_prototypes_are_frozen_for_the_first_steps(optim: dict[str, Any]) -> None:
    method = build(freeze_steps=3)
    optimizer = build_optimizer(method, OptimOptions.parse(optim, "test"))
    set_lr(optimizer, 0.05)
    first = method.prototypes.rows.detach().clone()
    for step in range(4):
        train(method, 1, step, optimizer)
        moved = (method.prototypes.rows - first).abs().max().item()
        assert (moved > 1e-5) if step == 3 else (moved < 1e-6), step


def test_prototypes_and_every_view_get_gradient_but_not_through_the_assignment() -> None:
    method = build().eval()
    batch = batch_of(method)
    views = [view.requires_grad_() for view in batch.views]
    method(batch).losses["swapped_prediction"].backward()
    assert all(view.grad is not None and view.grad.any() for view in views)
    assert method.prototypes.rows.grad is not None and method.prototypes.rows.grad.any()
    with torch.no_grad():
        rows, queries = method.prototypes.rows, projections(method, views)
        targets = [torch.tensor(reference.sinkhorn(q @ rows.T, 0.05, 3)) for q in queries[:2]]
    fixed = rows.detach().double().requires_grad_()
    terms = []
    for view, query in enumerate(queries):
        predicted = torch.log_softmax(query.double() @ fixed.T / 0.1, 1)
        terms += [-(t * predicted).sum(1).mean() for a, t in enumerate(targets) if a != view]
    (wanted,) = torch.autograd.grad(torch.stack(terms).mean(), fixed)
    torch.testing.assert_close(method.prototypes.rows.grad.double(), wanted, atol=1e-5, rtol=1e-4)


def test_comparisons_are_the_full_size_views_over_the_prototypes() -> None:
    method = build().eval()
    batch = batch_of(method)
    found = method(batch).comparisons
    assert len(found) == 2
    for comparison, query in zip(found, projections(method, batch.views), strict=False):
        torch.testing.assert_close(comparison.queries[0], query)
        assert torch.equal(comparison.bank, method.prototypes.rows)
        assert comparison.positive is None and comparison.candidates is None


def test_chance_is_the_log_of_the_prototypes() -> None:
    assert build().landmarks.chance == pytest.approx(math.log(10))

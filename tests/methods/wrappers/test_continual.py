"""Continual pretraining: distillation, the extra queue, exemplars, the teacher's state."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clsa.learning.assignments import soft_bank_cross_entropy
from clsa.learning.bank import KeyQueue
from clsa.learning.losses import distribution_divergence, info_nce
from clsa.learning.optim import build_optimizer
from clsa.methods import build_method
from clsa.methods.method import Batch, Method, sum_of
from clsa.methods.wrappers.continual import Continual
from clsa.methods.wrappers.stronger import Stronger
from clsa.options.run import OptimOptions
from clsa.system.errors import ClsaError
from clsa.training.exemplars import chosen_of, spread
from tests.support import reference
from tests.support.contract import EXTENT, ROWS, embed, tiny

LATER, FIRST = EXTENT, EXTENT._replace(num_exemplars=0)  # pictures 20 to 29 are exemplars
STAGES: dict[str, Any] = {"stages": ("classes:2",), "continual": {"extra_keys": 6}}
TEACHING = ["moco-v2", "simclr", "byol", "simsiam", "adco", "pcl", "moco-v3"]


def build(recipe: str = "moco-v2", extent: Any = LATER, **over: Any) -> Method:
    method = build_method(tiny(recipe, **{**STAGES, **over}), extent)
    method.before_epoch(0, embed)
    return method


def continual(method: Method) -> Continual:
    (found,) = [module for module in method.modules() if isinstance(module, Continual)]
    return found


def batch_of(method: Method, old: list[int], step: int = 0) -> Batch:
    """Random pixels; the rows in `old` are exemplars."""
    generator = torch.Generator().manual_seed(step)
    views = [
        torch.randn(ROWS, 3, spec.size, spec.size, generator=generator)
        for spec in method.view_specs
    ]
    index = torch.arange(ROWS)
    index[old] += 20
    return Batch(views, index, torch.full((ROWS,), -1), step)


def unit(count: int, seed: int, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dim, generator=generator), dim=1)


# ---- loss


def test_the_cross_entropy_is_the_slow_loop() -> None:
    teacher, teacher_bank, student, bank = (unit(n, n) for n in (4, 7, 4, 7))
    seen = torch.tensor([True, False, True, True, False, True, True])
    cross, entropy = soft_bank_cross_entropy(teacher, teacher_bank, 0.04, student, bank, 0.07, seen)
    mask = seen.expand(4, -1)
    targets = reference.probabilities(teacher, teacher_bank, 0.04, mask)
    predicted = reference.probabilities(student, bank, 0.07, mask)
    for i, (t, s) in enumerate(zip(targets, predicted, strict=True)):
        wanted = -sum(t[j] * math.log(s[j]) for j in t)
        assert cross[i].item() == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        floor = -sum(p * math.log(p) for p in t.values() if p > 0)
        assert entropy[i].item() == pytest.approx(floor, rel=1e-4, abs=1e-6)


def test_with_one_bank_it_is_the_divergence_of_clsa() -> None:
    weak, strong, bank = unit(4, 1), unit(4, 2), unit(9, 3)
    everyone = torch.ones(9, dtype=torch.bool)
    cross, _ = soft_bank_cross_entropy(weak, bank, 0.1, strong, bank, 0.2, everyone)
    wanted = distribution_divergence(weak, strong, bank, 0.2, 0.1)
    torch.testing.assert_close(cross.mean(), wanted)


def test_a_single_candidate_or_an_equal_student_gives_no_divergence() -> None:
    query, bank = unit(3, 1), unit(6, 2)
    one = torch.arange(6) == 4
    cross, entropy = soft_bank_cross_entropy(query, bank, 0.04, unit(3, 5), unit(6, 6), 0.07, one)
    assert cross.abs().max() < 1e-6 and entropy.abs().max() < 1e-6
    everyone = torch.ones(6, dtype=torch.bool)
    cross, entropy = soft_bank_cross_entropy(query, bank, 0.07, query, bank, 0.07, everyone)
    torch.testing.assert_close(cross, entropy)


def test_the_students_bank_learns_and_the_teacher_does_not() -> None:
    rows = [unit(4, i).requires_grad_() for i in range(4)]
    everyone = torch.ones(4, dtype=torch.bool)
    cross, _ = soft_bank_cross_entropy(rows[0], rows[1], 0.04, rows[2], rows[3], 0.07, everyone)
    cross.sum().backward()
    assert rows[0].grad is None and rows[1].grad is None
    for row in rows[2:]:
        assert row.grad is not None and row.grad.abs().sum() > 0


# ---- extra queue


def test_only_chosen_keys_are_queued_in_order_and_around_the_end() -> None:
    queue, plain = KeyQueue(5, 3, 0), KeyQueue(5, 3, 0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(7):
        keys = torch.randn(4, 3, generator=generator)
        chosen = torch.rand(4, generator=generator) < 0.6
        queue.enqueue_chosen(keys, chosen)
        plain.enqueue(keys[chosen])
        assert torch.equal(queue.rows, plain.rows) and queue.pointer == plain.pointer
    keys = torch.randn(12, 3, generator=generator)  # more than there is room for
    queue.enqueue_chosen(keys, torch.arange(12) != 3)
    plain.enqueue(keys[torch.arange(12) != 3])
    assert torch.equal(queue.rows, plain.rows) and queue.pointer == plain.pointer


def test_the_queue_starts_with_given_keys_and_receives_those_of_exemplars() -> None:
    method = build()
    inner = continual(method)
    inner.begin(torch.arange(4.0)[:, None].repeat(1, 16))
    assert inner.extra.rows[:, 0].tolist() == [0, 1, 2, 3, 0, 1]
    batch = batch_of(method, [1, 6])
    output = method(batch)
    keys = output.state[1]
    method.after_step(output.state, 0)
    assert torch.equal(inner.extra.rows[:2], keys[[1, 6]])
    assert inner.extra.rows[2:, 0].tolist() == [2, 3, 0, 1] and inner.extra.pointer == 2


def test_every_query_is_contrasted_with_its_key_and_the_extra_queue() -> None:
    method = build(continual={"extra_keys": 6, "extra_weight": 1.0})
    batch = batch_of(method, [1])
    output = method(batch)
    (comparison,) = output.comparisons
    (query,), extra = comparison.rows(), continual(method).extra.rows
    assert comparison.positive is not None
    keys = comparison.bank[comparison.positive]
    terms = [
        info_nce(query[i : i + 1], torch.cat([keys[i : i + 1], extra]), torch.tensor([0]), 0.2)
        for i in range(ROWS)
    ]
    torch.testing.assert_close(output.losses["extra"], torch.stack(terms).mean())


# ---- around a method


@pytest.mark.parametrize("stronger", [False, True])
@pytest.mark.parametrize("recipe", TEACHING)
def test_any_method_with_positives_gets_both_terms(recipe: str, stronger: bool) -> None:
    method = build(recipe, stronger=stronger)
    optimizer = build_optimizer(method, OptimOptions())
    for step, old in enumerate(([0, 3], [], [5])):
        output = method(batch_of(method, old, step))
        assert {"extra", "distill"} <= set(output.losses)
        assert all(loss.isfinite() for loss in output.losses.values())
        assert len(old) > 1 or output.losses["distill"].abs() < 1e-6  # none, or a single one
        sum_of(output.losses.values()).backward()
        for parameter in continual(method).teacher.parameters():
            assert parameter.grad is None and not parameter.requires_grad
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(output.state, step)


def test_the_first_stage_is_the_method_alone() -> None:
    method, alone = build(extent=FIRST), build_method(tiny("moco-v2"), FIRST)
    batch = batch_of(alone, [])
    output, plain = method(batch), alone(batch)
    assert set(output.losses) == {"contrast"}
    assert torch.equal(output.losses["contrast"], plain.losses["contrast"])
    assert [spec.name for spec in method.view_specs] == ["key", "weak0"]
    method.after_step(output.state, 0)


def test_the_distillation_is_the_loop_over_exemplars() -> None:
    method = build(continual={"extra_keys": 6, "distill_weight": 1.0}).eval()
    inner = continual(method)
    torch.nn.init.normal_(next(inner.teacher.projector.parameters()), 0, 0.5)
    old = [1, 2, 6]
    batch = batch_of(method, old)
    found = method(batch).losses["distill"].item()
    with torch.no_grad():
        query, anchor = (inner.network(batch.views[i]) for i in (1, 2))
        target, target_anchor = (inner.teacher(batch.views[i]) for i in (1, 2))
    teacher = reference.probabilities(target[old], target_anchor[old], 0.04)
    student = reference.probabilities(query[old], anchor[old], 0.07)
    terms = [
        sum(t[j] * (math.log(t[j]) - math.log(s[j])) for j in t)
        for t, s in zip(teacher, student, strict=True)
    ]
    assert found == pytest.approx(sum(terms) / 3, rel=1e-3)


def test_the_teacher_starts_as_the_network_with_its_statistics() -> None:
    """The published code copies weights only, and leaves the statistics as they were."""
    method = build()
    inner = continual(method)
    for step in range(3):
        method(batch_of(method, [0], step))
    state = inner.network.state_dict()
    name = next(name for name in state if name.endswith("running_mean"))
    assert not torch.equal(inner.teacher.state_dict()[name], state[name])
    inner.begin(inner.extra.rows)
    for name, value in inner.teacher.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_teacher_stays_in_evaluation_mode() -> None:
    """The published code puts it into training mode with the rest of the model."""
    method = build(stronger=True)
    for mode in (True, False, True):
        method.train(mode)
        assert continual(method).network.training == mode
        assert not any(module.training for module in continual(method).teacher.modules())
    before = {name: value.clone() for name, value in continual(method).teacher.state_dict().items()}
    method(batch_of(method, [0, 1]))
    for name, value in continual(method).teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_teacher_moves_after_each_epoch_of_a_later_stage() -> None:
    for extent, moves in ((LATER, True), (FIRST, False)):
        inner = continual(build(extent=extent))
        with torch.no_grad():
            for value in inner.network.state_dict().values():
                value.add_(1)
        before = {name: value.clone() for name, value in inner.teacher.state_dict().items()}
        inner.before_epoch(0, embed)
        for name, value in inner.teacher.state_dict().items():
            assert torch.equal(value, before[name])
        inner.before_epoch(1, embed)
        for name, value in inner.teacher.state_dict().items():
            if value.is_floating_point():
                gone = (value - before[name]).mean().item()
                assert gone == pytest.approx(0.004 if moves else 0.0, rel=1e-3), name


def test_the_extra_keys_join_the_bank_of_the_divergence() -> None:
    method = build("simclr", stronger=True)
    assert isinstance(method, Stronger)
    batch = batch_of(method, [0, 1])
    weak = batch._replace(views=batch.views[:3])
    for comparison in method.base(weak).comparisons:
        assert torch.equal(comparison.bank[-6:], continual(method).extra.rows)
        assert comparison.candidates is not None
        assert comparison.candidates.shape[1] == len(comparison.bank) - 6  # seen by all
    assert [spec.name for spec in method.view_specs] == ["weak0", "weak1", "anchor", "strong0"]


@pytest.mark.parametrize("recipe", ["swav", "dino", "supervised"])
def test_methods_without_positives_are_refused(recipe: str) -> None:
    with pytest.raises(ClsaError, match="no positives to contrast with the extra queue"):
        build(recipe)
    build(recipe, continual={"keep": "replay"})


# ---- exemplars


def test_pictures_whose_views_agree_are_kept_first() -> None:
    generator = torch.Generator().manual_seed(0)
    base = unit(12, 0)
    noise = torch.linspace(0, 1, 12)[torch.randperm(12, generator=generator)]
    views = base + noise[None, :, None] * torch.randn(7, 12, 5, generator=generator)
    views = normalize(views, dim=2)
    found = spread(views)
    for i in range(12):
        centre = normalize(views[:, i].mean(0), dim=0)
        slow = sum(float((views[v, i] - centre).square().sum()) for v in range(7))
        assert found[i].item() == pytest.approx(slow, rel=1e-4, abs=1e-5)
    still = int(noise.argmin())
    assert found[still] < 1e-8 and int(found.argmin()) == still
    groups = np.arange(12) % 3
    chosen = chosen_of(found.numpy(), groups, 2)
    assert len(chosen) == 6 and still in chosen and (np.diff(chosen) > 0).all()
    for group in range(3):
        mine = np.flatnonzero(groups == group)
        kept = set(chosen.tolist()) & set(mine.tolist())
        assert kept == set(mine[np.argsort(found.numpy()[mine])[:2]].tolist())

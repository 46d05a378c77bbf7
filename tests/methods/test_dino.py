"""DINO: which views teacher and student see, the centre, the schedules, and the last layer."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsa.learning.assignments import entropy, sharpened
from clsa.learning.models import mlp, momentum_copy
from clsa.learning.optim import build_optimizer, set_lr
from clsa.methods.dino import DINO
from clsa.options.run import OptimOptions
from tests.support import reference_assignments as reference
from tests.support.contract import EXTENT, batch_of, tiny, train


def build(model: dict[str, Any] | None = None, **method: Any) -> DINO:
    """Ten prototypes, batches of 8, two full-size views and two small ones."""
    return DINO(tiny("dino", method=method, model=model or {}), EXTENT)


@torch.no_grad()
def logits(network: nn.Module, rows: Tensor, views: list[Tensor]) -> list[Tensor]:
    return [network(view) @ F.normalize(rows).T for view in views]


def loss_of(method: DINO, step: int = 0) -> float:
    return method(batch_of(method, step)).losses["distillation"].item()


@pytest.mark.parametrize("step", [0, 4, 11])
def test_loss_equals_the_slow_loops_with_centre_and_temperature(step: int) -> None:
    method = build(teacher_warmup_epochs=2.0).eval()
    with torch.no_grad():
        method.center.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
        for module in (method.teacher, method.teacher_prototypes):
            for weight in module.parameters():
                weight.mul_(1 + 0.1 * torch.linspace(-1, 1, weight.numel()).view_as(weight))
    views = batch_of(method, step).views
    taught = logits(method.teacher, method.teacher_prototypes.rows, views[:2])
    temperature = 0.04 + 0.03 * min(1, step / 6)
    targets = [reference.sharpened(each, method.center, temperature) for each in taught]
    student = logits(method.network, method.prototypes.rows, views)
    wanted = reference.swapped_prediction(targets, student, 0.1)
    assert loss_of(method, step) == pytest.approx(wanted, abs=2e-5)


def test_a_teacher_and_a_student_without_a_preference_lose_the_log_of_the_prototypes() -> None:
    """All rows of the last layer are equal, so every softmax is uniform."""
    method = build()
    with torch.no_grad():
        for prototypes in (method.prototypes, method.teacher_prototypes):
            prototypes.rows.copy_(prototypes.rows[:1].expand(10, -1))
    output = method(batch_of(method))
    assert output.losses["distillation"].item() == pytest.approx(math.log(10), abs=1e-5)
    assert output.metrics["teacher_entropy"].item() == pytest.approx(math.log(10), abs=1e-5)
    assert method.landmarks.chance == pytest.approx(math.log(10))


def test_centre_moves_a_tenth_of_the_way_to_the_mean_of_both_full_size_views() -> None:
    method = build().eval()
    batch = batch_of(method)
    taught = logits(method.teacher, method.teacher_prototypes.rows, batch.views[:2])
    mean = torch.cat(taught).mean(0)
    output = method(batch)
    assert not method.center.any()
    method.after_step(output.state, 0)
    torch.testing.assert_close(method.center, 0.1 * mean)
    method.after_step(output.state, 1)
    torch.testing.assert_close(method.center, 0.19 * mean)


def test_teacher_sees_the_full_size_views_only_and_gets_no_gradient() -> None:
    method, seen = build(), []
    method.teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = batch_of(method)
    method(batch).losses["distillation"].backward()
    assert len(seen) == 2
    assert all(a is b for a, b in zip(seen, batch.views, strict=False))
    for module in (method.teacher, method.teacher_prototypes):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    student = [*method.network.parameters(), method.prototypes.rows]
    assert all(p.grad is not None and p.grad.any() for p in student)


def test_teacher_follows_by_a_cosine_from_the_first_momentum_to_one() -> None:
    method = build()
    old = [p.clone() for m in (method.teacher, method.teacher_prototypes) for p in m.parameters()]
    train(method, 1)
    new = [*method.network.parameters(), *method.prototypes.parameters()]
    keys = [p for m in (method.teacher, method.teacher_prototypes) for p in m.parameters()]
    for key, before, now in zip(keys, old, new, strict=True):
        torch.testing.assert_close(key, 0.9 * before + 0.1 * now)
    last = [key.clone() for key in keys]
    method.after_step(torch.zeros(10), EXTENT.num_steps)
    assert all(torch.equal(key, before) for key, before in zip(keys, last, strict=True))


def test_teacher_temperature_rises_along_a_line_and_stays() -> None:
    method = build(teacher_warmup_epochs=2.0)
    got = [method.teacher_temperature(step) for step in (0, 3, 6, 100)]
    assert got == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert build(teacher_warmup_epochs=0.0).teacher_temperature(1) == pytest.approx(0.07)


@pytest.mark.parametrize("optim", [{"momentum": 0.9, "weight_decay": 0.1},
                                   {"name": "adamw", "weight_decay": 0.1}])  # fmt: skip
def test_last_layer_keeps_its_direction_for_the_first_epochs(optim: dict[str, Any]) -> None:
    method = build(freeze_epochs=1.0)
    optimizer = build_optimizer(method, OptimOptions.parse(optim, "test"))
    set_lr(optimizer, 0.05)
    first = F.normalize(method.prototypes.rows.detach())
    encoder = next(method.network.parameters()).detach().clone()
    for step in range(EXTENT.steps_per_epoch + 1):
        train(method, 1, step, optimizer)
        moved = (F.normalize(method.prototypes.rows) - first).abs().max().item()
        frozen = step < EXTENT.steps_per_epoch
        assert (moved < 1e-6) if frozen else (moved > 1e-4), step
    assert not torch.equal(next(method.network.parameters()), encoder)


def test_length_of_the_last_layers_rows_does_not_matter() -> None:
    """Its magnitude is fixed to 1, so gradients are tangent: w . dL/dw = 0."""
    method = build().eval()
    before = loss_of(method)
    with torch.no_grad():
        method.prototypes.rows.mul_(torch.linspace(0.1, 5, 10)[:, None])
        method.teacher_prototypes.rows.mul_(3)
    assert loss_of(method) == pytest.approx(before, abs=1e-5)
    method(batch_of(method)).losses["distillation"].backward()
    rows = method.prototypes.rows
    assert rows.grad is not None
    torch.testing.assert_close((rows * rows.grad).sum(1), torch.zeros(10), atol=1e-5, rtol=0)


def test_head_is_three_layers_with_gelu_and_a_normalised_bottleneck() -> None:
    method = build()
    kinds = [type(module) for module in method.network.projector]
    assert kinds == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    rows = method.network(batch_of(method).views[0])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(8))
    assert rows.shape[1] == method.prototypes.rows.shape[1] == 16


def test_comparisons_are_the_student_over_the_unit_rows_of_its_last_layer() -> None:
    method = build().eval()
    with torch.no_grad():
        method.prototypes.rows.mul_(4)
    batch = batch_of(method)
    found = method(batch).comparisons
    assert len(found) == 2
    for comparison, view in zip(found, batch.views, strict=False):
        torch.testing.assert_close(comparison.queries[0], method.network(view))
        torch.testing.assert_close(comparison.bank, F.normalize(method.prototypes.rows.detach()))
        assert not comparison.bank.requires_grad and comparison.positive is None


class Linear(nn.Module):
    """The smallest possible network: unit rows of a linear layer on pixels."""

    def __init__(self):
        super().__init__()
        self.layer = mlp((3 * 16 * 16, 16))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.layer(images.flatten(1)), dim=1)


def entropies_after(steps: int = 150, **method: Any) -> tuple[float, float]:
    """Train, then return the entropy of the teacher's assignments (64 pictures), and of their mean.

    The most is ln 10 = 2.30. The pictures have much in common (a brightness), so that one prototype
    could take them all.
    """
    trained = build(**{"key_momentum": 0.9, "final_key_momentum": None, **method})
    trained.network = Linear()  # pyright: ignore
    trained.teacher = momentum_copy(trained.network)  # pyright: ignore
    generator = torch.Generator().manual_seed(0)
    pictures = 0.8 + torch.randn(64, 3, 16, 16, generator=generator)
    optimizer = build_optimizer(trained, OptimOptions())
    set_lr(optimizer, 0.02)
    found = []
    for step in range(steps):
        noise = 0.3 * torch.randn(4, 64, 3, 16, 16, generator=generator)
        output = trained(batch_of(trained, step)._replace(views=list(pictures + noise)))
        output.losses["distillation"].backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.after_step(output.state, step)
        (scores,) = logits(trained.teacher, trained.teacher_prototypes.rows, [pictures])
        assigned = sharpened(scores, trained.center, trained.teacher_temperature(step))
        found.append((entropy(assigned).item(), entropy(assigned.mean(0, keepdim=True)).item()))
    each, mean = (sum(column[-20:]) / 20 for column in zip(*found, strict=True))
    return each, mean


def test_centre_and_sharpening_together_prevent_collapse() -> None:
    """Section 5.3 of the paper: no centre: one prototype takes all; no sharpening: none does."""
    each, mean = entropies_after(teacher_temperature=0.04)
    assert each < 0.8 and mean > 1.5, (each, mean)
    each, mean = entropies_after(teacher_temperature=0.04, center_momentum=1.0)
    assert mean < 0.05, mean
    each, mean = entropies_after(first_teacher_temperature=1.0, teacher_temperature=1.0)
    assert each > 2.25, each

"""Schedules against values worked out by hand, LARS against a loop, SGD against its formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clsa.learning.optim import (
    LARS,
    along_cosine,
    build_optimizer,
    clip_gradients,
    lr_at,
    momentum_at,
    set_lr,
    weight_decay_at,
)
from clsa.options.methods import BYOLOptions, MoCoOptions
from clsa.options.run import OptimOptions


def rates(steps: int, steps_per_epoch: int, batch: int = 256, **options: Any) -> list[float]:
    chosen = OptimOptions(lr=1.0, **options)
    epochs = steps // steps_per_epoch
    return [lr_at(chosen, step, steps_per_epoch, epochs, batch) for step in range(steps)]


def half_cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


def test_cosine_by_step() -> None:
    got = rates(8, 2, schedule="cosine")
    assert got == pytest.approx([half_cosine(step / 8) for step in range(8)])
    root = math.sqrt(0.5)
    hand = [1, 0.961940, (1 + root) / 2, 0.691342, 0.5, 0.308658, (1 - root) / 2, 0.038060]
    assert got == pytest.approx(hand, abs=1e-6)


def test_cosine_by_epoch_is_the_official_codes() -> None:
    official = [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert rates(8, 2, schedule="cosine-epoch") == pytest.approx(
        [r for r in official for _ in "ab"]
    )


def test_steps_at_shares_of_the_run() -> None:
    assert rates(10, 2, schedule="step") == pytest.approx([1] * 6 + [0.1] * 2 + [0.01] * 2)
    assert rates(4, 1, schedule="step", milestones=()) == [1] * 4
    at_200 = [lr_at(OptimOptions(lr=1.0, schedule="step"), epoch * 7, 7, 200, 256) for epoch in
              (0, 119, 120, 159, 160, 199)]  # fmt: skip
    assert at_200 == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_constant() -> None:
    assert rates(4, 2, schedule="constant") == [1] * 4


def test_warm_up_rises_in_equal_steps_and_the_schedule_spans_the_rest() -> None:
    rest = [half_cosine(step / 8) for step in range(8)]
    got = rates(12, 4, schedule="cosine", warmup_epochs=1)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, *rest])
    got = rates(12, 4, schedule="cosine-epoch", warmup_epochs=1)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 4 + [0.5] * 4)
    got = rates(4, 4, schedule="constant", warmup_epochs=0.5)
    assert got == pytest.approx([0.5, 1, 1, 1])
    got = rates(10, 2, schedule="step", warmup_epochs=1)
    assert got == pytest.approx([0.5, 1] + [1] * 4 + [0.1] * 2 + [0.01] * 2)


def test_warm_up_of_a_share_of_an_epoch_never_exceeds_the_peak() -> None:
    for schedule in ("cosine", "cosine-epoch", "step", "constant"):
        for warmup in (0.1, 0.3, 0.7, 1.5, 2.9, 3, 5):
            got = rates(9, 3, schedule=schedule, warmup_epochs=warmup)
            assert all(0 < rate <= 1 for rate in got), (schedule, warmup, got)
            count = min(9, math.ceil(warmup * 3))
            assert got[:count] == pytest.approx(
                [(k + 1) / math.ceil(warmup * 3) for k in range(count)]
            )


@pytest.mark.parametrize("batch", [64, 256, 4096])
def test_the_rate_is_per_256_pictures(batch: int) -> None:
    got = rates(6, 2, batch, schedule="cosine", warmup_epochs=1)
    assert got == pytest.approx(
        [batch / 256 * rate for rate in rates(6, 2, schedule="cosine", warmup_epochs=1)]
    )
    assert lr_at(OptimOptions(), 0, 10, 10, batch) == pytest.approx(0.03 * batch / 256)


def test_the_rate_depends_on_the_step_alone() -> None:
    options = OptimOptions(schedule="cosine", warmup_epochs=2)
    forward = [lr_at(options, step, 5, 10, 128) for step in range(50)]
    backward = [lr_at(options, step, 5, 10, 128) for step in reversed(range(50))]
    assert forward == backward[::-1]
    assert max(forward) == pytest.approx(0.015) and forward[-1] > 0


def test_a_cosine_ends_at_the_final_rate() -> None:
    got = rates(8, 2, batch=512, schedule="cosine", final_lr=0.2)
    assert got == pytest.approx([2 * (0.2 + 0.8 * half_cosine(step / 8)) for step in range(8)])
    got = rates(8, 2, schedule="cosine-epoch", final_lr=0.2)
    assert got[-1] == got[-2] == pytest.approx(0.2 + 0.8 * half_cosine(3 / 4))
    warm = rates(12, 4, schedule="cosine", final_lr=0.2, warmup_epochs=1)
    assert warm[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert warm[4:] == pytest.approx([0.2 + 0.8 * half_cosine(step / 8) for step in range(8)])


def test_along_cosine_by_hand() -> None:
    ends = [along_cosine(0.996, 1.0, share) for share in (0, 0.25, 0.5, 0.75, 1)]
    hand = [0.996, 0.996 + 0.004 * (1 - math.sqrt(0.5)) / 2, 0.998]
    assert ends[:3] == pytest.approx(hand, abs=1e-12)
    assert ends[3:] == pytest.approx([1.996 - hand[1], 1.0], abs=1e-12)


def test_momentum_and_weight_decay_are_constant_or_follow_a_cosine() -> None:
    assert {momentum_at(MoCoOptions(), step, 50) for step in range(50)} == {0.999}
    byol = BYOLOptions()  # Grill et al. 2020: 1 - (1 - 0.996) (cos(pi k / K) + 1) / 2
    for step in range(50):
        wanted = 1 - (1 - 0.996) * (math.cos(math.pi * step / 50) + 1) / 2
        assert momentum_at(byol, step, 50) == pytest.approx(wanted, abs=1e-15)
    fixed, rising = OptimOptions(), OptimOptions(weight_decay=0.04, final_weight_decay=0.4)
    assert {weight_decay_at(fixed, step, 50) for step in range(50)} == {1e-4}
    got = [weight_decay_at(rising, step, 50) for step in (0, 25, 50)]
    assert got == pytest.approx([0.04, 0.22, 0.4])


# ---- optimisers


class Tiny(nn.Module):
    """A matrix, a kernel, two vectors, a scalar-like norm weight, and one frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.matrix, self.kernel = parameter(3, 4), parameter(2, 3, 2, 2)
        self.bias, self.norm = parameter(4), parameter(2)
        self.zero = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        self.frozen = parameter(3, 3).requires_grad_(False)


def gradient(param: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + param.numel())
    return torch.randn(param.shape, generator=generator, dtype=torch.float64)


def lars_loop(
    param: list[float],
    grads: list[list[float]],
    weight: bool,
    rates: list[float],
    trust: float = 0.001,
    clip: bool = False,
) -> list[float]:
    """LARS of one parameter, written out (momentum 0.9, decay 0.01)."""
    velocity = [0.0] * len(param)
    for grad, rate in zip(grads, rates, strict=True):
        update = list(grad)
        if weight:
            update = [g + 0.01 * p for g, p in zip(grad, param, strict=True)]
            size = math.sqrt(sum(p * p for p in param))
            length = math.sqrt(sum(u * u for u in update))
            if size > 0 and length > 0:
                factor = trust * size / length
                if clip:
                    factor = min(factor / rate, 1)
                update = [factor * u for u in update]
        velocity = [0.9 * v + u for v, u in zip(velocity, update, strict=True)]
        param = [p - rate * v for p, v in zip(param, velocity, strict=True)]
    return param


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize(("trust", "clip"), [(0.001, False), (0.02, False), (0.3, True)])
def test_lars_against_a_loop(trust: float, clip: bool, vectors: bool) -> None:
    model, rates = Tiny(), [0.5, 1.0, 0.2, 0.7]
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    options = OptimOptions(
        name="lars", weight_decay=0.01, trust=trust, clip_trust=clip, decay_vectors=vectors
    )
    optimizer, shortened = build_optimizer(model, options), []
    for step, rate in enumerate(rates):
        set_lr(optimizer, rate)
        for param in model.parameters():
            param.grad = gradient(param, step) if param.requires_grad else None
        optimizer.step()
    for name, param in model.named_parameters():
        if name == "frozen":
            assert torch.equal(param, start[name])
            continue
        grads = [gradient(param, step).flatten().tolist() for step in range(len(rates))]
        weight, flat = vectors or param.ndim > 1, start[name].flatten().tolist()
        hand = lars_loop(flat, grads, weight, rates, trust, clip)
        wanted = torch.tensor(hand, dtype=torch.float64)
        torch.testing.assert_close(param.detach().flatten(), wanted, msg=name)
        plain = torch.tensor(lars_loop(flat, grads, weight, rates, trust), dtype=torch.float64)
        shortened.append(not torch.allclose(wanted, plain))
    assert any(shortened) == clip


def test_a_clipped_layer_never_steps_further_than_plain_sgd() -> None:
    """trust ||p|| / ||g|| is 60 for a gradient of 0.01, and 0.6 for a gradient of 1."""
    for length, factor in ((0.01, 1.0), (1.0, 0.3)):
        param = nn.Parameter(torch.full((2, 2), 3.0))
        optimizer = LARS([param], lr=2.0, weight_decay=0.0, trust=0.1, clip=True)
        param.grad = torch.tensor([[length, 0.0], [0.0, 0.0]])
        optimizer.step()
        moved = 3.0 - 2.0 * factor * length
        torch.testing.assert_close(param.detach(), torch.tensor([[moved, 3.0], [3.0, 3.0]]))


def test_lars_moves_by_the_trusted_share_and_survives_zeros() -> None:
    param = nn.Parameter(torch.full((2, 2), 3.0))
    optimizer = LARS([param], lr=2.0, weight_decay=0.0)
    param.grad = torch.tensor([[1e6, 0.0], [0.0, 0.0]])
    optimizer.step()  # norm 6, so a step of 2 * 0.001 * 6 along the gradient
    torch.testing.assert_close(param.detach(), torch.tensor([[2.988, 3.0], [3.0, 3.0]]))
    param.grad = torch.zeros(2, 2)
    optimizer.step()
    assert param.isfinite().all()
    unused = nn.Parameter(torch.ones(2, 2))
    LARS([unused], lr=1.0).step()
    assert torch.equal(unused.detach(), torch.ones(2, 2))


def test_lars_state_is_restored() -> None:
    def run(halt: bool) -> Tensor:
        model = Tiny()
        optimizer = build_optimizer(model, OptimOptions(name="lars"))
        for step in range(4):
            if halt and step == 2:
                saved = optimizer.state_dict()
                optimizer = build_optimizer(model, OptimOptions(name="lars"))
                optimizer.load_state_dict(saved)
            set_lr(optimizer, 1.0)
            for param in model.parameters():
                param.grad = gradient(param, step) if param.requires_grad else None
            optimizer.step()
        return model.matrix.detach()

    assert torch.equal(run(halt=False), run(halt=True))


def test_sgd_decays_every_trained_parameter_as_the_official_code_does() -> None:
    model = Tiny()
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = build_optimizer(model, OptimOptions(weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.SGD)
    velocity = {name: torch.zeros_like(param) for name, param in start.items()}
    for step, rate in enumerate((0.5, 0.1)):
        set_lr(optimizer, rate)
        for name, param in model.named_parameters():
            param.grad = gradient(param, step) if param.requires_grad else None
            if param.requires_grad:
                velocity[name] = 0.9 * velocity[name] + gradient(param, step) + 0.1 * start[name]
                start[name] = start[name] - rate * velocity[name]
        optimizer.step()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), start[name], msg=name)


def test_vectors_are_left_out_of_weight_decay_where_asked() -> None:
    model = Tiny()
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    options = OptimOptions(weight_decay=0.1, momentum=0.0, decay_vectors=False)
    optimizer = build_optimizer(model, options)
    set_lr(optimizer, 0.5)
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    optimizer.step()
    for name, param in model.named_parameters():
        share = 0.95 if name in ("matrix", "kernel") else 1.0
        torch.testing.assert_close(param.detach(), share * start[name], msg=name)


def adamw_loop(
    param: Tensor, grads: list[Tensor], rates: list[float], decays: list[float]
) -> Tensor:
    """AdamW (Loshchilov and Hutter 2019, Algorithm 2) with betas 0.9 and 0.999, written out."""
    first, second = torch.zeros_like(param), torch.zeros_like(param)
    for step, (grad, rate, decay) in enumerate(zip(grads, rates, decays, strict=True), 1):
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        param = param * (1 - rate * decay) - rate * mean / (square.sqrt() + 1e-8)
    return param


def test_adamw_against_a_loop_with_decay_that_moves() -> None:
    model, rates, decays = Tiny(), [0.1, 0.2, 0.05], [0.1, 0.3, 0.2]
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    options = OptimOptions(name="adamw", weight_decay=0.7, decay_vectors=False)
    optimizer = build_optimizer(model, options)
    assert isinstance(optimizer, torch.optim.AdamW)
    for step, (rate, decay) in enumerate(zip(rates, decays, strict=True)):
        set_lr(optimizer, rate, weight_decay=decay)
        for param in model.parameters():
            param.grad = gradient(param, step) if param.requires_grad else None
        optimizer.step()
    for name, param in model.named_parameters():
        if name != "frozen":
            grads = [gradient(param, step) for step in range(len(rates))]
            mine = decays if param.ndim > 1 else [0.0] * len(rates)
            hand = adamw_loop(start[name], grads, rates, mine)
            torch.testing.assert_close(param.detach(), hand, msg=name)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_modules_of_fixed_rate_keep_the_peak(name: Any) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.predictor = Tiny(), Tiny()

    model = Both()
    options = OptimOptions(name=name, weight_decay=0.3, decay_vectors=False)
    optimizer = build_optimizer(model, options, fixed_rate=(model.predictor,))
    set_lr(optimizer, 0.25, peak=2.0, weight_decay=0.5)
    names = {param: at for at, param in model.named_parameters()}
    settings = {
        names[param]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for param in group["params"]
    }
    trained = {at for param, at in names.items() if param.requires_grad}
    assert set(settings) == trained and sum(len(g["params"]) for g in optimizer.param_groups) == 10
    for at, (rate, decay) in settings.items():
        assert rate == (2.0 if at.startswith("predictor") else 0.25), at
        assert decay == (0.0 if at.endswith(("bias", "norm")) else 0.5), at
    set_lr(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}


def test_each_gradient_is_shortened_on_its_own() -> None:
    model = Tiny()
    for number, param in enumerate(model.parameters(), 1):
        param.grad = None if param is model.bias else torch.full_like(param, 0.5**number)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    clip_gradients(model.parameters(), 0.3)
    assert model.bias.grad is None
    lengths = {}
    for name, param in model.named_parameters():
        if param.grad is not None:
            length = before[name].norm()
            lengths[name] = float(param.grad.norm())
            wanted = before[name] * min(0.3 / (float(length) + 1e-6), 1.0)
            torch.testing.assert_close(param.grad, wanted, msg=name)
            if length <= 0.3:
                assert torch.equal(param.grad, before[name]), name
    assert 0.2999 < max(lengths.values()) <= 0.3 and min(lengths.values()) < 0.2


def test_set_lr_sets_every_group() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 3.0}], lr=1.0)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]

"""Contracts that hold for every method and recipe, on tiny views of random pixels."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa import checkpoint
from clsa.config import merge
from clsa.methods import METHODS
from clsa.methods.method import Batch, Method, sum_of
from clsa.optim import build_optimizer, set_lr
from clsa.options import RunOptions
from clsa.recipes import FULL, resolve

TINY = {
    "batch_size": 8,
    "views": {"size": 16, "weak": {"blur": 0.0}},
    "model": {
        "encoder": "resnet10-w32",
        "projector_hidden": 32,
        "projector_dim": 16,
        "norm_groups": 2,
    },
    "method": {"queue_size": 12, "key_momentum": 0.9},
}


def tiny(recipe: str, **over: Any) -> RunOptions:
    options = resolve({"recipe": recipe})
    sizes = {
        kind: {"sizes": tuple(16 for _ in getattr(options.views, kind).sizes)}
        for kind in ("weak", "strong")
    }
    return resolve(merge(merge({"recipe": recipe, **TINY}, {"views": sizes}), over))


def build(recipe: str, **over: Any) -> Method:
    options = tiny(recipe, **over)
    return METHODS[options.method.name](options)


def batch_of(method: Method, step: int = 0, rows: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(step)
    views = [
        torch.randn(rows, 3, spec.size, spec.size, generator=generator)
        for spec in method.view_specs
    ]
    return Batch(views, torch.arange(rows), torch.full((rows,), -1), step)


def total(method: Method, batch: Batch) -> Tensor:
    return sum_of(method(batch).losses.values())


def train(
    method: Method, steps: int, first: int = 0, optimizer: Any = None
) -> torch.optim.Optimizer:
    options = tiny("moco-v2").optim
    optimizer = optimizer or build_optimizer(method, options)
    set_lr(optimizer, 0.05)
    for step in range(first, first + steps):
        output = method(batch_of(method, step))
        sum_of(output.losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(output.state, step)
    return optimizer


def test_every_method_has_a_recipe() -> None:
    assert {resolve({"recipe": name}).method.name for name in FULL} == set(METHODS)


@pytest.mark.parametrize("recipe", FULL)
def test_losses_are_finite_scalars_and_count_their_terms(recipe: str) -> None:
    method = build(recipe)
    output = method(batch_of(method))
    assert all(loss.ndim == 0 and loss.isfinite() for loss in output.losses.values())
    assert all(not metric.requires_grad for metric in output.metrics.values())
    options = tiny(recipe)
    candidates = 12 + (8 if options.method.bank == "batch+queue" else 1)
    assert method.chance == pytest.approx(len(options.views.weak.sizes) * math.log(candidates))
    assert method.floor < method.chance


@pytest.mark.parametrize("recipe", FULL)
def test_forward_changes_no_key_weight_and_no_bank(recipe: str) -> None:
    method = build(recipe)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(batch_of(method))
    for name, value in method.state_dict().items():
        if "running_" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("recipe", FULL)
def test_gradients_reach_every_trainable_parameter_and_no_key_parameter(recipe: str) -> None:
    method = build(recipe)
    total(method, batch_of(method)).backward()
    for name, parameter in method.named_parameters():
        if "key_network" in name:
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("recipe", FULL)
def test_ten_optimiser_steps_on_one_batch_lower_the_loss(recipe: str) -> None:
    method = build(recipe)
    batch = batch_of(method)
    optimizer = build_optimizer(method, tiny(recipe).optim)
    set_lr(optimizer, 0.02)
    first = total(method, batch).item()
    for _ in range(10):
        total(method, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert total(method, batch).item() < first


@pytest.mark.parametrize("recipe", ["moco-v2", "clsa", "clsa-multi-paper"])
def test_same_seed_same_weights_and_another_seed_others(recipe: str) -> None:
    digests = []
    for seed, noise in ((0, 1), (0, 2), (5, 3)):
        torch.manual_seed(noise)
        method = build(recipe, seed=seed)
        train(method, 3)
        digests.append(checkpoint.digest(method.state_dict()))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("recipe", ["moco-v2", "clsa"])
def test_save_load_step_equals_step(recipe: str) -> None:
    straight, resumed = build(recipe), build(recipe)
    optimizer = train(straight, 3)
    other = train(resumed, 1, 7)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, 2, 3, optimizer)
    train(resumed, 2, 3, other)
    assert checkpoint.digest(straight.state_dict()) == checkpoint.digest(resumed.state_dict())


def test_clsa_with_beta_zero_and_the_papers_bank_is_moco_v2_step_for_step() -> None:
    moco, clsa = build("moco-v2"), build("clsa-paper", method={"beta": 0.0})
    for step in range(4):
        train(moco, 1, step)
        train(clsa, 1, step)
        theirs = {name.removeprefix("base."): value for name, value in clsa.state_dict().items()}
        for name, value in moco.state_dict().items():
            # query statistics also see the strong view; no weight, key or queue row does
            if not (name.startswith("network.") and ("running_" in name or "num_b" in name)):
                assert torch.equal(value, theirs[name]), (step, name)


def test_positive_is_not_in_the_queue_before_it_was_used() -> None:
    method = build("moco-v2")
    batch = batch_of(method)
    output = method(batch)
    queue = method.get_submodule("queue").get_buffer("rows")
    assert not any(torch.equal(key, row) for key in output.state for row in queue)
    method.after_step(output.state, 0)
    assert torch.equal(method.get_submodule("queue").get_buffer("rows")[:8], output.state)


def test_key_network_follows_with_momentum() -> None:
    method = build("moco-v2")
    old = {n: p.clone() for n, p in method.get_submodule("key_network").named_parameters()}
    train(method, 1)
    new = dict(method.network.named_parameters())
    for name, key in method.get_submodule("key_network").named_parameters():
        torch.testing.assert_close(key, 0.9 * old[name] + 0.1 * new[name])


def test_sum_and_mean_differ_by_the_number_of_terms() -> None:
    summed, mean = build("clsa-multi"), build("clsa-multi", method={"reduce": "mean"})
    batch = batch_of(summed)
    a, b = summed(batch).losses, mean(batch).losses
    torch.testing.assert_close(a["contrast"], 5 * b["contrast"])
    torch.testing.assert_close(a["divergence"], 25 * b["divergence"])


def test_divergence_is_entropy_plus_kl_and_targets_can_come_from_the_key() -> None:
    for target in ("query", "key"):
        method = build("clsa", method={"target": target})
        output = method(batch_of(method))
        parts = output.metrics["target_entropy"] + output.metrics["kl"]
        torch.testing.assert_close(output.losses["divergence"].detach(), parts)
    method = build("clsa-contrastive")
    assert set(method(batch_of(method)).losses) == {"contrast", "strong_contrast"}


def test_strong_views_come_after_the_weak_ones_and_share_the_draws_of_moco() -> None:
    moco, clsa = build("moco-v2"), build("clsa")
    assert [spec.name for spec in clsa.view_specs] == ["key", "weak0", "strong0"]
    assert clsa.view_specs[:2] == moco.view_specs
    strong = build("moco-strong-query-key").view_specs
    assert [spec.strong for spec in strong] == [True, True]
    assert [spec.strong for spec in build("moco-strong-query").view_specs] == [False, True]

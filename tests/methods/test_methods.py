"""Contracts that hold for every method, plain and with the divergence, on tiny random views."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from clsa.learning.losses import distribution_divergence
from clsa.learning.norm_statistics import Statistics
from clsa.learning.optim import build_optimizer, set_lr
from clsa.methods import METHODS, build_method
from clsa.methods.wrappers.stronger import Stronger
from clsa.options.run import OptimOptions
from clsa.recipes import resolve
from clsa.recipes.imagenet import IMAGENET
from clsa.runs import digests
from clsa.system.errors import ClsaError
from tests.support.contract import (
    BASES,
    EXTENT,
    batch_of,
    build,
    distance,
    rank_main,
    shared_run,
    tiny,
    total,
    train,
)  # fmt: skip

NAMES = [BASES[name] for name in METHODS]
FAMILY = [name for name, recipe in IMAGENET.items() if recipe.values["method"]["name"] == "moco"]
# Several queries, one-hot targets, strong keys: recipes that add cases to the contracts.
VARIANTS = ["clsa-multi", "clsa-contrastive", "moco-strong-query-key"]
AROUND = ["clim-multi-res", "clim-multi-crop", "suncet", "continual"]  # wrappers
VARIANTS += AROUND
KEYS = ("key_", "teacher")  # modules that only `after_step` moves
every_method = pytest.mark.parametrize("stronger", [False, True])


def is_key(name: str) -> bool:
    return any(part.startswith(KEYS) for part in name.split("."))


def test_every_method_has_recipes_of_all_its_sizes() -> None:
    used = {recipe.values["method"]["name"] for recipe in IMAGENET.values()}
    assert set(METHODS) <= used and set(METHODS) <= set(BASES)


@every_method
@pytest.mark.parametrize("recipe", [*NAMES, *VARIANTS])
def test_losses_are_finite_scalars_within_their_landmarks(recipe: str, stronger: bool) -> None:
    method = build(recipe, stronger=stronger)
    output = method(batch_of(method))
    assert all(loss.ndim == 0 and loss.isfinite() for loss in output.losses.values())
    assert all(not metric.requires_grad for metric in output.metrics.values())
    assert method.landmarks.name in output.losses
    assert method.landmarks.floor < method.landmarks.chance
    loss = output.losses[method.landmarks.name]
    assert method.landmarks.floor - 1e-4 <= loss <= 3 * abs(method.landmarks.chance) + 3
    added = {"divergence", "strong_contrast"} & set(output.losses)
    assert len(added) == stronger


@pytest.mark.parametrize("recipe", NAMES)
def test_a_comparison_is_of_unit_rows_and_a_bank_without_gradient(recipe: str) -> None:
    method = build(recipe)
    comparisons = method(batch_of(method)).comparisons
    assert comparisons
    for queries, bank, positive, candidates in comparisons:
        assert not bank.requires_grad
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(len(bank)), atol=0.5, rtol=0)
        for each in queries:
            rows = each if isinstance(each, torch.Tensor) else each.query
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
            assert rows.shape[1] == bank.shape[1]
        if positive is not None and candidates is not None:
            assert candidates.gather(1, positive[:, None]).all()


@every_method
@pytest.mark.parametrize("recipe", [*NAMES, *VARIANTS])
def test_forward_changes_no_key_weight_and_no_bank(recipe: str, stronger: bool) -> None:
    method = build(recipe, stronger=stronger)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(batch_of(method))
    for name, value in method.state_dict().items():
        if "running_" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("recipe", [*NAMES, *VARIANTS])
def test_statistics_that_forward_moved_can_be_put_back(recipe: str) -> None:
    method = build(recipe, stronger=True)  # the plain method is inside
    before = digests.digest(method.state_dict())
    statistics = Statistics(method)
    statistics.keep()
    method(batch_of(method))
    moved = digests.digest(method.state_dict())
    statistics.put_back()
    assert digests.digest(method.state_dict()) == before != moved


@every_method
@pytest.mark.parametrize("recipe", [*NAMES, *VARIANTS])
def test_gradients_reach_every_trainable_parameter_and_no_key(recipe: str, stronger: bool) -> None:
    method = build(recipe, stronger=stronger)
    total(method, batch_of(method)).backward()
    for name, parameter in method.named_parameters():
        if is_key(name):
            assert parameter.grad is None and not parameter.requires_grad, name
        elif parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_method
@pytest.mark.parametrize("recipe", [*NAMES, *VARIANTS])
def test_ten_optimiser_steps_on_one_batch_lower_the_loss(recipe: str, stronger: bool) -> None:
    method = build(recipe, stronger=stronger)
    batch = batch_of(method)
    optimizer = build_optimizer(method, OptimOptions(momentum=0.9))
    set_lr(optimizer, 0.02)
    first = total(method, batch).item()
    for _ in range(10):
        total(method, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert total(method, batch).item() < first


@pytest.mark.parametrize("recipe", [*NAMES, *AROUND])
def test_same_seed_same_weights_and_another_seed_others(recipe: str) -> None:
    found = []
    for seed, noise in ((0, 1), (0, 2), (5, 3)):
        torch.manual_seed(noise)
        method = build(recipe, seed=seed, stronger=True)  # the plain method is inside
        train(method, 4)
        found.append(digests.digest(method.state_dict()))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("recipe", [*NAMES, *AROUND])
def test_save_load_step_equals_step(recipe: str) -> None:
    """Saved in the middle of the second epoch, loaded into a method with another history."""
    straight, resumed = (build(recipe, stronger=True) for _ in range(2))
    optimizer = train(straight, 4)
    other = train(resumed, 1, 7)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, 4, 4, optimizer)
    train(resumed, 4, 4, other)
    assert digests.digest(straight.state_dict()) == digests.digest(resumed.state_dict())


# ---- two processes of four pictures are one of eight


CASES = [(name, stronger) for name in [*NAMES, *AROUND] for stronger in (False, True)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    spawn(rank_main, (2, str(out / "store"), str(out), CASES), nprocs=2)
    return out


@pytest.mark.xdist_group("ranks")  # one start of the processes for all
@pytest.mark.parametrize(("recipe", "stronger"), CASES)
def test_two_processes_compute_what_one_does(recipe: str, stronger: bool, ranks: Path) -> None:
    alone: dict[str, Any] = shared_run(recipe, stronger)
    first, second = (
        torch.load(ranks / f"{recipe}-{stronger}-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    runs = zip(first["gradients"], second["gradients"], alone["gradients"], strict=True)
    for step, (mine, theirs, ours) in enumerate(runs):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert distance(mine, ours) < (1e-2 if step else 1e-5), step
    for name, value in alone["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, atol=1e-3, rtol=1e-2, msg=name)


# ---- MoCo and the divergence around it


@pytest.mark.parametrize("recipe", FAMILY)
def test_chance_counts_queries_and_candidates(recipe: str) -> None:
    options, method = tiny(recipe), build(recipe)
    candidates = 12 + (8 if getattr(options.method, "bank", "") == "batch+queue" else 1)
    queries = len(options.views.weak.sizes + options.views.local.sizes)
    chance = queries * math.log(candidates)
    assert method.landmarks.chance == pytest.approx(chance)


def test_clsa_with_beta_zero_and_the_papers_bank_is_moco_v2_step_for_step() -> None:
    moco, clsa = build("moco-v2"), build("clsa-paper", strong={"beta": 0.0})
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
    (keys,) = method(batch_of(method)).state
    queue = method.get_submodule("queue").get_buffer("rows")
    assert not any(torch.equal(key, row) for key in keys for row in queue)
    method.after_step([keys], 0)
    assert torch.equal(method.get_submodule("queue").get_buffer("rows")[:8], keys)


def test_key_network_follows_with_momentum() -> None:
    method = build("moco-v2")
    old = {n: p.clone() for n, p in method.get_submodule("key_network").named_parameters()}
    train(method, 1)
    new = dict(method.network.named_parameters())
    for name, key in method.get_submodule("key_network").named_parameters():
        torch.testing.assert_close(key, 0.9 * old[name] + 0.1 * new[name])


def test_symmetric_moco_is_the_mean_of_both_directions() -> None:
    """Batch norm is frozen, so a view's projection does not depend on the rest of the batch."""
    both = build("moco-v2", method={"symmetric": True}).eval()
    one = build("moco-v2").eval()
    batch = batch_of(both)
    there = one(batch)
    back = one(batch._replace(views=batch.views[::-1]))
    output = both(batch)
    expected = (there.losses["contrast"] + back.losses["contrast"]) / 2
    torch.testing.assert_close(output.losses["contrast"], expected)
    for ours, theirs in zip(output.state, there.state + back.state, strict=True):
        torch.testing.assert_close(ours, theirs)
    both.after_step(output.state, 0)
    first, second = output.state
    queue = both.get_submodule("queue").get_buffer("rows")
    assert torch.equal(queue, torch.cat([second[4:], first[4:], second[:4]]))  # of 12 rows


def test_sum_and_mean_differ_by_the_number_of_terms() -> None:
    summed = build("clsa-multi")
    mean = build("clsa-multi", method={"reduce": "mean"}, strong={"reduce": "mean"})
    batch = batch_of(summed)
    a, b = summed(batch).losses, mean(batch).losses
    torch.testing.assert_close(a["contrast"], 5 * b["contrast"])
    torch.testing.assert_close(a["divergence"], 25 * b["divergence"])


@pytest.mark.parametrize("recipe", NAMES)
def test_the_divergence_follows_from_the_comparisons_of_the_method(recipe: str) -> None:
    """The wrapper's arithmetic equals the public loss on what the base method returned."""
    over: dict[str, Any] = {"strong": {"beta": 0.7, "temperature": 0.3, "target_temperature": 0.15}}
    method = build(recipe, stronger=True, **over).eval()
    assert isinstance(method, Stronger)
    batch = batch_of(method)
    weak = len(method.base.view_specs)
    base = method.base(batch._replace(views=batch.views[:weak]))
    strong = [method.base.query(view, batch) for view in batch.views[weak:]]
    terms = []
    for queries, bank, _, candidates in base.comparisons:
        rows = [each if isinstance(each, torch.Tensor) else each.query for each in queries]
        terms.append(distribution_divergence(rows, strong, bank, 0.3, 0.15, candidates))
    output = method(batch)
    expected = 0.7 * torch.stack(terms).mean()
    torch.testing.assert_close(output.losses["divergence"], expected)
    torch.testing.assert_close(
        output.losses["divergence"].detach() / 0.7,
        len(queries) * len(strong) * (output.metrics["target_entropy"] + output.metrics["kl"]),
    )


@pytest.mark.parametrize("recipe", NAMES)
def test_the_divergence_moves_nothing_by_the_weak_views(recipe: str) -> None:
    method = build(recipe, stronger=True, strong={"beta": 1.0})
    batch = batch_of(method)
    views = [view.requires_grad_() for view in batch.views]
    weak = len(method.view_specs) - 1
    method(batch).losses["divergence"].backward()
    assert all(view.grad is None or not view.grad.any() for view in views[:weak])
    assert views[weak].grad is not None and views[weak].grad.abs().sum() > 0


@pytest.mark.parametrize("recipe", NAMES)
def test_targets_from_the_positive_where_there_is_one(recipe: str) -> None:
    base = build(recipe)
    has_positives = base(batch_of(base)).comparisons[0].positive is not None
    assert has_positives == base.has_positives
    for target in ("key", "one-hot"):
        if not has_positives:
            with pytest.raises(ClsaError, match="compares with prototypes"):
                build(recipe, stronger=True, strong={"target": target})
            continue
        method = build(recipe, stronger=True, strong={"target": target})
        found = set(method(batch_of(method)).losses)
        assert ("strong_contrast" in found) == (target == "one-hot")


def test_strong_views_come_after_the_weak_ones_and_share_the_draws_of_moco() -> None:
    moco, clsa = build("moco-v2"), build("clsa")
    assert [spec.name for spec in clsa.view_specs] == ["key", "weak0", "strong0"]
    assert clsa.view_specs[:2] == moco.view_specs
    strong = build("moco-strong-query-key").view_specs
    assert [spec.ops.rounds for spec in strong] == [5, 5]
    assert [spec.ops.rounds for spec in build("moco-strong-query").view_specs] == [0, 5]


# ---- supervised


def test_supervised_is_cross_entropy_of_the_labelled_rows() -> None:
    method = build("supervised").eval()
    batch = batch_of(method)
    features = method.network.project(batch.views[0])
    logits = method.get_submodule("classifier")(features).double()
    known = batch.labels >= 0
    expected = -logits.log_softmax(1)[known].gather(1, batch.labels[known, None]).mean()
    torch.testing.assert_close(method(batch).losses["cross_entropy"].double(), expected)
    none = method(batch._replace(labels=torch.full_like(batch.labels, -1)))
    assert none.losses["cross_entropy"] == 0


def test_views_that_a_method_does_not_take_are_refused() -> None:
    for recipe, sizes, told in (
        ("moco-v2", (), "takes at least 2 weak views"),
        ("simclr", (16, 16), "takes 2 weak views"),
        ("swav", (), "takes at least 2 weak views"),
    ):
        options = tiny(recipe, views={"weak": {"sizes": sizes}})
        with pytest.raises(ClsaError, match=told):
            build_method(options, EXTENT)
    several = {"weak": {"sizes": (16, 16)}}
    with pytest.raises(ClsaError, match="takes 2 weak views"):
        build("moco-v2", method={"symmetric": True}, views=several)


def test_supervised_needs_labels() -> None:
    with pytest.raises(ClsaError, match="the pictures have fewer than two classes"):
        build_method(tiny("supervised"), EXTENT._replace(num_classes=0))
    assert resolve({"recipe": "supervised-small"}).method.name == "supervised"

"""SuNCEt: its loss, its sampler, which labels it sees, and how it wraps a method."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clsa.learning.optim import build_optimizer
from clsa.learning.pair_losses import suncet
from clsa.loading.few_labels import Stratified, describe_labels, num_held, with_few_labels
from clsa.loading.order import Order
from clsa.methods import METHODS, build_method
from clsa.methods.method import Batch, Extent, Method, sum_of
from clsa.methods.wrappers.stronger import Stronger
from clsa.methods.wrappers.suncet import SuNCEt
from clsa.options.run import OptimOptions
from clsa.pictures.sources import Pictures
from clsa.system.errors import ClsaError
from tests.support import reference
from tests.support.contract import EXTENT, ROWS, embed, tiny

LABELS = np.array([0, 0, 0, 1, 1, 2, -1, -1, -1, 3, 3, 3] + [-1] * 18)
LABELLED = EXTENT._replace(num_classes=4, labels=LABELS)
FOUR = {"labels": "10%", "suncet": {"classes": 4, "per_class": 2}}


def build(recipe: str, extent: Extent = LABELLED, **over: Any) -> Method:
    method = build_method(tiny(recipe, **{**FOUR, **over}), extent)
    method.before_epoch(0, embed)
    return method


def batch_of(method: Method, step: int = 0) -> Batch:
    """The rows that the loader would give: those of the order, then the labelled rows."""
    order = Order(EXTENT.num_pictures, ROWS, 0)
    index, companions = order.indices(step), method.companions()
    if companions is not None:
        index = np.concatenate([index, companions.rows(order, step).index])
    generator = torch.Generator().manual_seed(step)
    views = [
        torch.randn(len(index), 3, spec.size, spec.size, generator=generator)
        for spec in method.view_specs
    ]
    return Batch(views, torch.from_numpy(index), torch.from_numpy(LABELS[index]), step)


def unit(count: int, dim: int = 5) -> Tensor:
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(count)), dim=1)


# ---- loss


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_the_loss_is_the_slow_loop(temperature: float) -> None:
    rows, labels = unit(9), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 2])
    expected = reference.suncet(rows, labels, temperature)
    assert suncet(rows, labels, temperature).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "labels", [[0, -1, 1, -1, 1, 0], [0, 1, 2, 2, 2, -1], [0, 1, 2, 3, -1, -1]]
)
def test_rows_of_unknown_class_or_alone_in_theirs_do_not_count(labels: list[int]) -> None:
    rows = unit(6).double().requires_grad_()
    loss = suncet(rows, torch.tensor(labels), 0.2)
    expected = reference.suncet(rows.detach(), torch.tensor(labels), 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    assert rows.grad is not None and rows.grad.isfinite().all()


def test_the_loss_by_hand() -> None:
    assert suncet(unit(4), torch.zeros(4, dtype=torch.int64)).item() == pytest.approx(0, abs=1e-6)
    axes = torch.eye(2).repeat_interleave(2, 0).double()
    two = torch.tensor([0, 0, 1, 1])
    assert suncet(axes, two, 0.1).item() == pytest.approx(9.0796e-5, rel=1e-4)
    equal, three = torch.ones(12, 4) / 2, torch.arange(12) % 3
    assert suncet(equal, three).item() == pytest.approx(-math.log(3 / 11), rel=1e-6)


def test_every_row_takes_gradient_along_the_sphere() -> None:
    raw = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    suncet(normalize(raw, dim=1), torch.tensor([0, 0, 1, 1, 2, 2])).backward()
    assert raw.grad is not None and (raw.grad.norm(dim=1) > 0).all()
    torch.testing.assert_close((raw * raw.grad).sum(1), torch.zeros(6).double())


# ---- which pictures are labelled


def pictures(labels: list[int], names: list[str] | None = None) -> Pictures:
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    return Pictures(images, np.array(labels), ["a", "b", "c"], names)


def test_a_share_of_each_class_at_least_one() -> None:
    source = pictures([0] * 50 + [1] * 20 + [2] + [-1] * 9)
    few = with_few_labels(source, "10%", seed=1)
    assert np.bincount(few.labels[few.labels >= 0]).tolist() == [5, 2, 1]
    chosen = few.labels >= 0
    assert (few.labels[chosen] == source.labels[chosen]).all()
    assert describe_labels(few) == "labels: 8 pictures of 3 classes, 1 of which have a single one"
    assert (with_few_labels(source, "10%", seed=1).labels == few.labels).all()
    assert (with_few_labels(source, "10%", seed=2).labels != few.labels).any()
    assert (with_few_labels(source, "100%", seed=1).labels == source.labels).all()
    assert len(set(source.labels)) == 4  # the source itself is left alone


def test_the_choice_is_the_pictures_not_their_places() -> None:
    names = [f"{i}.png" for i in range(40)]
    source = pictures([0] * 20 + [1] * 20, names)
    few = with_few_labels(source, "20%", seed=0)
    rows = np.arange(40)[::-1].copy()
    turned = with_few_labels(source.subset(rows), "20%", seed=0)
    assert {few.ids[i] for i in np.flatnonzero(few.labels >= 0)} == {
        turned.ids[i] for i in np.flatnonzero(turned.labels >= 0)
    }


def test_a_list_names_paths_or_files(tmp_path: Path) -> None:
    names = ["a/1.png", "a/2.png", "b/3.png", "b/1.png", "x.png"]
    source = pictures([0, 0, 1, 1, -1], names)
    path = tmp_path / "few.txt"
    path.write_text("a/1.png\n3.png\tb\n\nb/1.png\n3.png\n")
    assert with_few_labels(source, str(path), 0).labels.tolist() == [0, -1, 1, 1, -1]
    for text, why in (
        ("a/1.png\nnone.png\nnil.png\n", r"none\.png - not in the set \(2 such lines\)"),
        ("1.png\n", "several pictures have this name"),
        ("x.png\n", "has no label in the set"),
        ("\n", "names no picture"),
        ("a/1.png\ta\n3.png\ta\n", r"3\.png - has another class in the set \(1 such lines\)"),
    ):
        path.write_text(text)
        with pytest.raises(ClsaError, match=why):
            with_few_labels(source, str(path), 0)


def test_a_path_goes_before_a_file_name(tmp_path: Path) -> None:
    source = pictures([0, 1, 1], ["1.png", "x/1.png", "x/2.png"])
    path = tmp_path / "few.txt"
    path.write_text("1.png\n2.png\n")
    assert with_few_labels(source, str(path), 0).labels.tolist() == [0, -1, 1]


def test_a_list_may_name_what_judging_holds_out(tmp_path: Path) -> None:
    source, held = pictures([0, -1, 1], ["1.png", "2.png", "3.png"]), ["2.png"]
    path = tmp_path / "few.txt"
    path.write_text("1.png\n2.png\n3.png\n")
    assert with_few_labels(source, str(path), 0, held).labels.tolist() == [0, -1, 1]
    assert num_held(str(path), held) == 1 and num_held("10%", held) == 0
    assert describe_labels(source, 1).endswith("; held out for evaluation: 1 more of the list")
    with pytest.raises(ClsaError, match="has no label in the set"):
        with_few_labels(source, str(path), 0)
    path.write_text("2.png\n")
    with pytest.raises(ClsaError, match="evaluation holds out all its pictures"):
        with_few_labels(source, str(path), 0, held)


@pytest.mark.parametrize("spec", ["ten", "0%", "101%", "-1%", "%", "no/such/file"])
def test_other_forms_are_refused_in_one_line(spec: str) -> None:
    with pytest.raises(ClsaError, match="10%") as caught:
        with_few_labels(pictures([0, 1]), spec, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ClsaError, match="none of the pictures has a label"):
        with_few_labels(pictures([-1, -1]), "10%", 0)


# ---- sampler


def test_a_step_shows_some_classes_and_as_many_pictures_of_each() -> None:
    order, sampler = Order(30, 8, 0), Stratified(LABELS, 3, 4, seed=5)
    assert sampler.count == 12
    seen: set[int] = set()
    for step in range(12):
        rows = sampler.rows(order, step)
        classes = LABELS[rows.index].reshape(3, 4)
        assert (classes == classes[:, :1]).all() and len(set(classes[:, 0])) == 3
        for members, c in zip(rows.index.reshape(3, 4), classes[:, 0], strict=True):
            size = int((c == LABELS).sum())
            assert len(set(members.tolist())) == min(size, 4)  # each one before any is repeated
        assert rows.drawn.min() >= order.count and len(set(rows.drawn.tolist())) == 12
        assert (sampler.rows(order, step).index == rows.index).all()
        seen |= set(rows.index.tolist())
    assert seen == set(np.flatnonzero(LABELS >= 0).tolist())
    drawn = [sampler.rows(order, step).drawn for step in range(3)]
    assert len(set(np.concatenate(drawn).tolist())) == 36  # within an epoch no view is repeated


def test_more_classes_than_there_are_is_all_of_them() -> None:
    assert Stratified(LABELS, 20, 2, 0).count == 8


# ---- around a method


@pytest.mark.parametrize("stronger", [False, True])
@pytest.mark.parametrize("recipe", METHODS | {"moco": None})
def test_any_method_learns_with_labels_added(recipe: str, stronger: bool) -> None:
    names = {"moco": "moco-v2"}
    method = build(names.get(recipe, recipe), stronger=stronger)
    batch = batch_of(method)
    assert len(batch.index) == ROWS + 8
    output = method(batch)
    assert output.losses["suncet"].isfinite() and ("divergence" in output.losses) == stronger
    optimizer = build_optimizer(method, OptimOptions())
    for step in range(2):
        output = method(batch_of(method, step))
        sum_of(output.losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(output.state, step)


@pytest.mark.parametrize("recipe", ["moco-v2", "simclr", "instdisc"])
def test_the_base_is_the_same_as_without_labels(recipe: str) -> None:
    method = build(recipe)
    assert isinstance(method, SuNCEt)
    alone = build_method(tiny(recipe), EXTENT)
    batch = batch_of(method)
    output, plain = method(batch), alone(batch.part(0, ROWS))
    assert torch.equal(output.losses["contrast"], plain.losses["contrast"])
    method.after_step(output.state, 0)
    alone.after_step(plain.state, 0)
    moved = {name: value for name, value in method.state_dict().items() if "running" not in name}
    for name, value in alone.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(moved[f"base.{name}"], value), name  # no labelled row in a bank


def test_the_term_is_the_loss_of_both_views_of_the_labelled_rows() -> None:
    method = build("simclr", suncet={"weight": 0.5, "temperature": 0.2}).eval()
    batch = batch_of(method)
    found = method(batch).losses["suncet"].item()
    rows = torch.cat([method.network(view[ROWS:]) for view in batch.views]).detach()
    expected = 0.5 * reference.suncet(rows, batch.labels[ROWS:].repeat(2), 0.2)
    assert found == pytest.approx(expected, rel=1e-4)


def test_classes_of_one_picture_have_their_other_view() -> None:
    single = EXTENT._replace(labels=np.array([0, 1, 2, 3] + [-1] * 26))
    method = build("simclr", single, suncet={"per_class": 1})
    batch = batch_of(method)
    batch = batch._replace(labels=torch.cat([batch.labels[:ROWS], torch.arange(4)]))
    assert method(batch).losses["suncet"].isfinite()
    with pytest.raises(ClsaError, match="with one view, a positive must be"):
        build("instdisc", single, suncet={"per_class": 1})


def test_labels_are_used_for_some_epochs_only() -> None:
    method = build("simclr", suncet={"epochs": 1})
    assert method.refreshes(1) and not method.refreshes(2)
    assert len(batch_of(method).index) == ROWS + 8
    method.before_epoch(1, embed)
    later = batch_of(method, EXTENT.steps_per_epoch)
    assert len(later.index) == ROWS and "suncet" not in method(later).losses


def test_the_divergence_takes_the_labelled_rows_in() -> None:
    method = build("simclr", stronger=True).eval()
    assert isinstance(method, Stronger)
    batch = batch_of(method)
    weak = batch._replace(views=batch.views[:2])
    for c, comparison in enumerate(method.base(weak).comparisons):
        (query,) = comparison.rows()
        view = batch.views[c]
        expected = torch.cat([method.network(view[:ROWS]), method.network(view[ROWS:])])
        torch.testing.assert_close(query, expected)
        others = method.network(batch.views[1 - c][ROWS:]).detach()
        assert torch.equal(comparison.bank[-8:], others) and not comparison.bank.requires_grad
        assert comparison.positive is not None and comparison.candidates is not None
        assert comparison.positive[ROWS:].tolist() == list(range(2 * ROWS, 2 * ROWS + 8))
        assert comparison.candidates.shape == (ROWS + 8, 2 * ROWS)
        assert comparison.candidates[ROWS:].all()
    assert len(method.query(batch.views[2], batch)) == ROWS + 8


def test_labels_stay_out_of_the_divergence_with_prototypes_or_one_view() -> None:
    for recipe in ("swav", "instdisc"):
        method = build(recipe, stronger=True)
        batch = batch_of(method)
        assert len(method.query(batch.views[-1], batch)) == ROWS


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ClsaError, match="fewer than two classes have a label"):
        build("simclr", EXTENT._replace(labels=np.full(30, -1)))
    with pytest.raises(ClsaError, match=r"batch norm needs 16 labelled pictures a step, not 8"):
        build("moco-v2", model={"norm_groups": 8}, batch_size=16)

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa.methods.pirl import PIRL
from clsa.system.errors import ClsaError
from clsa.views import geometry, rng
from tests.support import reference
from tests.support.contract import EXTENT, ROWS, batch_of, tiny

COUNT, TEMPERATURE = 6, 0.1


def build(model: dict[str, Any] | None = None, **over: object) -> PIRL:
    method = {"num_negatives": COUNT, "temperature": TEMPERATURE, **over}
    return PIRL(tiny("pirl", method=method, model=model or {}), EXTENT).eval()


def projected_patches(method: PIRL, step: int) -> Tensor:
    """One patch at a time through encoder and heads, in float64 from the features on."""
    batch, (side, grid) = batch_of(method, step), (method.options.patch_size, method.options.grid)
    patch_layer, joint_layer = method.patch_head[0], method.jigsaw_head[0]
    rows = []
    for i, crop in enumerate(batch.views[-1]):
        slots = torch.arange(3 * grid**2)
        u = rng.uniforms(method.seed, step, batch.index[i : i + 1], rng.JIGSAW, slots)
        patches = geometry.jigsaw(crop[None], u.view(1, -1, 3), grid, side)
        with torch.no_grad():
            features = [method.network.encoder(patch[None])[0] for patch in patches]
            parts = [patch_layer(feature) for feature in features]
            row = joint_layer(torch.cat(parts)).double()
        rows.append(row / row.norm())
    return torch.stack(rows)


def test_the_second_view_is_the_crop_that_is_cut() -> None:
    image, cut = build().view_specs
    assert (image.name, image.size, image.view) == ("weak0", 16, 0)
    assert (cut.name, cut.size, cut.scale, cut.view) == ("jigsaw", 24, (0.6, 1.0), 1)
    assert cut.weak == image.weak and cut.blur == image.blur


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5])
def test_both_terms_equal_loops(weight: float) -> None:
    method, step = build(jigsaw_weight=weight), 2
    batch = batch_of(method, step)
    bank, own, candidates = method.memory.compare(batch.index, COUNT, method.seed, step)
    with torch.no_grad():
        image = method.network(batch.views[0]).double()
    losses = method(batch).losses
    terms = [
        reference.info_nce(rows, bank, own, TEMPERATURE, candidates)
        for rows in (image, projected_patches(method, step))
    ]
    assert losses["contrast"].item() == pytest.approx((1 - weight) * terms[0], rel=1e-4)
    assert losses["jigsaw"].item() == pytest.approx(weight * terms[1], rel=1e-4, abs=1e-9)


def test_weight_zero_is_the_softmax_of_own_and_drawn_rows_alone() -> None:
    """methods 3.10: equal to InstDisc's cross-entropy form, without gradient from patches."""
    method = build(jigsaw_weight=0.0)
    batch = batch_of(method, 1)
    losses = method(batch).losses
    (losses["contrast"] + losses["jigsaw"]).backward()
    total = [p.grad.clone() for p in method.network.parameters() if p.grad is not None]
    method.zero_grad()
    bank, own, _ = method.memory.compare(batch.index, COUNT, method.seed, 1)
    query = method.network(batch.views[0])
    logits = torch.cat([(query * bank[own]).sum(1, keepdim=True), query @ bank[ROWS:].T], 1)
    first = torch.zeros(ROWS, dtype=torch.int64)
    loss = torch.nn.functional.cross_entropy(logits / TEMPERATURE, first)
    assert losses["contrast"].item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    plain = [p.grad for p in method.network.parameters() if p.grad is not None]
    for a, b in zip(total, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for head in (method.patch_head, method.jigsaw_head):
        assert all(not p.grad.any() for p in head.parameters() if p.grad is not None)


@pytest.mark.parametrize("grid", [2, 3])
def test_the_joint_head_takes_all_patches_side_by_side(grid: int) -> None:
    method = build(grid=grid, jigsaw_size=8 * grid)
    patch_layer, joint_layer = method.patch_head[0], method.jigsaw_head[0]
    assert patch_layer.get_parameter("weight").shape == (16, 256)
    assert joint_layer.get_parameter("weight").shape == (16, grid**2 * 16)


def test_patches_train_the_encoder_and_their_heads_but_not_the_image_head() -> None:
    method = build()
    method(batch_of(method)).losses["jigsaw"].backward()
    for module in (method.network.encoder, method.patch_head, method.jigsaw_head):
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert all(p.grad is None or not p.grad.any() for p in method.network.projector.parameters())


def test_memory_moves_by_the_image_head_only() -> None:
    method, other = build(), build()
    for parameter in (*other.patch_head.parameters(), *other.jigsaw_head.parameters()):
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    batch = batch_of(method, 1)
    before, output, different = method.memory.rows.clone(), method(batch), other(batch)
    assert torch.equal(method.memory.rows, before)
    assert output.losses["jigsaw"] != different.losses["jigsaw"]
    method.after_step(output.state, 1)
    other.after_step(different.state, 1)
    assert torch.equal(method.memory.rows, other.memory.rows)
    with torch.no_grad():
        mean = (before[batch.index] + method.network(batch.views[0])) / 2
    wanted = torch.nn.functional.normalize(mean, dim=1)
    torch.testing.assert_close(method.memory.rows[batch.index], wanted)
    others = torch.ones(EXTENT.num_pictures, dtype=torch.bool)
    others[batch.index] = False
    assert torch.equal(method.memory.rows[others], before[others])


def test_comparison_holds_queries_of_the_image_head() -> None:
    method = build()
    batch = batch_of(method)
    (comparison,) = method(batch).comparisons
    (stream,) = comparison.queries
    query = getattr(stream, "query", stream)
    assert torch.equal(query, method.query(batch.views[0], batch))
    assert comparison.bank.shape == (ROWS + COUNT, 16)
    assert comparison.candidates is not None
    assert torch.equal(comparison.candidates, torch.eye(ROWS, dtype=torch.bool))


def test_patches_differ_at_each_step_and_are_the_same_on_replay() -> None:
    method = build()
    batch = batch_of(method)
    losses = [method(batch._replace(step=step)).losses["jigsaw"].item() for step in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
    u = rng.uniforms(method.seed, 3, batch.index, rng.JIGSAW, torch.arange(12)).view(ROWS, 4, 3)
    again = rng.uniforms(method.seed, 4, batch.index, rng.JIGSAW, torch.arange(12))
    assert not torch.equal(u, again.view(ROWS, 4, 3))


def test_chance_counts_own_and_drawn_rows() -> None:
    assert build(jigsaw_weight=0.25).landmarks.chance == pytest.approx(0.75 * math.log(1 + COUNT))


def test_patches_that_do_not_fit_are_refused_before_any_training() -> None:
    with pytest.raises(ClsaError, match="larger than a cell: 12 pixels"):
        build(patch_size=13)
    with pytest.raises(ClsaError, match="does not take views of 14 pixels"):
        build({"encoder": "vit_tiny_patch16_224"}, patch_size=14, jigsaw_size=32)

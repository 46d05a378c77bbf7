"""MoCo v3's loss and its scale, its keys, and the frozen patch embedding."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clsa.learning.optim import momentum_at
from clsa.methods.moco_v3 import MoCoV3
from clsa.options.methods import MoCoV3Options
from tests.support import reference
from tests.support.contract import EXTENT, batch_of, tiny, train


def build(recipe: str = "moco-v3", **over: Any) -> MoCoV3:
    return MoCoV3(tiny(recipe, **over), EXTENT)


def vit(**method: Any) -> MoCoV3:
    return build("moco-v3-vit", model={"encoder": "vit6-w192"}, method=method)


def test_loss_is_twice_the_temperature_times_both_directions() -> None:
    method = build(method={"temperature": 0.3}).eval()
    batch = batch_of(method)
    queries = [method.query(view, batch).detach() for view in batch.views]
    keys = [method.key_network(view).detach() for view in batch.views]
    own = torch.arange(8)
    wanted = reference.info_nce(queries[0], keys[1], own, 0.3)
    wanted += reference.info_nce(queries[1], keys[0], own, 0.3)
    assert method(batch).losses["contrast"].item() == pytest.approx(0.6 * wanted, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_equal_views_orthogonal_pictures(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """methods 3.18: CE = log(1 + (B - 1) exp(-1 / T)) for each direction."""
    method = build(method={"temperature": temperature})
    monkeypatch.setattr(method, "query", lambda view, _: torch.eye(8, 16))
    monkeypatch.setattr(method.key_network, "forward", lambda view: torch.eye(8, 16))
    entropy = math.log(1 + 7 * math.exp(-1 / temperature))
    loss = method(batch_of(method)).losses["contrast"].item()
    assert loss == pytest.approx(4 * temperature * entropy, abs=1e-6)


def test_landmarks_carry_the_scale() -> None:
    method = build(method={"temperature": 0.2})
    assert method.landmarks.chance == pytest.approx(0.8 * math.log(8))


def test_momentum_rises_along_a_cosine() -> None:
    options = MoCoV3Options(key_momentum=0.99)
    moments = [momentum_at(options, step, 1000) for step in (0, 500, 1000)]
    assert moments == pytest.approx([0.99, 0.995, 1.0], abs=1e-12)


def test_keys_are_the_other_views_without_predictor_or_gradient() -> None:
    method = build().eval()
    batch = batch_of(method)
    output = method(batch)
    output.losses["contrast"].backward()
    assert all(p.grad is None for p in method.key_network.parameters())
    with torch.no_grad():
        first, second = (method.key_network(view) for view in batch.views)
    for view, keys, comparison, wanted in zip(
        batch.views, output.state, output.comparisons, (second, first), strict=True
    ):
        assert torch.equal(keys, wanted) and not keys.requires_grad
        (query,) = comparison.queries
        assert isinstance(query, Tensor) and torch.equal(query, method.query(view, batch))
        assert torch.equal(comparison.bank, torch.cat([keys, method.queue.rows]))
        assert comparison.positive is not None
        assert torch.equal(comparison.bank[comparison.positive], keys)


def patches(method: MoCoV3) -> list[Tensor]:
    return [
        parameter.detach().clone()
        for network in (method.network, method.key_network)
        for parameter in network.encoder.get_submodule("patch_embed").parameters()
    ]


@pytest.mark.parametrize("frozen", [True, False])
def test_the_patch_embedding_keeps_its_first_weights_when_frozen(frozen: bool) -> None:
    method = vit(freeze_patches=frozen)
    before, blocks = patches(method), method.network.encoder.get_submodule("blocks")
    inner = [parameter.detach().clone() for parameter in blocks.parameters()]
    train(method, 2)
    for old, new in zip(before, patches(method), strict=True):
        assert torch.equal(old, new) == frozen
    assert not any(
        torch.equal(old, new) for old, new in zip(inner, blocks.parameters(), strict=True)
    )


def test_heads_are_those_of_the_code() -> None:
    """ResNet: projector of 2 layers, predictor without a last norm; ViT: 3 layers, with a norm."""
    for method, depth, ends in ((build(), 2, nn.Linear), (vit(), 3, nn.BatchNorm1d)):
        projector = list(method.network.projector)
        assert sum(isinstance(layer, nn.Linear) for layer in projector) == depth
        assert isinstance(projector[-1], nn.BatchNorm1d) and not projector[-1].affine
        assert sum(isinstance(layer, nn.Linear) for layer in method.predictor) == 2
        last = method.predictor[-1]
        assert isinstance(last, ends)
        assert not (isinstance(last, nn.BatchNorm1d) and last.affine)

"""Layers that bf16 gets wrong on a CPU: which they are, and that they are computed in float32."""

import copy

import pytest
import torch
from torch import nn

from clsa.learning import precision
from clsa.learning.models import build_encoder
from clsa.options.run import ModelOptions

CPU = torch.device("cpu")


def soil(count: int) -> None:
    """Leave numbers in the memory that the next tensors get."""
    used = [torch.full((size,), 1e3) for size in (count, count, count // 2, 2 * count)]
    del used


def test_a_map_narrower_than_the_stride_loses_gradients() -> None:
    conv = nn.Conv2d(4, 4, 3, stride=2, padding=1)
    assert precision.loses_gradients(conv, 1) and not precision.loses_gradients(conv, 2)
    wide = nn.Conv2d(4, 4, 7, stride=4, padding=3)
    assert precision.loses_gradients(wide, 3) and not precision.loses_gradients(wide, 4)
    assert not precision.loses_gradients(nn.Conv2d(4, 4, 3, stride=1, padding=1), 1)
    assert not precision.loses_gradients(nn.Conv2d(4, 4, 1, stride=2), 1)
    assert not precision.loses_gradients(nn.Conv2d(4, 4, 2, stride=4), 2), "no padding"
    assert not precision.loses_gradients(nn.Conv2d(4, 4, 3, 2, padding=2, dilation=2), 1)
    assert not precision.loses_gradients(nn.Conv2d(4, 4, 3, padding="same"), 1)


def test_a_resnet_loses_gradients_in_its_last_stage_at_16_pixels_only() -> None:
    encoder = build_encoder(ModelOptions(encoder="resnet18"), 0)
    assert precision.float32_layers(encoder, [32, 64]) == ()
    assert precision.float32_layers(encoder, [32, 16]) == ("layer4.0.conv1",)
    assert encoder.training and not any(m._forward_pre_hooks for m in encoder.modules())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("groups", [1, 8])
def test_gradients_of_such_a_layer_are_those_of_float32(layout: object, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, 2, 1, groups=groups)
    network = nn.Sequential(conv).to(memory_format=layout)  # pyright: ignore
    images = torch.randn(4, 8, 1, 1).bfloat16()
    exact = torch.autograd.grad(network(images.float()).square().sum(), conv.weight)[0]
    assert exact[..., 0, 0].eq(0).all() and exact[..., 1, 1].ne(0).any()
    names = precision.float32_layers(nn.Sequential(nn.Conv2d(3, 8, 1, 16), network), [16])
    precision.compute_in_float32(network, [name.removeprefix("1.") for name in names])
    copied = copy.deepcopy(conv)
    for _ in range(20):
        soil(conv.weight.numel())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = copied(images)
        assert out.dtype == images.dtype
        got = torch.autograd.grad(out.float().square().sum(), copied.weight)[0]
        assert got[..., 0, 0].eq(0).all(), "taps that see only padding"
        torch.testing.assert_close(got, exact, rtol=0.02, atol=0.02)


def test_layers_are_marked_once_and_keep_their_weights() -> None:
    encoder = build_encoder(ModelOptions(encoder="resnet18"), 0)
    before = encoder.state_dict()
    precision.compute_in_float32(encoder, ["layer4.0.conv1"])
    precision.compute_in_float32(encoder, ["layer4.0.conv1"])
    layer = encoder.get_submodule("layer4.0.conv1")
    assert type(layer).__mro__[1:3] == (precision.InFloat32, nn.Conv2d)
    assert list(encoder.state_dict()) == list(before)


def test_this_machine_computes_the_usual_layers_in_bf16() -> None:
    checks = precision.check_bf16(CPU)
    assert len({check.layer for check in checks}) == len(checks) == 7
    assert [check.layer for check in checks[:-1] if not check.is_right] == []
    assert all(check.error > 0 for check in checks), "bf16 was not used"


class Forgetful(torch.autograd.Function):
    """Doubles; in bf16 its gradient has one number that was never written."""

    @staticmethod
    def forward(ctx, x):  # pyright: ignore
        ctx.half = torch.is_autocast_enabled("cpu")
        return 2 * x

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        grad = 2 * grad
        if ctx.half:
            grad.view(-1)[0] = torch.nan
        return grad


class Faulty(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return Forgetful.apply(super().forward(input))  # pyright: ignore


def test_a_layer_with_an_unwritten_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [("sound", nn.Linear(8, 8), (4, 8)), ("faulty", Faulty(8, 8), (4, 8))]
    monkeypatch.setattr(precision, "_checked", lambda: layers)
    sound, faulty = precision.check_bf16(CPU, tries=1)
    assert sound.is_right and not faulty.is_right and faulty.error == torch.inf

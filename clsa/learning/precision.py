"""Where bf16 is wrong on a CPU: layers to compute in float32, and a test of this machine."""

import functools
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

TOLERANCE = 0.05


class InFloat32:
    """Computes a layer in float32 also under autocast: a mixin to put before its class."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """As the layer, in float32; the result has the dtype of `x`."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)  # pyright: ignore


@functools.cache
def _in_float32(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"{kind.__name__}InFloat32", (InFloat32, kind), {})


def loses_gradients(conv: nn.Conv2d, width: int) -> bool:
    """Whether oneDNN leaves entries of this layer's weight gradient unwritten in bf16.

    It does so where the map is narrower than the stride: the taps that see only padding have the
    gradient 0, which is never written (torch 2.14.1; found by trying 1,456 shapes of five kinds).
    Layers without padding and with dilation are right.

    Args:
        width: width in pixels of the map that the layer sees.
    """
    if isinstance(conv.padding, str):  # such layers have stride 1
        return False
    stride, padding, dilation = conv.stride[1], conv.padding[1], conv.dilation[1]
    return width < stride and conv.kernel_size[1] > 1 and padding > 0 and dilation == 1


@torch.no_grad()
def float32_layers(encoder: nn.Module, sizes: Iterable[int]) -> tuple[str, ...]:
    """Names of the layers whose bf16 gradients would be wrong on a CPU, in order.

    Args:
        encoder: it sees a black picture of each size, in evaluation mode.
        sizes: sides of the views in pixels. One that the encoder does not take is passed over.
    """
    found: set[str] = set()
    convolutions = {
        name: module for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d)
    }

    def look(name: str, conv: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, nn.Conv2d)
        if loses_gradients(conv, given[0].shape[-1]):
            found.add(name)

    hooks = [
        conv.register_forward_pre_hook(functools.partial(look, name))
        for name, conv in convolutions.items()
    ]
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        device = next(encoder.parameters()).device
        for size in sorted(set(sizes)):
            with suppress(RuntimeError, AssertionError, ValueError):
                encoder(torch.zeros(1, 3, size, size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return tuple(name for name in convolutions if name in found)


def compute_in_float32(encoder: nn.Module, names: Iterable[str]) -> None:
    """Have the layers of these names computed in float32 also under autocast, in place."""
    for name in names:
        layer = encoder.get_submodule(name)
        if not isinstance(layer, InFloat32):
            layer.__class__ = _in_float32(type(layer))


class Bf16Check(NamedTuple):
    """One layer in bf16 beside float32."""

    layer: str
    error: float
    """Largest distance of output and gradients from float32's, as a share of their largest."""

    @property
    def is_right(self) -> bool:
        """Whether that is rounding (about 0.01); numbers that are not finite are wrong."""
        return self.error < TOLERANCE


def _checked() -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    convolution = functools.partial(nn.Conv2d, bias=False)
    return [
        ("linear", nn.Linear(64, 32, bias=False), (16, 64)),
        ("convolution 1x1", convolution(16, 32, 1), (4, 16, 8, 8)),
        ("convolution 3x3", convolution(16, 32, 3, padding=1), (4, 16, 8, 8)),
        ("convolution 3x3, stride 2", convolution(16, 32, 3, 2, 1), (4, 16, 8, 8)),
        ("convolution 4x4, stride 4", convolution(3, 32, 4, 4), (4, 3, 16, 16)),
        ("convolution 3x3 by channel", convolution(32, 32, 3, 1, 1, groups=32), (4, 32, 8, 8)),
        ("convolution 3x3, stride 2, of one pixel", convolution(16, 32, 3, 2, 1), (4, 16, 1, 1)),
    ]


def check_bf16(device: torch.device, tries: int = 4) -> list[Bf16Check]:
    """Compute a few layers in bf16 and in float32 on this machine, forward and backward.

    The last one is known to be wrong on CPUs with torch 2.14.1; runs compute it in float32.

    Args:
        tries: how often each is computed: what is unwritten shows only where memory was used.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            Bf16Check(name, _distance(layer.to(device), shape, tries))
            for name, layer, shape in _checked()
        ]


def _distance(layer: nn.Module, shape: tuple[int, ...], tries: int) -> float:
    weight = next(layer.parameters())
    device, error = weight.device, 0.0
    seen = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact = _gradients(layer, seen.to(device), bf16=False)
    for _ in range(tries):
        used = [torch.full((size,), 1e3, device=device) for size in 4 * [weight.numel()]]
        del used
        for got, right in zip(_gradients(layer, seen.to(device), bf16=True), exact, strict=True):
            distance = (got - right).abs().max() / right.abs().max()
            error = max(error, float(distance.nan_to_num(torch.inf)))
    return error


def _gradients(layer: nn.Module, images: Tensor, bf16: bool) -> list[Tensor]:
    """Output, and gradients of its squared half with respect to images and weight."""
    images.requires_grad_()
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
        out = layer(images)
    found = torch.autograd.grad(out, [images, *layer.parameters()], out.detach())
    return [tensor.detach().float() for tensor in (out, *found)]

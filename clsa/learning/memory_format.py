"""Memory format of an encoder: channels_last where torch computes soundly in it, else plain."""

from typing import Literal

import torch
from torch import nn

Layout = Literal["channels_last", "contiguous"]
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SIMD_CHANNELS = 16


def corrupts_memory(conv: nn.Conv2d) -> bool:
    """Whether training this layer in channels_last on a CPU may write outside its tensors.

    In torch 2.14.1 (oneDNN) a 1x1 convolution with a stride and fewer input channels than a vector
    register holds does so on maps of about 96 pixels or more: the process ends by a signal, or goes
    on with damaged numbers. RepVGG-like stems have one. Plain format is sound (docs/encoders.md).
    """
    strided = conv.kernel_size == (1, 1) and max(conv.stride) > 1
    return strided and conv.groups == 1 and conv.in_channels < SIMD_CHANNELS


def suited_layout(encoder: nn.Module) -> Layout:
    """The memory format that an encoder can be trained in: channels_last, if all layers can."""
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    return "contiguous" if any(map(corrupts_memory, convolutions)) else "channels_last"


def lay_out(encoder: nn.Module, layout: Layout) -> None:
    """Put the weights of an encoder, and from now on its pictures, into a memory format."""
    encoder.to(memory_format=FORMATS[layout])  # pyright: ignore[reportCallIssue]
    hooks = encoder._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _as_contiguous]:
        del hooks[key]
    if layout == "contiguous":  # torch takes channels_last where pictures or weights are
        encoder.register_forward_pre_hook(_as_contiguous)


def layout_of(encoder: nn.Module) -> Layout:
    """The memory format that `lay_out` gave an encoder."""
    plain = any(hook is _as_contiguous for hook in encoder._forward_pre_hooks.values())
    return "contiguous" if plain else "channels_last"


def _as_contiguous(_: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (given[0].contiguous(),)

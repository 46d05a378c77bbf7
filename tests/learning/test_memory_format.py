"""The memory format of encoders: channels_last where it is sound, plain where it is not."""

import copy
from typing import get_args

import pytest
import torch
from torch import nn

from clsa.learning import memory_format
from clsa.learning.memory_format import Layout
from clsa.learning.models import build_encoder
from clsa.options.run import ModelOptions

# One encoder of each family of docs/encoders.md: those whose process a signal ended, and others.
UNSOUND = ["mobileone_s0", "fastvit_t8", "repvgg_a0"]
SOUND = ["resnet10-w32", "resnet18", "mobilenetv3_small_050", "regnetx_002", "convnext_atto",
         "vit6-w192", "ghostnet_050", "edgenext_xx_small"]  # fmt: skip


def built(name: str) -> nn.Module:
    return build_encoder(ModelOptions(encoder=name), 0)


def test_strided_1x1_convolutions_of_few_channels_are_unsound() -> None:
    assert memory_format.corrupts_memory(nn.Conv2d(3, 48, 1, stride=2))
    assert memory_format.corrupts_memory(nn.Conv2d(15, 48, 1, stride=2))
    assert not memory_format.corrupts_memory(nn.Conv2d(16, 48, 1, stride=2))
    assert not memory_format.corrupts_memory(nn.Conv2d(3, 48, 1))
    assert not memory_format.corrupts_memory(nn.Conv2d(3, 48, 3, stride=2))
    assert not memory_format.corrupts_memory(nn.Conv2d(8, 8, 1, stride=2, groups=8))


@pytest.mark.parametrize("name", UNSOUND)
def test_encoders_with_such_a_layer_compute_in_the_plain_format(name: str) -> None:
    encoder, seen = built(name), []
    assert memory_format.layout_of(encoder) == "contiguous"
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, given, out: seen.extend([*given, out]))
    images = torch.randn(2, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    copy.deepcopy(encoder)(images)
    wide = [tensor for tensor in seen if tensor.shape[1] > 1 and tensor.shape[-1] > 1]
    assert wide and all(tensor.is_contiguous() for tensor in wide)
    assert all(weight.is_contiguous() for weight in encoder.parameters())


@pytest.mark.parametrize("name", SOUND)
def test_the_others_compute_in_channels_last(name: str) -> None:
    encoder = built(name)
    assert memory_format.layout_of(encoder) == "channels_last"
    wide = [p for p in encoder.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)


def test_both_formats_give_the_same_features() -> None:
    encoder, images = built("resnet18").eval(), torch.randn(2, 3, 64, 64)
    features = []
    for layout in (*get_args(Layout), "channels_last"):
        memory_format.lay_out(encoder, layout)
        assert memory_format.layout_of(encoder) == layout
        assert len(encoder._forward_pre_hooks) == (layout == "contiguous")
        features.append(encoder(images))
    torch.testing.assert_close(features[1], features[0])
    assert torch.equal(features[2], features[0])


def test_no_dropout_is_left_where_it_is_a_function_and_not_a_layer() -> None:
    encoder, images = built("ghostnet_050").train(), torch.randn(4, 3, 32, 32)
    assert torch.equal(encoder(images), encoder(images))

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

from clsa.errors import ClsaError
from clsa.models import (
    SMALL,
    GroupedBatchNorm2d,
    Network,
    build_encoder,
    encode_shuffled,
    feature_dim,
    group_norms,
    momentum_copy,
    move_towards,
)
from clsa.options import ModelOptions


def test_grouped_norm_equals_a_loop_over_groups_and_keeps_channels_last() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    nn.init.normal_(norm.weight)
    images = torch.randn(12, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    grouped = nn.Sequential(nn.BatchNorm2d(16))
    grouped[0].load_state_dict(norm.state_dict())
    group_norms(grouped, 4)
    got = grouped(images)
    for group in range(4):
        part = images[3 * group : 3 * group + 3]
        mean = part.mean((0, 2, 3), keepdim=True)
        var = part.var((0, 2, 3), unbiased=False, keepdim=True)
        wanted = (part - mean) / (var + norm.eps).sqrt() * norm.weight.view(1, -1, 1, 1)
        torch.testing.assert_close(got[3 * group : 3 * group + 3], wanted, atol=1e-5, rtol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)
    # one group's statistics do not see another's images
    images[:3] = 100
    torch.testing.assert_close(grouped(images)[3:], got[3:], atol=1e-5, rtol=1e-5)


def test_running_statistics_move_as_far_as_plain_batch_norm_moves_them() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3))
    group_norms(module, 4)
    norm = module[0]
    images = torch.randn(2, 3, 4, 4).repeat(4, 1, 1, 1)
    norm(images)
    plain = nn.BatchNorm2d(3)
    plain(images[:2])
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    norm.eval()
    torch.testing.assert_close(
        norm(images),
        F.batch_norm(images, norm.running_mean, norm.running_var, norm.weight, norm.bias),
    )


def test_one_group_is_plain_batch_norm() -> None:
    torch.manual_seed(0)
    images, grouped, plain = torch.randn(8, 3, 4, 4), GroupedBatchNorm2d(3), nn.BatchNorm2d(3)
    assert torch.equal(grouped(images), plain(images))


def test_small_encoder_is_what_it_says() -> None:
    encoder = build_encoder(ModelOptions(encoder=SMALL), seed=0)
    stem = encoder.get_submodule("conv1")
    assert isinstance(stem, nn.Conv2d)
    assert (stem.in_channels, stem.out_channels, stem.kernel_size, stem.stride) == (
        3,
        32,
        (3, 3),
        (1, 1),
    )
    assert isinstance(encoder.get_submodule("maxpool"), nn.Identity)
    widths = [encoder.get_submodule(f"layer{i}.0.conv1").weight.shape[0] for i in (1, 2, 3, 4)]
    assert widths == [32, 64, 128, 256] and feature_dim(encoder) == 256
    assert [len(encoder.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 256)
    last_norm = encoder.get_submodule("layer1.0.bn2")
    assert torch.equal(last_norm.weight, torch.ones(32))


def test_small_stem_keeps_the_resolution_of_a_resnet() -> None:
    small = build_encoder(ModelOptions(encoder="resnet18", small_stem=True), seed=0)
    assert small.get_submodule("conv1").weight.shape == (64, 3, 3, 3)
    with torch.no_grad():
        assert small.forward_features(torch.randn(1, 3, 32, 32)).shape[-1] == 4
    with pytest.raises(ClsaError, match="not a ResNet"):
        build_encoder(ModelOptions(encoder="vit_tiny_patch16_224", small_stem=True), seed=0)


ENCODERS = ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "regnetx_002", "densenet121"]


@pytest.mark.parametrize("name", ENCODERS)
def test_any_timm_encoder_gives_features_at_all_view_sizes(name: str) -> None:
    options = ModelOptions(encoder=name, projector_hidden=32, projector_dim=16, norm_groups=2)
    network = Network(options, seed=0, sizes=[96, 224])
    assert network.training
    for size in (224, 96):
        rows = network(torch.randn(4, 3, size, size))
        assert rows.shape == (4, 16)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    width = timm.create_model(name, num_classes=0)(torch.zeros(1, 3, 224, 224)).shape[1]
    assert feature_dim(network.encoder) == width


def test_norms_with_activations_are_split_too() -> None:
    """timm's BatchNormAct2d, as in EfficientNet and RegNet, equals a loop over groups."""
    torch.manual_seed(0)
    module, plain = nn.Sequential(BatchNormAct2d(8)), BatchNormAct2d(8)
    group_norms(module, 4)
    images = torch.randn(8, 8, 4, 4)
    wanted = torch.cat([plain(images[2 * group : 2 * group + 2]) for group in range(4)])
    torch.testing.assert_close(module(images), wanted)
    assert (wanted >= 0).all()


def test_a_view_size_that_the_encoder_refuses_is_named() -> None:
    options = ModelOptions(encoder="mixer_s32_224")
    with pytest.raises(ClsaError, match="does not take views of 96 pixels"):
        Network(options, seed=0, sizes=[224, 96])


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = build_encoder(ModelOptions(encoder=SMALL), seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    again, other = (build_encoder(ModelOptions(encoder=SMALL), seed=s) for s in (3, 4))
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c)


def test_unknown_encoder_names_the_nearest() -> None:
    with pytest.raises(ClsaError, match="did you mean resnet50"):
        build_encoder(ModelOptions(encoder="resnet5O"), seed=0)


def test_momentum_copy_follows_the_closed_form() -> None:
    network, constant = nn.Linear(2, 2), nn.Linear(2, 2)
    start = network.weight.detach().clone()
    for _ in range(1000):
        move_towards(network, constant, 0.999)
    share = 0.999**1000
    assert share == pytest.approx(0.3677, abs=1e-4)
    torch.testing.assert_close(network.weight, share * start + (1 - share) * constant.weight)


def test_keys_come_back_in_order_and_their_groups_hold_other_images() -> None:
    """With frozen statistics the permutation must not be seen at all; with live ones it must."""
    options = ModelOptions(encoder=SMALL, projector_hidden=32, projector_dim=16, norm_groups=4)
    network = momentum_copy(Network(options, seed=0))
    images = torch.randn(16, 3, 16, 16)
    network.eval()
    torch.testing.assert_close(encode_shuffled(network, images, 0, 5), network(images))
    network.train()
    straight = network(images)
    shuffled = encode_shuffled(network, images, 0, 5)
    assert not torch.allclose(shuffled, straight, atol=1e-3)
    assert not shuffled.requires_grad


def test_no_encoder_draws_from_a_global_generator() -> None:
    """timm's Swin comes with stochastic depth, which no seed of ours would reach."""
    options = ModelOptions(encoder="swin_tiny_patch4_window7_224", projector_hidden=32)
    network, images = Network(options, seed=0), torch.randn(2, 3, 224, 224)
    torch.manual_seed(1)
    first = network(images)
    assert network.training and torch.equal(first, network(images))


def test_norms_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ClsaError, match="BatchNorm1d cannot be split"):
        Network(ModelOptions(encoder="levit_128s"), seed=0)

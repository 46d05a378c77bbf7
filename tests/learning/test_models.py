import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.distributed as td
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.multiprocessing import spawn

from clsa.learning.models import (
    GROUPED,
    SHARED,
    SMALL,
    SMALL_VIT,
    GroupedBatchNorm2d,
    Network,
    build_encoder,
    build_predictor,
    encode_shuffled,
    feature_dim,
    group_norms,
    mlp,
    momentum_copy,
    move_towards,
)
from clsa.options.run import ModelOptions
from clsa.system import dist
from clsa.system.errors import ClsaError
from clsa.views import rng


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


def test_vectors_are_normalised_in_groups_too() -> None:
    torch.manual_seed(0)
    module, plain, rows = nn.Sequential(nn.BatchNorm1d(5)), nn.BatchNorm1d(5), torch.randn(12, 5)
    group_norms(module, 3)
    wanted = torch.cat([plain(rows[4 * group : 4 * group + 4]) for group in range(3)])
    torch.testing.assert_close(module(rows), wanted)


def test_each_norm_is_replaced_by_its_counterpart() -> None:
    for num_groups, kinds in ((1, SHARED), (4, GROUPED)):
        module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), BatchNormAct2d(2))
        group_norms(module, num_groups)
        assert [type(norm) for norm in module] == list(kinds.values())


# ---- statistics over all processes


def _norms() -> dict[str, tuple[nn.Sequential, Tensor]]:
    """Modules of each kind of norm, each with its input for the whole batch of 8."""

    def rows(*shape: int) -> Tensor:
        drawn = torch.randn(8, *shape, generator=torch.Generator().manual_seed(3))
        return 2 * drawn * torch.linspace(0.5, 2, 8).view(8, *[1] * len(shape)) + 1

    images = rows(6, 3, 5).contiguous(memory_format=torch.channels_last)
    made: dict[str, tuple[nn.Sequential, Tensor]] = {
        "1d": (nn.Sequential(nn.BatchNorm1d(6)), rows(6)),
        "2d": (nn.Sequential(nn.BatchNorm2d(6)), images),
        "act": (nn.Sequential(BatchNormAct2d(6)), images),
        "all": (mlp((6, 7, 4), "all", seed=1), rows(6)),
        "all-scaled": (mlp((6, 7, 4), "all-scaled", seed=1), rows(6)),
    }
    for module, _ in made.values():
        for name, param in module.named_parameters():
            if param.ndim == 1:  # so that scales and shifts matter
                seed = sum(map(ord, name))
                drawn = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
                param.data += 0.3 * drawn
    return made


def _passes(module: nn.Module, given: Tensor, own: slice) -> dict[str, Any]:
    """Two train-mode passes over own rows, all gradients of a loss, then one in eval mode."""
    module(0.5 * given[own] - 1)
    rows = given[own].clone(memory_format=torch.preserve_format).requires_grad_()
    found = module(rows)
    weights = torch.randn((8, *found.shape[1:]), generator=torch.Generator().manual_seed(9))
    (weights[own] * found**2).sum().backward()
    gradients = {name: param.grad for name, param in module.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    after = module.eval()(given[own]).detach()
    return {"outputs": found.detach(), "rows": rows.grad, "gradients": gradients,
            "buffers": buffers, "after": after}  # fmt: skip


def _share(rank: int, world: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    result, count = {}, 8 // world
    for name, (module, given) in _norms().items():
        group_norms(module, 1)
        result[name] = _passes(module, given, slice(count * rank, count * rank + count))
        for gradient in result[name]["gradients"].values():
            gradient.copy_(dist.all_sum(gradient))
    halves = nn.Sequential(nn.BatchNorm2d(6))  # as many groups as processes: one for each
    group_norms(halves, world)
    given = _norms()["2d"][1]
    result["halves"] = {"outputs": halves(given[count * rank : count * rank + count]).detach()}
    torch.save(result, f"{out}/{rank}")
    td.destroy_process_group()


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of two processes with four rows each."""
    out = tmp_path_factory.mktemp("shares")
    spawn(_share, (2, str(out / "rendezvous"), str(out)), nprocs=2)
    return [torch.load(out / f"{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", ["1d", "2d", "act", "all", "all-scaled"])
def test_norms_over_two_processes_equal_plain_norms_of_the_whole_batch(
    kind: str, shares: list[dict[str, Any]]
) -> None:
    module, given = _norms()[kind]
    whole = _passes(module, given, slice(None))
    assert whole["gradients"]
    for name in ("outputs", "rows", "after"):
        both = torch.cat([share[kind][name] for share in shares])
        torch.testing.assert_close(both, whole[name], rtol=1e-4, atol=1e-5)
        assert both.is_contiguous(memory_format=torch.channels_last) or both.ndim == 2, name
    for part in ("gradients", "buffers"):
        for share in shares:
            assert share[kind][part].keys() == whole[part].keys()
            for name, wanted in whole[part].items():
                got = share[kind][part][name]
                assert torch.equal(got, shares[0][kind][part][name]), name
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_with_as_many_groups_as_processes_each_has_its_own(shares: list[dict[str, Any]]) -> None:
    given = _norms()["2d"][1]
    for rank, share in enumerate(shares):
        plain = nn.BatchNorm2d(6)
        torch.testing.assert_close(
            share["halves"]["outputs"], plain(given[4 * rank : 4 * rank + 4])
        )


# ---- heads


HEADS: dict[str, tuple[Callable[[], nn.Sequential], list[str]]] = {
    "identity": (lambda: mlp((5,)), []),
    "one": (lambda: mlp((5, 3)), ["Linear"]),
    "one, normed": (lambda: mlp((5, 3), "all"), ["Linear", "BatchNorm1d"]),
    "plain": (lambda: mlp((5, 4, 3)), ["Linear", "ReLU", "Linear"]),
    "gelu": (lambda: mlp((5, 4, 3), activation="gelu"), ["Linear", "GELU", "Linear"]),
    "hidden": (
        lambda: mlp((5, 4, 4, 3), "hidden"),
        ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"],
    ),
    "all": (
        lambda: mlp((5, 4, 3), "all"),
        ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_these_layers(name: str) -> None:
    head = HEADS[name][0]()
    assert [type(module).__name__ for module in head] == HEADS[name][1]
    rows = torch.randn(6, 5)
    assert torch.equal(head(rows), rows) if not len(head) else head(rows).shape == (6, 3)
    for module, after in itertools.pairwise([*head, None]):
        if isinstance(module, nn.Linear):  # a shift before batch norm would do nothing
            assert (module.bias is None) == isinstance(after, nn.BatchNorm1d)


def test_the_last_norm_has_scale_and_shift_as_the_papers_say() -> None:
    """SimSiam and MoCo v3 neither, SimCLR a scale; hidden norms have both."""
    torch.manual_seed(0)
    rows = torch.randn(16, 5)
    heads = (mlp((5, 8, 3), "all"), False), (mlp((5, 8, 3), "all-scaled"), True)
    for head, weighted in heads:
        hidden, last = (module for module in head if isinstance(module, nn.BatchNorm1d))
        assert hidden.weight is not None and hidden.bias is not None
        assert (last.weight is not None) == weighted and last.bias is None
        found = head(rows)
        torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
        torch.testing.assert_close(found.var(0, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)
        assert ("4.weight" in head.state_dict()) == weighted and "4.bias" not in head.state_dict()
        head.load_state_dict(head.state_dict())


def test_heads_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    drawn = (next(mlp((5, 4, 3), "hidden", seed=seed).parameters()) for seed in (3, 3, 4))
    first, again, other = drawn
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("layers", "dim"), [(0, 256), (1, 16), (2, 16), (3, 16)])
def test_a_networks_rows_are_its_projections_of_unit_length(layers: int, dim: int) -> None:
    options = ModelOptions(
        encoder=SMALL, projector_layers=layers, projector_hidden=24, projector_dim=16,
        projector_norm="all", norm_groups=2,
    )  # fmt: skip
    network, images = Network(options, seed=0), torch.randn(4, 3, 16, 16)
    projections = network.project(images)
    assert network.dim == dim and projections.shape == (4, dim)
    linear = [module for module in network.projector if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in linear] == [24, 24, 16][3 - layers :]
    norms = [module for module in network.projector if isinstance(module, nn.BatchNorm1d)]
    assert [type(norm) for norm in norms] == [GROUPED[nn.BatchNorm1d]] * layers
    torch.testing.assert_close(network.eval()(images), F.normalize(network.project(images), dim=1))


def test_a_predictor_has_the_norms_of_its_network() -> None:
    for groups, kinds in ((1, SHARED), (4, GROUPED)):
        options = ModelOptions(norm_groups=groups)
        predictor = build_predictor(options, 6, 5, "hidden", seed=0)
        assert [type(m) for m in predictor] == [
            nn.Linear, kinds[nn.BatchNorm1d], nn.ReLU, nn.Linear,
        ]  # fmt: skip
        assert predictor(torch.randn(8, 6)).shape == (8, 6)
        assert vars(predictor[1]).get("groups") == groups


def test_the_small_transformer_takes_views_of_several_sizes() -> None:
    encoder = build_encoder(ModelOptions(encoder=SMALL_VIT), seed=0)
    assert feature_dim(encoder) == 192 and len(encoder.get_submodule("blocks")) == 6
    for size in (32, 16):
        assert encoder(torch.randn(2, 3, size, size)).shape == (2, 192)


def test_small_encoder_has_the_documented_layers() -> None:
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
    """The permutation must not change keys with frozen statistics, but must with live ones."""
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


def test_the_two_views_of_a_symmetric_step_are_shuffled_apart() -> None:
    options = ModelOptions(encoder=SMALL, projector_hidden=32, projector_dim=16, norm_groups=4)
    network = momentum_copy(Network(options, seed=0))
    images, streams = torch.randn(16, 3, 16, 16), (rng.PERMUTATION, rng.SECOND_PERMUTATION)
    first, second = (encode_shuffled(network, images, 0, 5, stream) for stream in streams)
    assert not torch.allclose(first, second, atol=1e-3)
    network.eval()
    first, second = (encode_shuffled(network, images, 0, 5, stream) for stream in streams)
    torch.testing.assert_close(first, second)


def test_no_encoder_draws_from_a_global_generator() -> None:
    """timm's Swin has stochastic depth, which would draw from a generator that we do not seed."""
    options = ModelOptions(encoder="swin_tiny_patch4_window7_224", projector_hidden=32)
    network, images = Network(options, seed=0), torch.randn(2, 3, 224, 224)
    torch.manual_seed(1)
    first = network(images)
    assert network.training and torch.equal(first, network(images))


def test_norms_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ClsaError, match=r"norm_groups 4 - .*BatchNorm3d cannot be split"):
        group_norms(nn.Sequential(nn.BatchNorm3d(2)), 4)
    group_norms(nn.Sequential(nn.BatchNorm3d(2)), 1)


def test_encoders_with_norms_of_vectors_are_split_too() -> None:
    network = Network(ModelOptions(encoder="levit_128s", norm_groups=2), seed=0)
    kinds = {type(module) for module in network.modules()}
    assert GROUPED[nn.BatchNorm1d] in kinds and not kinds & {nn.BatchNorm1d, nn.BatchNorm2d}
    assert network(torch.randn(4, 3, 224, 224)).shape == (4, 128)

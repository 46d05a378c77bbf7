"""Encoders (timm), small-image stem, projector, momentum copy, batch norm in groups."""

import copy
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from clsa.learning.memory_format import lay_out, suited_layout
from clsa.options.config import nearest
from clsa.options.run import ModelOptions
from clsa.system import dist
from clsa.system.errors import ClsaError, first_line
from clsa.system.machine import upload
from clsa.views import rng

Copied = TypeVar("Copied", bound=nn.Module)
SMALL, SMALL_VIT = "resnet10-w32", "vit6-w192"


class InGroups:
    """Batch norm whose training statistics are taken per contiguous group of the batch.

    One device then behaves like `groups` devices with their own batch norm each; otherwise MoCo
    leaks the positive through the statistics. Memory format is kept. This is a mixin to put before
    a class of batch norm; `group_norms` sets the groups.
    """

    groups = 1

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        """Normalise; with running statistics in eval mode, by group in train mode."""
        normalise = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        if not self.training or self.groups == 1:  # pyright: ignore[reportAttributeAccessIssue]
            return normalise(x)
        sizes = [(len(x) + place) // self.groups for place in range(self.groups)]
        # split instead of tensor_split: its backward is one cat, not a filled tensor per group
        return torch.cat([normalise(part) for part in x.split(sizes)])


class OverRanks:
    """Batch norm whose training statistics are taken over the batches of all processes.

    torch's SyncBatchNorm runs only on GPUs. This one calls `dist.all_sum` for the mean and then for
    the squared distances from it, so gradients cross processes too.
    """

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        """Normalise; with running statistics in eval mode, over all processes in train mode."""
        norm = cast(nn.BatchNorm2d, self)
        if not norm.training or dist.world_size() == 1:
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        wide, dims = x.float(), [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        own = wide.new_full(
            (1,), x.numel() // x.shape[1]
        )  # picture sizes and numbers of RoIs may differ between processes
        total = dist.all_sum(torch.cat([wide.sum(dims), own]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - mean.view(shape)
        variance = dist.all_sum(centred.square().sum(dims)) / count
        with torch.no_grad():
            momentum = float(cast(float, norm.momentum))
            cast(Tensor, norm.running_mean).lerp_(mean, momentum)
            cast(Tensor, norm.running_var).lerp_(
                variance * (count / (count - 1).clamp(min=1)), momentum
            )
            cast(Tensor, norm.num_batches_tracked).add_(1)
        scaled = centred * torch.rsqrt(variance + norm.eps).view(shape)
        if norm.weight is not None:
            scaled = scaled * norm.weight.view(shape)
        if norm.bias is not None:
            scaled = scaled + norm.bias.view(shape)
        if isinstance(norm, BatchNormAct2d):
            scaled = cast(nn.Module, norm.act)(cast(nn.Module, norm.drop)(scaled))
        return scaled.to(x.dtype)


class GroupedBatchNorm1d(InGroups, nn.BatchNorm1d):
    """torch's batch norm of vectors, in groups."""


class GroupedBatchNorm2d(InGroups, nn.BatchNorm2d):
    """torch's batch norm in groups."""


class GroupedBatchNormAct2d(InGroups, BatchNormAct2d):
    """timm's batch norm with its activation, in groups."""


class SharedBatchNorm1d(OverRanks, nn.BatchNorm1d):
    """torch's batch norm of vectors, over all processes."""


class SharedBatchNorm2d(OverRanks, nn.BatchNorm2d):
    """torch's batch norm, over all processes."""


class SharedBatchNormAct2d(OverRanks, BatchNormAct2d):
    """timm's batch norm with its activation, over all processes."""


GROUPED = {
    nn.BatchNorm1d: GroupedBatchNorm1d,
    nn.BatchNorm2d: GroupedBatchNorm2d,
    BatchNormAct2d: GroupedBatchNormAct2d,
}
SHARED = {
    nn.BatchNorm1d: SharedBatchNorm1d,
    nn.BatchNorm2d: SharedBatchNorm2d,
    BatchNormAct2d: SharedBatchNormAct2d,
}


def group_norms(module: nn.Module, num_groups: int) -> None:
    """Let every batch norm inside `module` take its statistics over `num_groups` groups, in place.

    The groups divide the global batch, at least one per process; 1 is the whole batch, over all
    processes. The running statistics take the groups of a process in turn, with momentum
    1 - (1 - momentum)^(1/groups), so that a step moves them as far as a step of plain batch norm.
    """
    groups = max(1, num_groups // dist.world_size())
    kinds = GROUPED if num_groups > 1 else SHARED
    for child in module.modules():
        if type(child) in kinds:
            momentum = 1 - (1 - float(vars(child)["momentum"])) ** (1 / groups)
            child.__class__ = kinds[type(child)]
            vars(child).update(groups=groups, momentum=momentum)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm) and (
            num_groups > 1 or dist.world_size() > 1
        ):
            raise ClsaError(
                f"model.norm_groups {num_groups}",
                f"the encoder's {type(child).__name__} cannot be split",
                "choose another encoder, or 1 group on one process (all rows share statistics)",
            )


def build_encoder(options: ModelOptions, seed: int) -> nn.Module:
    """Encoder of `options` with random weights from `seed`: (B, 3, S, S) -> (B, F) features.

    ResNets start with ones in the last norm of each block, as torchvision's and MoCo's do; timm's
    default is zeros (`zero_init_last`). Dropout and stochastic depth are switched off: they would
    draw from a global generator, and no method here needs them. Memory format:
    `suited_layout`.

    Raises:
        ClsaError: for an unknown encoder, or a small stem on an encoder that is not a ResNet.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = _create(options.encoder, options.zero_init_last)
        if options.small_stem and options.encoder != SMALL:
            _shrink_stem(encoder, options.encoder)
    for module in encoder.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
        if hasattr(module, "drop_rate"):  # ghostnet calls F.dropout with it
            vars(module)["drop_rate"] = 0.0
    lay_out(encoder, suited_layout(encoder))
    return encoder


def _create(name: str, zero_init_last: bool) -> nn.Module:
    if name == SMALL_VIT:
        return timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=0,
            dynamic_img_size=True,
        )  # fmt: skip
    if name == SMALL:
        encoder = ResNet(
            BasicBlock,  # pyright: ignore[reportArgumentType]
            (1, 1, 1, 1), num_classes=0, stem_type="deep", stem_width=16,
            channels=(32, 64, 128, 256), zero_init_last=zero_init_last,
        )  # fmt: skip
        _shrink_stem(encoder, name)  # deep only to make timm build stage 1 for 2 x 16 channels
        return encoder
    if not timm.is_model(name):
        close = nearest(name, [SMALL, SMALL_VIT, *timm.list_models()])
        hint = f"did you mean {close}?" if close else "use a name from timm.list_models()"
        raise ClsaError(f"model.encoder {name}", "no such encoder", hint)
    extra: dict[str, Any] = {"zero_init_last": zero_init_last} if _is_resnet(name) else {}
    try:  # transformers that accept views of several sizes have this argument
        return timm.create_model(name, num_classes=0, dynamic_img_size=True, **extra)
    except TypeError:
        return timm.create_model(name, num_classes=0, **extra)


def _is_resnet(name: str) -> bool:
    return timm.model_entrypoint(name).__module__ == "timm.models.resnet"


def _shrink_stem(encoder: nn.Module, name: str) -> None:
    if not isinstance(encoder, ResNet):
        raise ClsaError("model.small_stem", f"{name} is not a ResNet", "leave the option out")
    channels = int(encoder.feature_info[0]["num_chs"])
    encoder.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.maxpool = nn.Identity()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which matrix products and convolutions run in bfloat16, if `precision` says so.

    Args:
        device: device of the tensors.
        precision: "bf16", "fp32", or "auto": bf16 if `has_bf16`.
    """
    fast = has_bf16(device) if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16; elsewhere it would be slower than float32.

    CUDA does from compute capability 8 on, CPUs with AVX512-BF16 or AMX.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return _cpu_has_bf16()


@functools.cache
def _cpu_has_bf16() -> bool:
    """Read from /proc/cpuinfo (Linux): the oldest torch that we support cannot answer this."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16"})


def mlp(
    widths: Sequence[int],
    norm: Literal["none", "hidden", "all", "all-scaled"] = "none",
    activation: Literal["relu", "gelu"] = "relu",
    seed: int = 0,
) -> nn.Sequential:
    """Linear layers from `widths[0]` to `widths[-1]` with activations between: (B, F) -> (B, D).

    Args:
        widths: one width alone gives the identity.
        norm: batch norm after no layer, the hidden layers, or all layers. The norm after the last
            layer has neither scale nor shift ("all": SimSiam, MoCo v3) or no shift ("all-scaled":
            SimCLR).
        activation: function between the layers.
        seed: seed of the weights.
    """
    modules: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for place, (wide_in, wide_out) in enumerate(itertools.pairwise(widths), 2):
            last = place == len(widths)
            normed = norm.startswith("all") or (norm == "hidden" and not last)
            modules.append(nn.Linear(wide_in, wide_out, bias=not normed))
            if normed:
                modules.append(nn.BatchNorm1d(wide_out, affine=not (last and norm == "all")))
                if last and norm == "all-scaled":
                    modules[-1].register_parameter("bias", None)
            if not last:
                modules.append(nn.ReLU(inplace=True) if activation == "relu" else nn.GELU())
    return nn.Sequential(*modules)


def build_predictor(
    options: ModelOptions, dim: int, hidden: int, norm: Literal["hidden", "all"], seed: int
) -> nn.Sequential:
    """Two layers (B, D) -> (B, D) with the network's kind of batch norm (BYOL, SimSiam)."""
    predictor = mlp((dim, hidden, dim), norm, seed=seed)
    group_norms(predictor, options.norm_groups)
    return predictor


class Network(nn.Module):
    """Encoder, projector and L2 normalisation: (B, 3, S, S) -> unit rows (B, D), float32.

    Args:
        options: what to build.
        seed: seed of the weights.
        sizes: sides of the views that the network will see, in pixels; each is tried once.

    Raises:
        ClsaError: if the encoder does not accept views of one of the sizes.
    """

    def __init__(self, options: ModelOptions, seed: int, sizes: Iterable[int] = ()):
        super().__init__()
        self.encoder = build_encoder(options, seed)
        layers, width = options.projector_layers, feature_dim(self.encoder)
        last = [options.projector_dim] if layers else []
        widths = [width, *[options.projector_hidden] * (layers - 1), *last]
        self.projector = mlp(widths, options.projector_norm, options.projector_activation, seed + 1)
        self.dim = widths[-1]
        group_norms(self, options.norm_groups)
        require_sizes(self.encoder, options.encoder, sizes)

    def project(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Projections of one view, not normalised."""
        return self.projector(self.encoder(images)).float()

    def forward(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Unit-length projections of one view."""
        return F.normalize(self.project(images), dim=1)


@torch.no_grad()
def require_sizes(encoder: nn.Module, name: str, sizes: Iterable[int]) -> None:
    """Try a view of each of these sides; raise if the encoder `name` does not accept one."""
    encoder.eval()
    for size in sorted(set(sizes)):
        try:
            encoder(torch.zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            why = f"does not take views of {size} pixels ({first_line(error)})"
            raise ClsaError(f"model.encoder {name}", why, "choose other view sizes") from None
    encoder.train()


def feature_dim(encoder: nn.Module) -> int:
    """Width F of an encoder's features."""
    width = encoder.head_hidden_size
    assert isinstance(width, int)
    return width


def momentum_copy(network: Copied) -> Copied:
    """A copy without gradients, which only `move_towards` changes."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def move_towards(
    key_network: nn.Module, network: nn.Module, momentum: float, statistics: bool = False
) -> None:
    """xi <- momentum xi + (1 - momentum) theta for all parameters.

    The copy keeps its own buffers; with `statistics`, its floating-point buffers move too.
    """
    keys, queries = list(key_network.parameters()), list(network.parameters())
    if statistics:
        pairs = zip(key_network.buffers(), network.buffers(), strict=True)
        moving = [(mine, new) for mine, new in pairs if mine.is_floating_point()]
        keys, queries = keys + [mine for mine, _ in moving], queries + [new for _, new in moving]
    torch._foreach_lerp_(keys, queries, 1 - momentum)  # pyright: ignore


@torch.no_grad()
def encode_shuffled(
    network: Network,
    images: Float[Tensor, "b 3 S S"],
    seed: int,
    step: int,
    stream: int = rng.PERMUTATION,
) -> Float[Tensor, "B D"]:
    """Keys of the global batch; each batch-norm group holds other images than the queries' group.

    MoCo's shuffle BN: permute the key images of all ranks (the same permutation on every rank, from
    the counter), encode this rank's share, gather the keys and restore their order. On one device
    the groups of `GroupedBatchNorm2d` play the part of the ranks; groups without the permutation
    would leave an image's query and key together. Unlike MoCo's code, a rank receives only the
    images that it encodes: gathering all would take 10 GB per rank on 64 GPUs with 256 pictures of
    224 pixels each. Each `stream` has its own permutations: symmetric losses encode two views per
    step.
    """
    total = len(images) * dist.world_size()
    permutation = rng.permutation(seed, step, total, stream)
    shuffled = dist.permuted(images, permutation).contiguous(memory_format=torch.channels_last)
    keys = dist.all_gather(network(shuffled))
    order = upload([permutation], images.device)[0]
    return torch.empty_like(keys).index_copy_(0, order, keys)

"""Extract features of centre crops or of strongly augmented views with a frozen encoder."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from clsa.learning.models import Network, feature_dim
from clsa.loading.crops import Cuts
from clsa.loading.loader import EVAL_CHUNK, eval_crops, eval_images
from clsa.options.run import ViewOptions
from clsa.pictures.sources import Source
from clsa.runs import digests
from clsa.system import dist
from clsa.system.errors import ClsaError, Exit
from clsa.system.machine import upload
from clsa.views import color, transform
from clsa.views.specs import ViewSpec, strong_eval_spec


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Hold an encoder in evaluation mode without gradients; restore every module's mode at the end.

    Raises:
        ClsaError: 76 if a weight or a buffer changed meanwhile, even by a bit.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    before = digests.digest(encoder.state_dict())
    encoder.eval()
    compiled = [(module, module._compiled_call_impl) for module in encoder.modules()]
    for module, _ in compiled:
        module._compiled_call_impl = None  # compiled code is for training only
    try:
        with torch.no_grad():
            yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
        for module, training in modes:
            module.training = training
    if digests.digest(encoder.state_dict()) != before:
        why = "its layers change in evaluation mode too"
        raise ClsaError("evaluation changed the encoder", why, "use another one", Exit.UNHEALTHY)


@torch.no_grad()
def encode(
    encoder: nn.Module, images: Float[Tensor, "b 3 S S"], batch_size: int
) -> Float32[Tensor, "b F"]:
    """Features of normalised pictures, computed for at most `batch_size` at a time.

    Computed in float32 (convolutions on CUDA in TF32, torch's default), although bf16 takes 0.45 of
    the time on a CPU that supports it. The reason: features of an untrained encoder are nearly
    parallel, and on Fashion-MNIST rounding them to bf16 changed top-1 of 20-NN by 0.6 points (73.5
    to 72.9), that of logistic regression not at all.
    """
    parts = images.contiguous(memory_format=torch.channels_last).split(batch_size)
    return torch.cat([encoder(part).float() for part in parts])


def extract(
    encoder: nn.Module,
    source: Source,
    rows: Int64[np.ndarray, "n"],
    options: ViewOptions,
    device: torch.device,
    batch_size: int = EVAL_CHUNK,
    strong_seed: int | None = None,
    shared: bool = False,
) -> tuple[Int64[np.ndarray, "m"], Float32[Tensor, "m F"]]:
    """Features of the given pictures; call it inside `frozen(encoder)`.

    Args:
        rows: numbers of pictures in the source.
        options: side and centre crop of the pictures, scale of strong crops.
        batch_size: number of pictures encoded at a time.
        strong_seed: if given, draw one strong view of each picture (`specs.strong_eval_spec`,
            epoch 0) with this seed, instead of its centre crop.
        shared: all processes call this together; each encodes a share, and all return the whole.

    Returns:
        Numbers of the readable pictures, in order, and their features on the device.

    Raises:
        ClsaError: 65 if none of the pictures can be read.
    """
    own = _share(rows) if shared else rows
    if strong_seed is None:
        images = centre_views(source, own, options, device)
    else:
        spec = strong_eval_spec(options)
        images = drawn_views(source, own, spec, strong_seed, device)
    kept, features = [np.zeros(0, np.int64)], []
    for numbers, batch in images:
        kept.append(numbers)
        features.append(encode(encoder, batch, batch_size))
    numbers = np.concatenate(kept)
    found = torch.cat(features or [torch.zeros(0, feature_dim(encoder), device=device)])
    if shared:
        numbers, found = _gathered(numbers, found, len(_share(rows, rank=0)))
    if not len(numbers):
        why = f"none of its {len(rows)} pictures can be read"
        raise ClsaError("nothing to evaluate", why, "check the data", Exit.BAD_DATA)
    return numbers, found


def _share(rows: Int64[np.ndarray, "n"], rank: int | None = None) -> Int64[np.ndarray, "b"]:
    """A process's contiguous share, in whole chunks, so that batches are the same as on one."""
    chunks = -(-len(rows) // EVAL_CHUNK)
    size = -(-chunks // dist.world_size()) * EVAL_CHUNK
    return rows[(dist.rank() if rank is None else rank) * size :][:size]


def _gathered(
    numbers: Int64[np.ndarray, "b"], found: Float32[Tensor, "b F"], room: int
) -> tuple[Int64[np.ndarray, "m"], Float32[Tensor, "m F"]]:
    """Join the shares of all processes in order; each share has at most `room` rows."""
    if dist.world_size() == 1:
        return numbers, found
    padded = found.new_zeros(room, found.shape[1])
    padded[: len(found)] = found
    places = torch.full((room,), -1, dtype=torch.int64)
    places[: len(numbers)] = torch.from_numpy(numbers)
    places = dist.all_gather(places.to(found.device)).cpu().numpy()
    everything = dist.all_gather(padded)
    return places[places >= 0], everything[torch.from_numpy(places >= 0).to(found.device)]


def centre_views(
    source: Source, rows: Int64[np.ndarray, "n"], options: ViewOptions, device: torch.device
) -> Iterator[tuple[Int64[np.ndarray, "b"], Float32[Tensor, "b 3 S S"]]]:
    """Numbers and normalised centre crops of the readable pictures."""
    for numbers, crops in eval_images(source, rows, options.size, options.eval_crop, device):
        yield numbers, color.normalize(crops / 255, transform.MEAN, transform.STD)


def projections(
    source: Source, options: ViewOptions, device: torch.device, network: Network
) -> Float32[Tensor, "n D"]:
    """Unit projections of the centre crop of every picture, in the order of the set, on the CPU.

    Each process projects a contiguous share of the set; rows of unreadable pictures are zeros.
    """
    share = -(-len(source) // dist.world_size())
    first = share * dist.rank()
    rows = np.arange(first, min(first + share, len(source)))
    found = torch.zeros(share, network.dim, device=device)
    with frozen(network):
        for numbers, images in centre_views(source, rows, options, device):
            places = upload([numbers - first], device)[0]
            found.index_copy_(0, places, encode(network, images, EVAL_CHUNK))
    return dist.all_gather(found)[: len(source)].cpu()


def drawn_views(
    source: Source,
    rows: Int64[np.ndarray, "n"],
    spec: ViewSpec,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[Int64[np.ndarray, "b"], Float32[Tensor, "b 3 S S"]]]:
    """Numbers of the readable pictures, and one view of each, drawn from (seed, epoch 0)."""

    def cut(
        index: Int64[np.ndarray, "b"],
        heights: Int64[np.ndarray, "b"],
        widths: Int64[np.ndarray, "b"],
    ) -> Cuts:
        return transform.crop_params(spec, seed, 0, index, heights, widths)

    for numbers, crops in eval_crops(source, rows, spec.size, cut, device):
        params = transform.sample(spec, seed, 0, numbers)
        yield numbers, transform.pixels(crops, params, spec)

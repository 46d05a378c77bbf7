"""Which encoders torch trains soundly on this CPU: sizes, memory formats and precisions by trial.

`python -m benchmarks.encoders [--out FILE] [NAME ...]` builds each timm encoder once and takes
three training steps of it in a child process for every size, format and precision. With glibc's
checker, writing outside a tensor ends the child by a signal even where nothing else would show it:

    LD_PRELOAD=libc_malloc_debug.so.0 MALLOC_CHECK_=3 python -m benchmarks.encoders

Outcomes: ok; signal NAME; not finite; unequal (the same step twice gives different gradients, so
one of them used memory that was never written); refused (the encoder does not take the size).
"""

import argparse
import itertools
import json
import os
import pickle
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clsa.learning.memory_format import FORMATS, lay_out
from clsa.learning.models import build_encoder
from clsa.options.run import ModelOptions

NAMES = """
mobilenetv3_small_050 mobilenetv3_small_100 lcnet_050 tinynet_e mobilenetv2_035 mnasnet_small
mobilenetv4_conv_small_035 ghostnet_050 ghostnetv2_100 efficientnet_lite0 efficientnet_b0 mixnet_s
fbnetc_100 hardcorenas_a rexnet_100 edgenext_xx_small mobilevit_xxs mobilevitv2_050 mobileone_s0
repvit_m0_9 fastvit_t8 regnetx_002 regnety_002 resnet18 repvgg_a0 convnext_atto vit_tiny_patch16_224
deit_tiny_patch16_224 mixer_s32_224 starnet_s1 semnasnet_075 resnet34 hrnet_w18_small skresnet18
vgg11_bn swin_tiny_patch4_window7_224 efficientformerv2_s0 dpn48b res2net50_14w_8s densenet121
resnext50_32x4d resnet50
"""
SIZES, PRECISIONS, LIMIT_S, STEPS = (224, 32, 96), ("fp32", "bf16"), 90, 3


def soil(encoder: nn.Module, value: float) -> None:
    """Leave `value` in the memory that the next gradients get."""
    sizes = [parameter.numel() for parameter in list(encoder.parameters())[:60]]
    used = [torch.full((size + more,), value) for size in sizes for more in (0, 64)]
    used += [torch.full((size,), value, dtype=torch.bfloat16) for size in sizes]
    del used


def gradients(encoder: nn.Module, images: Tensor, bf16: bool) -> Tensor:
    """All gradients of a sum of squared features, in one vector."""
    encoder.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        features = encoder(images).float()
    weights = torch.linspace(-1, 1, features.shape[1])
    (features * weights).sum(1).square().mean().backward()
    found = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
    return torch.cat(found).float()


def outcome(encoder: nn.Module, size: int, layout: Any, precision: str) -> str:
    """Train for three steps without moving weights; "ok", or what is wrong."""
    lay_out(encoder.train(), layout)
    torch.manual_seed(1)
    images = torch.randn(2 if size > 100 else 4, 3, size, size)
    images = images.contiguous(memory_format=FORMATS[layout])
    seen = []
    try:
        for step in range(STEPS):
            soil(encoder, (1e3, -7e2, 3.0)[step])
            seen.append(gradients(encoder, images, precision == "bf16"))
    except (RuntimeError, AssertionError, ValueError) as error:
        return f"refused ({str(error).splitlines()[0][:60]})"
    if not all(vector.isfinite().all() for vector in seen):
        return "not finite"
    return "ok" if all(torch.equal(seen[0], vector) for vector in seen) else "unequal"


def in_child(compute: Callable[[], str]) -> str:
    """What `compute` returns in a child process, or the signal that ended it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(write, pickle.dumps(compute()))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    return pickle.loads(told) if told else "error"


def trials(name: str) -> dict[str, str]:
    """Outcome of each size, format and precision of an encoder, in words such as `224 bf16`."""
    encoder, found = build_encoder(ModelOptions(encoder=name), 0), {}
    for size, layout, precision in itertools.product(SIZES, FORMATS, PRECISIONS):
        key = f"{size} {layout} {precision}"
        found[key] = in_child(lambda: outcome(encoder, size, layout, precision))  # noqa: B023
    return found


def main() -> None:
    """Try the encoders that are named, or all; a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES.split())
    parser.add_argument("--out", type=Path, help="append to this file instead of printing")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # children of a process with threads would hang
    for name in given.names:
        line = json.dumps({"name": name, **trials(name)})
        if given.out:
            with given.out.open("a") as file:
                file.write(line + "\n")
        else:
            print(line, flush=True)


if __name__ == "__main__":
    main()

"""Hours of ImageNet on several GPUs, calculated from the bytes that our step exchanges.

Only the rate of one GPU is measured, if the results have it.
"""

import math
from collections.abc import Sequence
from typing import Any

from clsa.learning.models import Network
from clsa.options.run import RunOptions
from clsa.recipes import resolve

IMAGENET, EPOCHS, PER_GPU = 1_281_167, 200, 256
# Assumed bytes per second that one GPU receives: from the 7 others of its machine, from elsewhere.
INSIDE, BETWEEN = 200e9, 25e9
CLAIM = f"steps: clsa, batch {PER_GPU}, plain: whole step"


def bytes_received(
    options: RunOptions, num_weights: int, world: int, batch: int
) -> dict[str, float]:
    """Bytes that one of `world` GPUs receives in a step with `batch` pictures of its own.

    It receives the key views that it encodes (shuffle BN) and all keys, in float32. Gradients pass
    twice around a ring.
    """
    others = (world - 1) * batch
    return {
        "key views": 4.0 * others / world * 3 * options.views.size**2,
        "keys": 4.0 * others * options.model.projector_dim,
        "gradients": 2 * (world - 1) / world * 4.0 * num_weights,
    }


def num_steps(world: int, batch: int) -> int:
    """Steps of `EPOCHS` epochs of ImageNet."""
    return EPOCHS * math.floor(IMAGENET / (world * batch))


def waiting(parts: dict[str, float], world: int) -> float:
    """Seconds of a step spent waiting for key views and keys, which overlap with no computation."""
    return (parts["key views"] + parts["keys"]) / (INSIDE if world <= 8 else BETWEEN)


def hours(parts: dict[str, float], world: int, batch: int, rate: float) -> float:
    """Hours of all steps; gradients overlap with backward, which is 2/3 of the compute."""
    compute, speed = batch / rate, INSIDE if world <= 8 else BETWEEN
    gradients = max(0.0, parts["gradients"] / speed - compute * 2 / 3)
    return num_steps(world, batch) * (compute + waiting(parts, world) + gradients) / 3600


def gpu_rate(results: Sequence[dict[str, Any]]) -> float | None:
    """Images/s of the recipe `clsa` on one GPU, not compiled, if the results have it."""
    rows = [row for result in results for row in result["rows"]]
    return next((float(row["ours"]) for row in rows if row["claim"] == CLAIM), None)


def on_paper(results: Sequence[dict[str, Any]]) -> str:
    """The section about 8 and 64 GPUs."""
    options, rate = resolve({"recipe": "clsa"}), gpu_rate(results)
    lines = [
        "## On paper: 8 and 64 GPUs",
        "",
        "**Calculated, not measured.** ResNet-50 at 224, recipe `clsa`, "
        f"{PER_GPU} pictures per GPU, {EPOCHS} epochs of ImageNet. R is the rate of one GPU in "
        "images/s. Assumed: a GPU receives "
        f"{INSIDE / 1e9:g} GB/s inside a machine of 8 and {BETWEEN / 1e9:g} GB/s between machines; "
        "the exchange of views and keys overlaps with no computation, that of gradients with "
        "backward; the input is fast enough.",
        "",
    ]
    num_weights = sum(weight.numel() for weight in Network(options.model, 0).parameters())
    for world in (8, 64):
        parts = bytes_received(options, num_weights, world, PER_GPU)
        told = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in parts.items())
        line = f"- {world} GPUs: received per step: {told}. Hours = "
        line += f"{num_steps(world, PER_GPU):,} steps x "
        line += f"({PER_GPU} / R + {1000 * waiting(parts, world):.1f} ms) / 3,600 s"
        if rate is not None:
            line += f"; with R = {rate:,.0f} as measured: {hours(parts, world, PER_GPU, rate):.1f}"
        lines.append(line + ".")
    return "\n".join(lines) + "\n"

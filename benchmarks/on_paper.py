"""Hours of ImageNet on several GPUs, calculated from the bytes that our step exchanges.

Nothing here is measured but the rate of one GPU, where benchmarks/results/gpu.json has it.
"""

import json
import math

from benchmarks.report import RESULTS
from clsa.models import Network
from clsa.options import RunOptions
from clsa.recipes import resolve

IMAGENET, EPOCHS, PER_GPU = 1_281_167, 200, 256
# Assumed bytes a second that one GPU receives: from the 7 others of its machine, from elsewhere.
INSIDE, BETWEEN = 200e9, 25e9


def bytes_received(options: RunOptions, world: int, batch: int) -> dict[str, float]:
    """Bytes that one of `world` GPUs receives in a step with `batch` pictures of its own.

    It is sent the key views that it encodes (shuffle BN) and all keys, in float32; gradients pass
    twice around a ring.
    """
    model = Network(options.model, 0)
    weights = sum(parameter.numel() for parameter in model.parameters())
    others = (world - 1) * batch
    return {
        "key views": 4.0 * others / world * 3 * options.views.size**2,
        "keys": 4.0 * others * options.model.projector_dim,
        "gradients": 2 * (world - 1) / world * 4.0 * weights,
    }


def hours(parts: dict[str, float], world: int, batch: int, rate: float) -> float:
    """Hours of `EPOCHS` epochs of ImageNet; gradients hide behind backward, 2/3 of the compute."""
    speed = INSIDE if world <= 8 else BETWEEN
    compute = batch / rate
    exchanges = (parts["key views"] + parts["keys"]) / speed
    gradients = max(0.0, parts["gradients"] / speed - compute * 2 / 3)
    steps = EPOCHS * math.floor(IMAGENET / (world * batch))
    return steps * (compute + exchanges + gradients) / 3600


def gpu_rate() -> float | None:
    """Images/s of the recipe `clsa` on one GPU, if benchmarks/gpu.py has measured it."""
    path = RESULTS / "gpu.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rates = [
        float(row["ours"])
        for row in rows
        if f": clsa, batch {PER_GPU}, " in row["claim"] and row["claim"].endswith(": whole step")
    ]
    return max(rates, default=None)


def on_paper() -> str:
    """The paragraph about 8 and 64 GPUs."""
    options, rate = resolve({"recipe": "clsa"}), gpu_rate()
    lines = [
        "**Calculated, not measured.** ResNet-50 at 224, recipe `clsa`, "
        f"{PER_GPU} pictures a GPU, {EPOCHS} epochs of ImageNet. R is the rate of one GPU in "
        "images/s. Assumed: a GPU receives "
        f"{INSIDE / 1e9:g} GB/s inside a machine of 8 and {BETWEEN / 1e9:g} GB/s between machines; "
        "views and keys hide behind nothing, gradients behind backward. Input keeps up.",
        "",
    ]
    for world in (8, 64):
        parts = bytes_received(options, world, PER_GPU)
        told = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in parts.items())
        speed = INSIDE if world <= 8 else BETWEEN
        wait = (parts["key views"] + parts["keys"]) / speed
        steps = EPOCHS * math.floor(IMAGENET / (world * PER_GPU))
        line = f"- {world} GPUs: received in a step: {told}. Hours = {steps:,} steps x "
        line += f"({PER_GPU} / R + {1000 * wait:.1f} ms) / 3,600 s"
        if rate is not None:
            line += f"; with R = {rate:,.0f} as measured: {hours(parts, world, PER_GPU, rate):.1f}"
        lines.append(line + ".")
    return "\n".join(lines)

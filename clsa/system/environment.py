"""What the last bits of a run depend on besides its options; a change of it is reported."""

import platform
from typing import Any

import torch

from clsa.system import dist


def environment(device: torch.device) -> dict[str, str | int]:
    """Torch version, number of threads and processes, processor and device of this start."""
    on_gpu = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "processes": dist.world_size(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
    }


def describe_change(before: Any, now: dict[str, str | int]) -> str:
    """One line when a run continues in another environment; empty if no difference is known.

    Args:
        before: the environment in the manifest of a checkpoint; ignored unless it is a dict.
    """
    known = before if isinstance(before, dict) else {}
    changed = [name for name in now if name in known and known[name] != now[name]]
    text = ", ".join(f"{name} {known[name]} -> {now[name]}" for name in changed)
    if "processes" in changed:
        text += "; each process has its own batch norm statistics"
    return f"bitwise equality not promised: {text}" if text else ""

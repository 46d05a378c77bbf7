"""What a run's last bits depend on besides its options: told when it changes between starts."""

import platform
from typing import Any

import torch

from clsa.system import dist


def environment(device: torch.device) -> dict[str, str | int]:
    """Version of torch, threads, processes, processor and device of this start."""
    on_gpu = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "processes": dist.world_size(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
    }


def describe_change(before: Any, now: dict[str, str | int]) -> str:
    """One line when a run goes on elsewhere; empty where nothing differs, or nothing is known.

    Args:
        before: what a manifest says of the environment, whatever that is.
    """
    known = before if isinstance(before, dict) else {}
    changed = [name for name in now if name in known and known[name] != now[name]]
    told = ", ".join(f"{name} {known[name]} -> {now[name]}" for name in changed)
    if "processes" in changed:
        told += "; batch norm's statistics are each process's own"
    return f"bitwise equality not promised: {told}" if told else ""

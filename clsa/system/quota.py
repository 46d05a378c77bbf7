"""How many cores a container or a batch system leaves to this process."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def cgroup_cores(root: Path = ROOT) -> float:
    """The tightest CPU quota on the way from this process's cgroup to the top, in cores.

    Version 2 says `QUOTA PERIOD` in cpu.max, version 1 has a file for each, both in microseconds.
    Inside a container the path of /proc/self/cgroup may be that of the host: then only the top,
    which is the container's own group, is found.

    Args:
        root: folder that stands for / (for tests).

    Returns:
        The quota; infinity where there is none.
    """
    return min(_quotas(root), default=math.inf)


def _quotas(root: Path) -> Iterator[float]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = ("cpu", controllers) if controllers else ("", "unified")
        own = PurePosixPath(path.lstrip("/"))
        for mount in dict.fromkeys(mounts):
            for group in (own, *own.parents):
                folder = root / "sys/fs/cgroup" / mount / group
                if controllers:
                    words = [_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
                else:
                    words = _text(folder / "cpu.max").split()
                with suppress(ValueError, ZeroDivisionError):  # "max", or no file
                    quota, period = map(int, words)
                    if quota > 0:
                        yield quota / period


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def slurm_cores(variables: Mapping[str, str] = os.environ) -> float:
    """Cores that SLURM gives to this task; infinity outside of SLURM.

    srun gives a task SLURM_CPUS_PER_TASK cores or, if none were asked for, its part of the node's.
    In a batch script, which starts its processes itself, they are the node's: torchrun divides
    them.
    """
    node = _number(variables.get("SLURM_CPUS_ON_NODE", ""))
    if "SLURM_STEP_ID" not in variables:
        return node
    own = _number(variables.get("SLURM_CPUS_PER_TASK", ""))
    if math.isfinite(own):
        return own
    tasks = variables.get("SLURM_STEP_TASKS_PER_NODE", variables.get("SLURM_TASKS_PER_NODE", ""))
    return node / _of_node(tasks, variables.get("SLURM_NODEID", "0"))


def _of_node(tasks: str, node: str) -> int:
    """The number of tasks on a node, from SLURM's short form: `2(x3),1` is 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    place = int(node) if node.isdecimal() else 0
    return max(1, counts[place]) if place < len(counts) else 1


def _number(text: str) -> float:
    return int(text) if text.isdecimal() and int(text) else math.inf

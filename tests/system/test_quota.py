"""Cores that a container's quota and SLURM leave, from files and variables written by hand."""

import math
from pathlib import Path

import pytest

from clsa.system import machine, quota

GROUP = "sys/fs/cgroup"


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/\n", f"{GROUP}/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", f"{GROUP}/cpu.max": "max 100000\n"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b:c\n", f"{GROUP}/a/b:c/cpu.max": "max 100000\n",
          f"{GROUP}/a/cpu.max": "200000 50000\n", f"{GROUP}/cpu.max": "900000 100000\n"}, 4.0),
        ({"proc/self/cgroup": "0::/host/path\n", f"{GROUP}/cpu.max": "50000 100000\n"}, 0.5),
        ({"proc/self/cgroup": "5:memory:/m\n3:cpu,cpuacct:/job/step\n",
          f"{GROUP}/cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1\n",
          f"{GROUP}/cpu,cpuacct/job/step/cpu.cfs_period_us": "100000\n",
          f"{GROUP}/cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n",
          f"{GROUP}/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, 3.0),
        ({"proc/self/cgroup": "2:cpuacct:/\n1:cpu:/\n0::/\n",
          f"{GROUP}/cpu/cpu.cfs_quota_us": "250000\n",
          f"{GROUP}/cpu/cpu.cfs_period_us": "100000\n",
          f"{GROUP}/cpuacct/cpu.cfs_quota_us": "100000\n"}, 2.5),
        ({"proc/self/cgroup": "1:cpu:/\n", f"{GROUP}/cpu/cpu.cfs_quota_us": "no\n"}, math.inf),
    ],
)  # fmt: skip
def test_the_tightest_quota_of_both_versions(
    files: dict[str, str], cores: float, tmp_path: Path
) -> None:
    assert quota.cgroup_cores(written(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({}, math.inf),
        ({"CPUS_ON_NODE": "8", "CPUS_PER_TASK": "2"}, 8),  # a batch script: torchrun divides
        ({"CPUS_ON_NODE": "8", "CPUS_PER_TASK": "2", "STEP_ID": "0"}, 2),
        ({"CPUS_ON_NODE": "8", "STEP_TASKS_PER_NODE": "4", "STEP_ID": "0"}, 2),
        ({"CPUS_ON_NODE": "6", "TASKS_PER_NODE": "2(x2),3", "NODEID": "1", "STEP_ID": "0"}, 3),
        ({"CPUS_ON_NODE": "6", "TASKS_PER_NODE": "2(x2),3", "NODEID": "2", "STEP_ID": "0"}, 2),
        ({"CPUS_ON_NODE": "", "STEP_ID": "0"}, math.inf),
    ],
)
def test_the_share_of_a_task_of_slurm(variables: dict[str, str], cores: float) -> None:
    given = {f"SLURM_{name}": value for name, value in variables.items()}
    assert quota.slurm_cores(given) == cores


@pytest.mark.parametrize(("limit", "cores"), [(0.3, 1), (1.4, 1), (1.5, 2), (2.6, 3), (9.0, 4)])
def test_a_quota_is_rounded_and_never_raises_the_number(
    limit: float, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(machine.quota, "cgroup_cores", lambda: limit)
    monkeypatch.setattr(machine.quota, "slurm_cores", lambda: math.inf)
    assert machine.num_cores() == cores
    monkeypatch.setattr(machine.quota, "slurm_cores", lambda: 1)
    assert machine.num_cores() == 1

from collections.abc import Callable
from pathlib import Path

import pytest

from clsa.cli.main import main
from clsa.system import slurm
from clsa.system.errors import Exit
from clsa.system.launch import stoppable
from clsa.system.signals import Asked, StopError
from tests.support.refusals import refusal

NAMES = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake scontrol, first on PATH, that notes its arguments."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "scontrol"
    path.write_text('#!/bin/sh\necho "$#:$*" >> "$0.calls"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return path


def calls(scontrol: Path) -> list[str]:
    noted = scontrol.with_suffix(".calls")
    return noted.read_text().splitlines() if noted.exists() else []


def test_a_job_and_a_task_of_an_array_are_named_as_scontrol_takes_them(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slurm.job() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "778")
    assert slurm.job() == "778"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12345")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm.job() == "12345_2"
    assert slurm.requeue() == "SLURM job 12345_2 is queued again and will resume the run"
    assert calls(scontrol) == ["2:requeue 12345_2"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("echo Access denied >&2; exit 1", "(Access denied): type scontrol requeue 7"),
        ("exit 3", "(exit code 3): type scontrol requeue 7"),
        ("exec sleep 9", "(no answer in 0 s): type scontrol requeue 7"),
    ],
)
def test_a_failed_requeue_is_reported_with_the_command_to_type(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, answer: str, message: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.4)
    scontrol.write_text(f"#!/bin/sh\n{answer}\n")
    assert message in slurm.requeue()
    scontrol.unlink()
    assert "(No such file or directory): type scontrol requeue 7" in slurm.requeue()


@pytest.mark.parametrize("kind", [Asked, lambda name: StopError("at 3", name, "go on", name)])
def test_only_usr1_within_a_job_queues_it_again(
    kind: Callable[[str], BaseException], scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(name: str) -> str:
        with pytest.raises((Asked, StopError)) as found, stoppable(None):
            raise kind(name)
        return str(found.value)

    assert "SLURM" not in message("SIGUSR1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "SLURM" not in message("SIGTERM") and calls(scontrol) == []
    assert message("SIGUSR1").endswith("; SLURM job 7 is queued again and will resume the run")
    assert calls(scontrol) == ["2:requeue 7"]


@pytest.mark.parametrize(
    ("nodes", "tasks", "line"),
    [
        ("1", "4", "srun --ntasks-per-node=1 torchrun --nproc-per-node=4 -m clsa pretrain"),
        ("2", "8", "--rdzv-endpoint=HOST:29500 --nproc-per-node=4 -m clsa pretrain"),
    ],
)
def test_tasks_of_srun_are_refused_with_the_line_to_use(
    nodes: str, tasks: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", nodes)
    text, code = refusal(lambda: slurm.require_one_task("pretrain"))
    assert f"srun started {tasks} tasks" in text and line in text and code == Exit.USAGE
    monkeypatch.setenv("RANK", "0")  # torchrun has started this process
    slurm.require_one_task("pretrain")


def test_one_task_and_batch_scripts_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    slurm.require_one_task("pretrain")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    slurm.require_one_task("pretrain")


def test_a_usage_error_is_printed_by_one_task(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    printed = []
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", task)
        code = main(["pretrain", "--data", "clipart", "--out", str(tmp_path / "run")])
        assert code == Exit.USAGE and not (tmp_path / "run").exists()
        printed.append(capsys.readouterr().err.count("error: "))
    assert printed == [1, 0]

"""SLURM: several tasks of one program are refused; a job is queued again (#SBATCH --signal)."""

import os
import shlex
import subprocess

from clsa.system.errors import ClsaError

TIMEOUT_S = 30.0


def job() -> str:
    """Number of this process's SLURM job, in the form scontrol takes; empty outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def require_one_task(command: str) -> None:
    """Refuse a program that srun started several times, unless torchrun did so inside of it.

    The tasks would not know of each other. SLURM sets SLURM_STEP_NUM_TASKS only in what srun
    starts, so a batch script of many tasks that starts one program is not concerned.

    Raises:
        ClsaError: on every task, with the line to use.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks < 2 or "RANK" in os.environ:
        return
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    meet = "--nnodes=$SLURM_NNODES --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
    start = f"torchrun {meet if nodes > 1 else ''}--nproc-per-node={-(-tasks // nodes)}"
    why = f"srun started {tasks} tasks that do not know of each other"
    hint = f"start one task on each node: srun --ntasks-per-node=1 {start} -m clsa {command} ..."
    raise ClsaError(f"clsa {command}", why, hint)


def is_first_task() -> bool:
    """Whether this is the one process, of those that torchrun or srun started, that prints."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def requeue() -> str:
    """Ask SLURM once to queue this job again; returns a sentence for the user: the result.

    If SLURM does not requeue the job, the sentence names the command to type.
    """
    command = ["scontrol", "requeue", job()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        why = f"no answer in {TIMEOUT_S:.0f} s"
    except OSError as error:
        why = error.strerror or "it cannot be started"
    else:
        if not done.returncode:
            return f"SLURM job {job()} is queued again and will resume the run"
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"SLURM did not queue the job again ({why}): type {shlex.join(command)}"

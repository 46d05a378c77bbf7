"""Put the job back into SLURM's queue after a warning that its time is up (#SBATCH --signal)."""

import os
import shlex
import subprocess

TIMEOUT_S = 30.0


def job() -> str:
    """Number of this process's SLURM job, in the form scontrol takes; empty outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


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

"""A job that Slurm ends before the training does goes on by itself.

Lightning has this too, but saves from within the signal's handler, in the middle of whatever was going on: what was
saved there is not a place that training passes through.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

REQUEUE_SIGNAL = signal.SIGUSR1
"""Sent before the time is up by ``#SBATCH --signal=USR1@90``."""


def requeues() -> bool:
    """Return whether this process is part of a Slurm job that is to be queued again."""
    return "SLURM_JOB_ID" in os.environ


def restarted() -> bool:
    """Return whether this is a job that was queued again, whose command must go on instead of beginning."""
    return requeues() and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def job() -> str:
    """Return the number of the job, or of its part of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def requeue() -> None:
    """Have the job queued again; a line says so, or why not."""
    try:
        subprocess.run(["scontrol", "requeue", job()], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        print(f"Slurm job {job()} could not be queued again: {said.strip()}", file=sys.stderr)
    else:
        print(f"Slurm job {job()} is queued again", file=sys.stderr)

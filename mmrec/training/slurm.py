"""Slurm: a job whose time is up before the training has ended is queued again, and resumes.

Lightning has this too, but saves from within the signal's handler, in the middle of whatever was going on: what was
saved there is not a place that training passes through (Lightning issue 21406).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

REQUEUE_SIGNAL: int = getattr(signal, "SIGUSR1", 0)
"""Sent before the time is up by ``#SBATCH --signal=USR1@90``; 0 where there is no such signal (Windows)."""


@dataclass(frozen=True)
class Job:
    """A job of Slurm.

    Args:
        name: its number, or that of its part of an array, as ``scontrol`` takes it.
        restarted: whether it was queued again: its command has to resume instead of beginning.
    """

    name: str
    restarted: bool = False


def current_job(environment: Mapping[str, str] = os.environ) -> Job | None:
    """Return the job that this process is part of, or None where it is part of none."""
    number = environment.get("SLURM_JOB_ID")
    if number is None:
        return None
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
    return Job(f"{array}_{task}" if array and task else number, restarts > 0)


def requeue(job: Job) -> None:
    """Have ``job`` queued again; a line says so, or why not."""
    try:
        subprocess.run(["scontrol", "requeue", job.name], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        print(f"Slurm job {job.name} could not be queued again: {reason.strip()}", file=sys.stderr)
    else:
        print(f"Slurm job {job.name} is queued again", file=sys.stderr)

"""Where the shards are worked on: datatrove's executors, on this machine, on a Ray cluster, or under Slurm."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmrec.core.errors import UserError
from mmrec.core.optional import optional_import
from mmrec.data.pipeline.tokenize_shard import read_json, stem, tokenize_shard

TASKS_OF_A_WORKER = 64
"""Of this machine, where there are more shards: enough that all workers end at about the same time."""


class Tokenize:
    """A step of a datatrove pipeline: task ``rank`` does the shards rank, rank + world_size, ...

    Args:
        work: the work folder; every machine sees it under this name.
        shards: number of shards in its plan.
    """

    name = "mmrec tokenize"
    type = "tokenizer"

    def __init__(self, work: str, shards: int) -> None:
        self.work = work
        self.shards = shards
        self.stats = optional_import("datatrove.utils.stats").Stats(self.name)

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        for number in range(rank, self.shards, world_size):
            tokenize_shard(Path(self.work), number)


def run_shards(work: Path, shards: int, executor: str, workers: int, options: dict[str, str]) -> bool:
    """Do the shards of a plan that are not done; return whether all are done then.

    Args:
        work: the work folder, with its plan and tokenizer.
        shards: number of shards.
        executor: one of :data:`mmrec.data.options.EXECUTORS`.
        workers: tasks at once.
        options: of Slurm: partition, time, and what else sbatch takes.

    Raises:
        UserError: a shard cannot be read (the first of these is named), or a package is missing.
    """
    missing = missing_shards(work, shards)
    if missing:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
        logs = work.absolute() / "logs"  # fsspec keeps a relative path as what it first meant
        shutil.rmtree(logs, ignore_errors=True)
        common: dict[str, Any] = {"pipeline": [Tokenize(str(work.absolute()), shards)], "logging_dir": str(logs)}
        with _watched(work, shards):
            START[executor](common, min(shards, 10_000), workers, options)
        if executor == "slurm":
            return False
    failed = sorted(work.glob("*.failed"))
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(f"{read_json(failed[0])}{more}; what is done is kept for the next run")
    missing = missing_shards(work, shards)
    if missing:
        log = work / "executor.log"
        raise UserError(f"{len(missing)} of {shards} shards were not done ({log}); run the same command to go on")
    return True


def missing_shards(work: Path, shards: int) -> list[int]:
    """Return the numbers of the shards that are not done."""
    done = {path.name for path in work.glob("*.json")}
    return [number for number in range(shards) if f"{stem(number)}.json" not in done]


def _run_local(common: dict[str, Any], tasks: int, workers: int, options: dict[str, str]) -> None:
    executor = optional_import("datatrove.executor.local").LocalPipelineExecutor
    # A task costs as much as a small file, so that many of these are a task.
    executor(**common, tasks=min(tasks, TASKS_OF_A_WORKER * workers), workers=workers).run()


def _run_ray(common: dict[str, Any], tasks: int, workers: int, options: dict[str, str]) -> None:
    ray = optional_import("ray")
    # Of a running cluster where RAY_ADDRESS names one, else of one that is started here.
    ray.init(
        address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True
    )
    executor = optional_import("datatrove.executor.ray").RayPipelineExecutor
    executor(**common, tasks=tasks, workers=workers, mem_per_cpu_gb=1).run()


def _run_slurm(common: dict[str, Any], tasks: int, workers: int, options: dict[str, str]) -> None:
    """Hand the tasks to Slurm and return: they run when their turn comes."""
    if shutil.which("sbatch") is None:
        raise UserError("--executor slurm needs Slurm's sbatch, which is not on this machine; run it on a login node")
    executor = optional_import("datatrove.executor.slurm").SlurmPipelineExecutor
    environment = f"export PATH={Path(sys.executable).parent}:$PATH"
    executor(**common, tasks=tasks, workers=workers, env_command=environment, job_name="mmrec", **options).run()


START: dict[str, Callable[[dict[str, Any], int, int, dict[str, str]], None]] = {
    "local": _run_local,
    "ray": _run_ray,
    "slurm": _run_slurm,
}


@contextmanager
def _watched(work: Path, shards: int) -> Iterator[None]:
    """Show how many shards are done, whoever does them; what the executors say goes to a file of the logs."""
    sys.stderr.flush()
    screen = os.dup(2)
    stopped = threading.Event()
    with (
        open(work / "executor.log", "wb") as log,
        open(screen, "w", encoding="utf-8") as terminal,
        tqdm(total=shards, unit="shard", desc="tokenizing", disable=not terminal.isatty(), file=terminal) as bar,
    ):

        def update() -> None:
            bar.update(shards - len(missing_shards(work, shards)) - bar.n)

        def watch() -> None:
            while not stopped.wait(0.5):
                update()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        os.dup2(log.fileno(), 2)  # the workers inherit it, whatever they make of Python's sys.stderr
        try:
            with open(work / "executor.log", "a", encoding="utf-8") as own, redirect_stderr(own):
                yield
                optional_import("loguru").logger.remove()
        finally:
            os.dup2(screen, 2)
            stopped.set()
            thread.join()
            update()

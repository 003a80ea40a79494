#!/usr/bin/env python3
"""The whole way with a large corpus: prepare, fit on two processes, kill -9 in the middle, go on, validate.

    python scripts/end_to_end.py FOLDER [--megabytes 2000] [--updates 200]

A training that is never stopped runs beside it as the measure: the exit status is 0 only where the weights of both
are equal to the last bit. FOLDER must be new; about nine times the size of the text is written there, at most.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure_corpora import documents, write_shards

ROOT = Path(__file__).resolve().parent.parent
SAVES = 20
"""Saves of a training: the kill comes after the half of them."""


def run(folder: Path, *args: object, kill: Callable[[], bool] | None = None) -> tuple[float, int, str]:
    """Run an mmrec command in ``folder`` to its end, or kill it with all its processes once ``kill`` says so.

    Returns:
        Its seconds, the largest resident size of any of its processes in bytes, and what it printed.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output, began = folder / "output.txt", time.monotonic()
    with open(output, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmrec", *map(str, args)],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if kill is not None and kill():
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.2)
    _, status, used = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (0 if kill is None else -signal.SIGKILL):
        sys.exit(f"mmrec {args[0]} ended with status {process.returncode}:\n{output.read_text()[-2000:]}")
    return time.monotonic() - began, used.ru_maxrss * 1024, output.read_text()


def saved(folder: Path, name: str) -> dict[str, Any]:
    """Return the weights and, as "step", the number of updates of the last checkpoint of a run; none, step 0."""
    # Only here: a process that this one starts begins with this one's size, and that would count as its own.
    import torch

    path = folder / "lightning_logs" / name / "checkpoints" / "last.ckpt"
    if not path.exists():
        return {"step": 0}
    checkpoint = torch.load(path, weights_only=True)
    return {"step": checkpoint["global_step"], **checkpoint["state_dict"]}


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=2000, help="of text; %(default)s")
    parser.add_argument("--updates", type=int, default=200, help="of each training; %(default)s")
    asked = parser.parse_args(args)
    folder, updates = asked.folder, asked.updates
    folder.mkdir(parents=True)

    def show(what: str, seconds: float, memory: int | None, said: str) -> None:
        largest = "" if memory is None else f"{memory / 2**20:,.0f}"
        print(f"| {what} | {seconds:.0f} | {largest} | {said} |", flush=True)

    print("| what | seconds | largest process, MiB | |\n|---|---|---|---|")
    began = time.monotonic()
    size = write_shards(folder / "text", documents([], asked.megabytes * 10**6), 16)
    show("text", time.monotonic() - began, None, f"{size:,} bytes in 16 files of JSON lines")
    seconds, memory, _ = run(folder, "prepare", "text", "--output_dir", "tokens")
    tokens = sum((folder / "tokens" / f"{part}.bin").stat().st_size for part in ("train", "val"))
    show("prepare", seconds, memory, f"{tokens:,} bytes of tokens")

    bound = "--trainer.limit_val_batches=20"
    fit = ["fit", "-c", "quickstart", "--data.data_dir=tokens", f"--trainer.max_steps={updates}", bound]
    fit += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    fit += [f"--trainer.val_check_interval={updates // 2}", f"--last.every_n_train_steps={updates // SAVES}"]
    fit += ["--trainer.enable_progress_bar=false"]
    show(f"fit, {updates} updates", *run(folder, *fit, "--run=whole")[:2], "never stopped")
    half = updates // 2
    seconds, memory, _ = run(folder, *fit, "--run=parts", kill=lambda: saved(folder, "parts")["step"] >= half)
    show("the same, killed", seconds, memory, f"kill -9 of all its processes; {saved(folder, 'parts')['step']} kept")
    show("gone on with", *run(folder, *fit, "--run=parts", "--ckpt_path=last")[:2], "--ckpt_path last")
    seconds, memory, said = run(folder, "validate", "--run=parts", "--ckpt_path=last", bound)
    show("validate", seconds, memory, next(line for line in said.splitlines() if "nats" in line).strip())

    whole, parts = saved(folder, "whole"), saved(folder, "parts")
    names = whole.keys() - {"step"}
    equal = whole.keys() == parts.keys() and all(bool((whole[name] == parts[name]).all()) for name in names)
    print(f"the weights after {whole['step']} and {parts['step']} updates are {'equal' if equal else 'NOT equal'}")
    return 0 if equal and whole["step"] == updates else 1


if __name__ == "__main__":
    sys.exit(main())

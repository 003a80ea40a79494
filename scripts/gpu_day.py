"""All that a lent GPU is to say, in less than ten minutes and without a network.

``python scripts/gpu_day.py --data_dir data/tiny_shakespeare`` runs each stage in a process of its own, with a time
limit of its own, and writes what it found to ``STAGE.json`` after every row: a stage that its limit ends, or the end
of the loan, leaves what it had. ``--toy`` rehearses all of it at sizes that a CPU computes in a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mmrec.bench.compare import machine
from mmrec.bench.gpu_stages import STAGES, Day, names
from mmrec.core.devices import find_device
from mmrec.core.errors import UserError, exit_status, nearest, one_line
from mmrec.core.files import write_file
from mmrec.core.runtime import configure

GRACE = 5.0
"""Seconds between the deadline of a stage, after which it begins nothing more, and the end of its process."""


def parse(args: list[str]) -> argparse.Namespace:
    """Return the options; UserError where a stage has no such name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all if none is named")
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data/tiny_shakespeare"), help="tokens of mmrec prepare"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("gpu_day"), help="folder for the results")
    parser.add_argument("--device", default="cuda", help="auto, cpu, cuda, mps or cuda:NUMBER")
    parser.add_argument("--toy", action="store_true", help="rehearse every stage at a toy size")
    parser.add_argument("--limit", type=float, help="seconds of each stage, in place of its own limit")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in the process of the stage
    options = parser.parse_args(args)
    for name in options.stages:
        if name not in STAGES:
            raise UserError(f"no stage {name!r}; known: {', '.join(STAGES)}{nearest(name, STAGES)}")
    return options


def gpu_day(args: list[str]) -> None:
    """Run the stages that ``args`` name."""
    options = parse(args)
    chosen = names(options.stages)
    if options.here:
        (name,) = chosen
        run_stage(name, make_day(options, options.limit or STAGES[name][1]))
        return
    find_device(options.device)  # said once, before anything is begun
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        print(f"{name}: {_in_process(name, options, args)}", flush=True)


def _in_process(name: str, options: argparse.Namespace, args: list[str]) -> str:
    """Run a stage in a process of its own, and return in a line how it ended."""
    limit, started = options.limit or STAGES[name][1], time.monotonic()
    passed_on = [arg for arg in args if arg not in STAGES]
    command = [sys.executable, __file__, name, *passed_on, "--here"]
    log = options.output_dir / f"{name}.log"
    with open(log, "w", encoding="utf-8") as file:
        try:
            status = subprocess.run(command, stdout=file, stderr=file, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            status = None
    took = f"{time.monotonic() - started:.0f} s"
    if status is None:
        return f"ended by its limit of {limit:.0f} s; {_rows(options.output_dir, name)} rows are kept"
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"failed after {took}: {one_line(lines[-1] if lines else status)[:200]} ({log})"
    return f"{took}, {_rows(options.output_dir, name)} rows"


def _rows(folder: Path, name: str) -> int:
    path = folder / f"{name}.json"
    return len(json.loads(path.read_text())["rows"]) if path.exists() else 0


def make_day(options: argparse.Namespace, limit: float) -> Day:
    """Return what a stage of ``limit`` seconds is given."""
    device = str(find_device(options.device))
    deadline = time.monotonic() + limit - GRACE
    seconds = 0.0 if options.toy else 1.0
    return Day(device, options.output_dir, options.data_dir, options.toy, seconds, deadline)


def run_stage(name: str, day: Day) -> list[dict[str, Any]]:
    """Run a stage in this process; write its rows after each, and return them."""
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    about = machine(torch.get_num_threads(), torch.device(day.device)) | {"kernels": _versions(), "toy": day.toy}
    for row in STAGES[name][0](day):
        rows.append(row)
        write_file(day.folder / f"{name}.json", json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    return rows


def _versions() -> dict[str, str]:
    """Return the versions of the packages that bring kernels."""
    found = {}
    for package in ("triton", "fla-core", "flash-linear-attention"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Run the program that the process was started as."""
    configure()
    sys.exit(exit_status(lambda: gpu_day(sys.argv[1:]), "gpu_day"))


if __name__ == "__main__":
    main()

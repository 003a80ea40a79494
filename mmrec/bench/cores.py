"""What the cores of a machine bring: training by threads and by processes, alone and beside another program."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmrec.baselines.tables import print_table
from mmrec.bench.tables import ratios, spread

Measure = Callable[..., dict[str, Any]]
"""Makes one measurement in a process of its own."""
NEIGHBOUR = "while True: pass"
"""The other program: it wants one core all the time, and no memory."""


def numbers(cores: int) -> list[int]:
    """Return the numbers of threads and processes that are tried: the powers of two below ``cores``, and it."""
    return sorted({1 << power for power in range(cores.bit_length()) if 1 << power <= cores} | {cores})


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """Let another program compute, if it is ``wanted``, until the block ends."""
    if not wanted:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def measure_cores(measure: Measure, cores: int, rounds: int) -> list[dict[str, Any]]:
    """Measure in turn, each number of threads and of processes, alone and beside a neighbour.

    Args:
        measure: of a training's speed, by the ``measurement`` "train" with so many ``threads``, or "train_together"
            by so many ``processes``.
        cores: of the machine.
        rounds: repetitions.

    Returns:
        A row for each number: ``kind`` (threads, or processes of one thread that share out the rows of an update),
        ``number``, and the tokens a second of all in each round, ``alone`` and ``beside``.
    """
    rows: list[dict[str, Any]] = [
        {"kind": kind, "number": number, "alone": [], "beside": []}
        for kind in ("threads", "processes")
        for number in numbers(cores)
        if kind == "threads" or (number > 1 and hasattr(os, "fork"))
    ]
    for _ in range(rounds):
        for row in rows:
            for key in ("alone", "beside"):
                with neighbour(key == "beside"):
                    row[key].append({"tokens_per_second": _speed(measure, row["kind"], row["number"])})
    return rows


def _speed(measure: Measure, kind: str, number: int) -> float:
    if kind == "threads":
        return float(measure(measurement="train", threads=number)["tokens_per_second"])
    return float(measure(measurement="train_together", threads=1, processes=number)["tokens_per_second"])


def show_cores(rows: list[dict[str, Any]], cores: int) -> None:
    """Print a row for each number: tokens/s, as a multiple of one thread's, and what a neighbour leaves of them."""
    key, one = "tokens_per_second", rows[0]["alone"]
    cells = [
        [
            f"{row['number']} {row['kind']}".removesuffix("s" if row["number"] == 1 else ""),
            f"{statistics.median(run[key] for run in row['alone']):,.0f}",
            spread(ratios(row["alone"], one, key)),
            f"{statistics.median(run[key] for run in row['beside']):,.0f}",
            spread(ratios(row["beside"], row["alone"], key)),
        ]
        for row in rows
    ]
    head = ["", "alone", "over one thread", "beside a neighbour", "over alone"]
    print_table(f"training by cores ({cores}), tokens/s", head, cells)

"""``mmrec bench``: this program's model and others in turn, on one machine, and the ratios between them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from mmrec.baselines.models import BASELINES
from mmrec.baselines.tables import print_table
from mmrec.bench.check import check_ops
from mmrec.bench.plot import plot
from mmrec.bench.tasks import RACES
from mmrec.core.errors import UserError, nearest
from mmrec.core.precision import native_precision
from mmrec.data.store import open_tokens

OURS = "mmrec"
NANOGPT_LOSS = 1.8857
"""Validation loss, in nats/char, that nanoGPT's CPU preset ends with on Tiny Shakespeare."""
VOCABULARY = 65
"""Of speeds, which are measured on random tokens: Tiny Shakespeare's number of characters."""
MEASURES = ("train", "decode", "read", "learn", "race")


def bench(
    measures: Sequence[str] = ("train", "decode", "read"),
    peers: Sequence[str] = ("gpt", "lstm"),
    lengths: Sequence[int] = (256, 1024, 4096, 16384, 65536),
    positions: Sequence[int] = (100, 10_000, 1_000_000),
    data_dir: Path = Path("data/tiny_shakespeare"),
    tokens: int = 1_536_000,
    rounds: int = 3,
    seconds: float = 5.0,
    threads: int | None = None,
    precision: Literal["32-true", "bf16-mixed"] | None = None,
    output_dir: Path = Path("bench"),
) -> None:
    """Compare this program's model with others, in turn, each measurement in a process of its own.

    Args:
        measures: what to measure: train (tokens/s and memory by length), decode (the same by position), read
            (time and memory by how much was read), learn (loss by tokens and by seconds), race (seconds to the
            loss of nanoGPT's CPU preset, each as it gets there soonest).
        peers: models to compare with: gpt, lstm, mingru, titans, xlstm, mamba, mamba2, rwkv.
        lengths: tokens of a row, for train.
        positions: tokens read before, for decode; the last one is how far read goes.
        data_dir: token folder to learn from, as mmrec prepare writes it.
        tokens: how many to train on, for learn.
        rounds: how often all take their turn; for learn, the number of seeds.
        seconds: time of one measurement of speed, at least.
        threads: of torch; as many as there are cores if left out.
        precision: of the matrix products of all models in training; the fastest that the processor has units for
            if left out.
        output_dir: folder for results.json and results.png.

    Raises:
        UserError: a name is unknown, a package is missing, or an op differs from its reference.
    """
    for kind, given, known in (("measure", measures, MEASURES), ("peer", peers, BASELINES)):
        for name in given:
            if name not in known:
                raise UserError(f"no {kind} {name!r}; known: {', '.join(known)}{nearest(name, known)}")
    for option, least in (("rounds", rounds), ("tokens", tokens), ("threads", threads or 1)):
        if least < 1:
            raise UserError(f"--{option} is {least}; it must be at least 1")
    for option, values, least in (("lengths", lengths, 1), ("positions", positions, 8)):
        if not values or min(values) < least:
            raise UserError(f"--{option} is {list(values)}; it must list numbers of at least {least}")
    if {"learn", "race"} & set(measures):
        open_tokens(data_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    names = [OURS, *(peer for peer in peers if peer != OURS)]
    runner = Runner(threads or os.cpu_count() or 1)
    chosen = precision or native_precision("cpu")
    results: dict[str, Any] = {"machine": machine(runner.threads), "precision": chosen, "ops": check_ops()}
    results["points"] = {"train": list(lengths), "decode": list(positions)}

    def save() -> None:
        (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    for name, difference in results["ops"].items():
        print(f"{name}: within {difference:.0e} of the reference")

    speed: dict[str, Any] = {"vocab_size": VOCABULARY, "seconds": seconds}
    if "train" in measures:
        request = {**speed, "task": "train", "precision": chosen}
        results["train"] = [runner.turns(names, rounds, **request, length=length) for length in lengths]
        show(f"training, tokens/s, {chosen}", "length", lengths, results["train"], "tokens_per_second")
        memory = "training, memory above the idle process in MiB"
        show(memory, "length", lengths, results["train"], "working_bytes", 2**20)
        save()
    recurrent = [name for name in names if name in (OURS, "lstm", "gpt")]
    if "decode" in measures:
        request = {**speed, "task": "decode"}
        results["decode"] = [runner.turns(recurrent, rounds, **request, position=position) for position in positions]
        show("writing, tokens/s", "position", positions, results["decode"], "tokens_per_second")
        show(
            "writing, memory of what was read in KiB", "position", positions, results["decode"], "state_bytes", 2**10
        )
        save()
    if "read" in measures:
        results["read"] = runner.turns([OURS], rounds, task="read", total=positions[-1], vocab_size=VOCABULARY)
        show_reading(results["read"], positions[-1])
        save()
    if "learn" in measures:
        request = {"task": "learn", "folder": str(data_dir), "tokens": tokens, "precision": chosen}
        results["learn"] = runner.turns(names, rounds, seeds=True, **request)
        show_learning(results["learn"])
        save()
    if "race" in measures:
        # What is asked is a time, so the course is followed closely.
        request = {"task": "learn", "folder": str(data_dir), "tokens": tokens, "precision": chosen, "race": True}
        request["evaluations"] = 16
        # Who learns no other way than above need not do it twice.
        known = {name: runs for name, runs in results.get("learn", {}).items() if name not in RACES}
        results["race"] = runner.turns([name for name in names if name not in known], rounds, seeds=True, **request)
        results["race"] |= known
        show_race(results["race"])
        save()
    drawn = plot(results, output_dir / "results.png")
    print(f"\nwritten to {output_dir}" + ("" if drawn else "; for a picture: pip install matplotlib"))


class Runner:
    """Runs measurements, one after the other."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def turns(self, names: Sequence[str], rounds: int, seeds: bool = False, **request: Any) -> dict[str, list[Any]]:
        """Return for each of ``names`` what was measured in each round; a failure is a result, too."""
        found: dict[str, list[Any]] = {name: [] for name in names}
        turns = [(number, name) for number in range(rounds) for name in names]
        with tqdm(turns, disable=not sys.stderr.isatty()) as bar:
            for number, name in bar:
                bar.set_description(f"{request['task']}, {name}")
                seed = {"seed": number} if seeds else {}
                found[name].append(self.measure(peer=name, **request, **seed))
        return found

    def measure(self, **request: Any) -> dict[str, Any]:
        """Return what one process measured, or why it could not."""
        command = [sys.executable, "-m", "mmrec.bench.tasks", json.dumps({**request, "threads": self.threads})]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if ran.returncode:
            reason = (ran.stderr.strip().splitlines() or [f"ended with status {ran.returncode}"])[-1]
            if request["peer"] == OURS:
                raise UserError(f"{OURS}: {request['task']} failed: {reason[:200]}")
            print(f"{request['peer']}: {request['task']}: {reason[:200]}", file=sys.stderr)
            return {"failed": reason[:500]}
        result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
        return result


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    packages = ("torch", "transformers", "minGRU-pytorch", "titans-pytorch", "xlstm")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    capability = torch.backends.cpu.get_cpu_capability()
    return {"threads": threads, "python": platform.python_version(), "cpu": capability, "versions": versions}


def ratios(ours: Sequence[Any], theirs: Sequence[Any], key: str) -> list[float]:
    """Return ours over theirs, round by round, where both were measured."""
    return [a[key] / b[key] for a, b in zip(ours, theirs, strict=True) if key in a and key in b]


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Return ``median (min to max)``."""
    if not values:
        return "-"
    return " ".join(
        [form.format(statistics.median(values)), f"({form.format(min(values))} to {form.format(max(values))})"]
    )


def show(
    title: str, label: str, points: Sequence[int], found: Sequence[dict[str, list[Any]]], key: str, unit: float = 1
) -> None:
    """Print a table: for each point what each model reached, and ours as a multiple of it."""
    rows = []
    for point, results in zip(points, found, strict=True):
        cells = [f"{point:,}"]
        for name, values in results.items():
            median = [value[key] / unit for value in values if key in value]
            cells.append(f"{statistics.median(median):,.0f}" if median else "failed")
            if name != OURS:
                cells.append(spread(ratios(results[OURS], values, key)))
        rows.append(cells)
    names = list(found[0])
    print_table(title, [label, names[0], *(part for name in names[1:] for part in (name, f"{OURS} / {name}"))], rows)


def show_reading(found: dict[str, list[Any]], total: int) -> None:
    """Print how time and memory change from the first eighth of what was read to the last."""
    runs = [run for run in found[OURS] if "failed" not in run]
    time = [run["seconds_per_token"][-1] / run["seconds_per_token"][0] for run in runs]
    memory = [run["peak_bytes"][-1] / run["peak_bytes"][0] for run in runs]
    rows = [["time per token", spread(time, "{:.3f}")], ["peak memory", spread(memory, "{:.3f}")]]
    print_table(f"reading {total:,} tokens, the last eighth over the first", ["", "median (min to max)"], rows)


def show_learning(found: dict[str, list[Any]]) -> None:
    """Print the loss after all tokens, after equal seconds, and the seconds to nanoGPT's loss."""
    rows = []
    for name, runs in found.items():
        runs = [run for run in runs if "course" in run]
        pairs = [(run, ours) for run, ours in zip(runs, found[OURS], strict=False) if "course" in ours]
        equal = [at_time(run["course"], min(end(run), end(ours))) for run, ours in pairs]
        rows.append(
            [
                name,
                runs[0]["protocol"] if runs else "failed",
                spread([run["course"][-1]["loss"] for run in runs], "{:.4f}"),
                spread([value for value in equal if value is not None], "{:.4f}"),
                spread([value for run in runs if (value := time_to(run["course"], NANOGPT_LOSS))], "{:.1f}"),
                spread([end(run) for run in runs], "{:.0f}"),
            ]
        )
    head = ["", "protocol", "loss at equal tokens", "loss at equal seconds", f"seconds to {NANOGPT_LOSS}", "seconds"]
    print_table("learning, median (min to max) over seeds, nats/token", head, rows)


def show_race(found: dict[str, list[Any]]) -> None:
    """Print the seconds to nanoGPT's loss, and ours as a share of those of each other model."""
    times = {name: [time_to(run.get("course", []), NANOGPT_LOSS) for run in runs] for name, runs in found.items()}
    rows = []
    for name, seconds in times.items():
        shares = [mine / other for mine, other in zip(times[OURS], seconds, strict=True) if mine and other]
        rows.append([name, spread([value for value in seconds if value], "{:.1f}"), spread(shares)])
    print_table(
        f"seconds of training to {NANOGPT_LOSS}, median (min to max)", ["", "seconds", "ours as a share"], rows
    )


def end(run: dict[str, Any]) -> float:
    """Return the seconds of training of a whole course."""
    return float(run["course"][-1]["seconds"])


def at_time(course: Sequence[dict[str, float]], seconds: float) -> float | None:
    """Return the loss that was reached by ``seconds``, or None before the first score."""
    reached = [point["loss"] for point in course if point["seconds"] <= seconds]
    return reached[-1] if reached else None


def time_to(course: Sequence[dict[str, float]], loss: float) -> float | None:
    """Return the seconds after which the loss was reached, on a straight line between two scores, or None."""
    before: dict[str, float] | None = None
    for point in course:
        if point["loss"] <= loss:
            if before is None:
                return point["seconds"]
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None

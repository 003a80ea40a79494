"""``mmrec bench``: this program's model and baselines, measured in turn on one machine, and their ratios."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
from tqdm import tqdm

from mmrec.bench.check import check_ops
from mmrec.bench.cores import measure_cores, show_cores
from mmrec.bench.measurements import TIME_TO_TARGET
from mmrec.bench.options import MEASURES, BenchOptions
from mmrec.bench.plot import plot
from mmrec.bench.tables import OURS, show_learning, show_reading, show_speed, show_time_to_target
from mmrec.core.devices import find_device
from mmrec.core.errors import UserError
from mmrec.core.files import refuse_to_replace, refuse_to_replace_picture, write_file
from mmrec.core.runtime import native_precision
from mmrec.core.threads import available_cores
from mmrec.data.store import open_tokens

VOCABULARY = 65
"""Of speeds, which are measured on random tokens: Tiny Shakespeare's number of characters."""
RESULTS, PICTURE = "results.json", "results.png"
CPU_DEVICE = torch.device("cpu")
STATEFUL = (OURS, "lstm", "gpt")
"""Models that can go on from what was read: with a state, or a cache."""


def bench(options: BenchOptions) -> None:
    """Compare this program's model with baselines, in turn, each measurement in a process of its own.

    Raises:
        UserError: a package is missing, or an op differs from its reference.
    """
    if {"learn", "time_to_target"} & set(options.measures):
        open_tokens(options.data_dir)
    refuse_to_replace(options.output_dir / RESULTS, b'{\n "machine": {', "results of mmrec bench", "--output_dir")
    refuse_to_replace_picture(options.output_dir / PICTURE, "--output_dir")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(options)
    for name, difference in comparison.results["ops"].items():
        print(f"{name}: within {difference:.0e} of the reference")
    for measure in MEASURES:
        if measure in options.measures:
            comparison.measure(measure)
    drawn = plot(comparison.results, options.output_dir / PICTURE)
    print(f"\nwritten to {options.output_dir}" + ("" if drawn else "; for a picture: pip install matplotlib"))


class Comparison:
    """Measurements of our model and of each baseline, kept in results.json as they come.

    Args:
        options: of the command.

    Attributes:
        results: what results.json holds.
    """

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._names = [OURS, *(name for name in options.baselines if name != OURS)]
        device = find_device(options.device)
        self._runner = Runner(options.threads, str(device))
        self._precision = options.precision or native_precision(device.type)
        self.results: dict[str, Any] = {
            "machine": machine(self._runner.threads, device),
            "precision": self._precision,
            "ops": check_ops(device=str(device)),
            "points": {"train": list(options.lengths), "decode": list(options.positions)},
        }

    def measure(self, measure: str) -> None:
        """Measure all models, print a table, and save the results."""
        steps: dict[str, Callable[[], None]] = {
            "train": self._train,
            "decode": self._decode,
            "read": self._read,
            "cores": self._cores,
            "learn": self._learn,
            "time_to_target": self._time_to_target,
        }
        steps[measure]()
        write_file(self._options.output_dir / RESULTS, json.dumps(self.results, indent=1) + "\n")

    def _train(self) -> None:
        lengths = self._options.lengths
        request: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "seconds": self._options.seconds,
            "precision": self._precision,
        }
        found = [self._turns("train", self._names, **request, length=length) for length in lengths]
        self.results["train"] = found
        show_speed(f"training, tokens/s, {self._precision}", "length", lengths, found, "tokens_per_second")
        memory = "training, memory above the idle process in MiB"
        show_speed(memory, "length", lengths, found, "working_bytes", 2**20)

    def _decode(self) -> None:
        positions, names = self._options.positions, [name for name in self._names if name in STATEFUL]
        request: dict[str, Any] = {"vocab_size": VOCABULARY, "seconds": self._options.seconds}
        found = [self._turns("decode", names, **request, position=position) for position in positions]
        self.results["decode"] = found
        show_speed("decoding, tokens/s", "position", positions, found, "tokens_per_second")
        show_speed("decoding, state or cache in KiB", "position", positions, found, "state_bytes", 2**10)

    def _read(self) -> None:
        total = self._options.positions[-1]
        self.results["read"] = self._turns("read", [OURS], total=total, vocab_size=VOCABULARY)
        show_reading(self.results["read"], total)

    def _cores(self) -> None:
        length, cores = self._options.lengths[0], available_cores()
        request: dict[str, Any] = {"vocab_size": VOCABULARY, "seconds": self._options.seconds, "length": length}
        measure = partial(
            self._runner.measure,
            baseline=OURS,
            precision=self._precision,
            device="cpu",
            **request,
        )
        found = measure_cores(measure, cores, self._options.rounds)
        self.results["cores"] = {"cores": cores, "length": length, "rows": found}
        show_cores(found, cores)

    def _learn(self) -> None:
        self.results["learn"] = self._turns("learn", self._names, seeds=True, **self._training())
        show_learning(self.results["learn"])

    def _time_to_target(self) -> None:
        # A time is read off the learning curve, which is scored often for that. What "learn" has measured with the
        # same hyper-parameters is not trained again.
        known = {name: runs for name, runs in self.results.get("learn", {}).items() if name not in TIME_TO_TARGET}
        names = [name for name in self._names if name not in known]
        request = {**self._training(), "time_to_target": True, "evaluations": 16}
        self.results["time_to_target"] = self._turns("learn", names, seeds=True, **request) | known
        show_time_to_target(self.results["time_to_target"])

    def _training(self) -> dict[str, Any]:
        options = self._options
        return {"folder": str(options.data_dir), "tokens": options.tokens, "precision": self._precision}

    def _turns(self, measurement: str, names: Sequence[str], seeds: bool = False, **request: Any) -> dict[str, Any]:
        return self._runner.turns(names, self._options.rounds, seeds, measurement=measurement, **request)


class Runner:
    """Runs measurements, one after the other.

    Args:
        threads: of torch.
        device: that they compute on, where a request names no other.
    """

    def __init__(self, threads: int, device: str = "cpu") -> None:
        self.threads, self.device = threads, device

    def turns(self, names: Sequence[str], rounds: int, seeds: bool = False, **request: Any) -> dict[str, list[Any]]:
        """Return for each of ``names`` what was measured in each round; a failure is a result, too."""
        found: dict[str, list[Any]] = {name: [] for name in names}
        turns = [(number, name) for number in range(rounds) for name in names]
        with tqdm(turns, disable=not sys.stderr.isatty()) as bar:
            for number, name in bar:
                bar.set_description(f"{request['measurement']}, {name}")
                seed = {"seed": number} if seeds else {}
                found[name].append(self.measure(baseline=name, **request, **seed))
        return found

    def measure(self, **request: Any) -> dict[str, Any]:
        """Return what one process measured, or why it could not."""
        request = {"threads": self.threads, "device": self.device, **request}
        command = [sys.executable, "-m", "mmrec.bench.measurements", json.dumps(request)]
        environment = os.environ | {"OMP_NUM_THREADS": str(request["threads"])}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if ran.returncode:
            reason = (ran.stderr.strip().splitlines() or [f"ended with status {ran.returncode}"])[-1]
            if request["baseline"] == OURS:
                raise UserError(f"{OURS}: {request['measurement']} failed: {reason[:200]}")
            print(f"{request['baseline']}: {request['measurement']}: {reason[:200]}", file=sys.stderr)
            return {"failed": reason[:500]}
        result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
        return result


def machine(threads: int, device: torch.device = CPU_DEVICE) -> dict[str, Any]:
    """Return what the figures depend on."""
    packages = ("torch", "transformers", "minGRU-pytorch", "titans-pytorch", "xlstm")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"threads": threads, "python": platform.python_version(), "cpu": capability, "versions": versions}
    if device.type == "cuda":
        found["cuda"] = {
            "name": torch.cuda.get_device_name(device),
            "capability": torch.cuda.get_device_capability(device),
        }
    return found | {"device": str(device)}

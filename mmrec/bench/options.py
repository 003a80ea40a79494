"""Options of ``mmrec bench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmrec.baselines.models import BASELINES
from mmrec.core.devices import AUTO, check_device_name
from mmrec.core.errors import UserError, nearest

MEASURES = ("train", "decode", "read", "cores", "learn", "time_to_target")


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, of which models, and how long.

    Args:
        measures: what to measure: train (tokens/s and memory by length), decode (the same by position), read
            (time and memory by how much was read), cores (tokens/s of ours by threads and processes, alone and
            beside a program that wants a core, at the first of the lengths), learn (loss by tokens and by seconds),
            time_to_target (seconds to the loss of nanoGPT's CPU preset, each model with the hyper-parameters that
            reach it soonest).
        baselines: models to compare with: gpt, lstm, mingru, titans, xlstm, mamba, mamba2, rwkv.
        lengths: tokens of a row, for train.
        positions: tokens read before, for decode; the last one is how far read goes.
        data_dir: token folder to learn from, as mmrec prepare writes it.
        tokens: how many to train on, for learn.
        rounds: repetitions of each measurement; for learn and time_to_target, the number of seeds.
        seconds: time of one measurement of speed, at least.
        threads: of torch.
        precision: of the matrix products of all models in training; the fastest that the processor has units for
            if left out.
        device: compute on auto, cpu, cuda, mps or cuda:NUMBER; auto takes a GPU where one works. Cores are always the
            CPU's.
        output_dir: folder for results.json and results.png.

    Raises:
        UserError: a name is unknown, or a number too small.
    """

    measures: Sequence[str] = ("train", "decode", "read")
    baselines: Sequence[str] = ("gpt", "lstm")
    lengths: Sequence[int] = (256, 1024, 4096, 16384, 65536)
    positions: Sequence[int] = (100, 10_000, 1_000_000)
    data_dir: Path = Path("data/tiny_shakespeare")
    tokens: int = 1_536_000
    rounds: int = 3
    seconds: float = 5.0
    threads: int = 1
    precision: Literal["32-true", "bf16-mixed"] | None = None
    device: str = AUTO
    output_dir: Path = Path("bench")

    def __post_init__(self) -> None:
        check_device_name(self.device)
        for kind, given, known in (("measure", self.measures, MEASURES), ("baseline", self.baselines, BASELINES)):
            for name in given:
                if name not in known:
                    raise UserError(f"no {kind} {name!r}; known: {', '.join(known)}{nearest(name, known)}")
        for option, value in (("rounds", self.rounds), ("tokens", self.tokens), ("threads", self.threads)):
            if value < 1:
                raise UserError(f"--{option} is {value}; it must be at least 1")
        for option, values, least in (("lengths", self.lengths, 1), ("positions", self.positions, 8)):
            if not values or min(values) < least:
                raise UserError(f"--{option} is {list(values)}; it must list numbers of at least {least}")

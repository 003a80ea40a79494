"""What several test files need: a model that trains in a second, and the comparison of two trainings."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import torch

BATCH = (2, 230)
"""Rows and tokens of a row."""
QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--model.config={dim: 16, layers: 2, heads: 2, ffn_dim: 24}",
    "--model.dropout=0.1",
    "--model.warmup_steps=5",
    f"--data.batch_size={BATCH[0]}",
    f"--data.seq_len={BATCH[1]}",
]
"""A model of some thousand weights; the text of ``conftest`` has 21 batches of that size: three segments of seven."""
SMALL = ["--trainer.enable_progress_bar=false", "--trainer.logger=false"]
"""Of `mmrec train`, where neither is looked at."""


def fit(prepared: Path, *more: object) -> list[str]:
    """Return the arguments of a short training on the token folder ``prepared``."""
    return ["fit", *QUICK, f"--data.data_dir={prepared}", *map(str, more)]


def checkpoints(run: str, root: Path = Path()) -> Path:
    return root / "lightning_logs" / run / "checkpoints"


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


def last(run: str, root: Path = Path()) -> dict[str, Any]:
    """Return the last checkpoint of ``run``."""
    return load(checkpoints(run, root) / "last.ckpt")


def record() -> dict[str, Any]:
    """Return what `mmrec train` has written of the run on the fixture ``novel``."""
    content: dict[str, Any] = json.loads(Path("lightning_logs/novel/plan.json").read_text(encoding="utf-8"))
    return content


def losses(run: str, tag: str = "train/loss", root: Path = Path()) -> dict[int, float]:
    """Return what was logged by step; of a step logged twice, the later."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(root / "lightning_logs" / run), size_guidance={"scalars": 0})
    board.Reload()
    logged = board.Scalars(tag) if tag in board.Tags()["scalars"] else []
    return {event.step: event.value for event in logged}


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, optimizer, schedule, place in the data, carried memory and random numbers, to the bit."""

    def same(a: Any, b: Any, where: str) -> None:
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                same(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), where
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                same(x, y, f"{where}[{index}]")
        else:
            assert a == b, where

    assert one.keys() == other.keys()
    for key in one.keys() - {"callbacks", "loops"}:  # these name folders, and count what a stop leaves out
        same(one[key], other[key], key)
    loops = "fit_loop"
    same(one["loops"][loops]["state_dict"], other["loops"][loops]["state_dict"], "loader")
    for name, state in one["callbacks"].items():
        for key in state.keys() & {"best_model_score", "wait_count", "best_score", "skipped"}:
            same(state[key], other["callbacks"][name][key], f"{name}.{key}")


def kill_here() -> None:
    """End this process as kill -9 does."""
    signal.raise_signal(signal.SIGKILL)

"""What a run tells of itself: when, where and with what it was started, and how it ended."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from mmrec import __version__
from mmrec.checkpoints.runs import HISTORY
from mmrec.core.errors import one_line
from mmrec.core.threads import cores_by_affinity
from mmrec.training.arithmetic import arithmetic
from mmrec.training.module import RecurrentLMModule

FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Of a processor, as Linux names them: those that the arithmetic depends on."""


class RunLog(Callback):
    """Adds a line of JSON to ``history.jsonl`` in the run's folder at every start and every end of training.

    A start without an end after it is a run that is still going, or was killed.

    Args:
        folder: of the run.
        arguments: what the command was given.
    """

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.folder = folder
        self.arguments = list(arguments)
        self._open = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._open = True
            place = {"devices": _devices(trainer), "precision": str(trainer.precision)}
            assert isinstance(pl_module, RecurrentLMModule)
            chosen = pl_module.hyperparameters() | trainer.datamodule.hyperparameters()  # type: ignore[attr-defined]
            here = environment() | place
            self._note("start", trainer, arguments=self.arguments, hyperparameters=chosen, environment=here)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        planned = pl_module.planned_steps  # of a limit of time, too
        whole = not trainer.should_stop or (planned is not None and planned <= trainer.global_step)
        reasons = [callback.stopping_reason for callback in trainer.early_stopping_callbacks]
        if whole:
            how = "reached its end"
        elif EarlyStoppingReason.NON_FINITE_METRIC in reasons:
            how = "stopped early: the validation loss was not finite"
        elif EarlyStoppingReason.PATIENCE_EXHAUSTED in reasons:
            how = "stopped early: the validation loss no longer fell"
        else:
            how = "stopped early, as its options say"  # the loss was low enough, or too high
        self._end(trainer, how)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer, one_line(str(exception) or type(exception).__name__))

    def _end(self, trainer: Trainer, how: str) -> None:
        if self._open:
            self._open = False
            self._note("end", trainer, how=how)

    def _note(self, what: str, trainer: Trainer, **more: Any) -> None:
        line = {"event": what, "time": datetime.now(UTC).isoformat(timespec="seconds"), "step": trainer.global_step}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / HISTORY, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | more) + "\n")
        except OSError as error:  # a full disk is no reason to stop a training for its log
            print(f"{self.folder / HISTORY}: {error.strerror}", file=sys.stderr)


def environment() -> dict[str, Any]:
    """Return versions, the commit of the program, and the machine: plain values."""
    flags = (_processor("flags") or _processor("Features")).split()
    return {
        "mmrec": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor("model name") or platform.processor() or platform.machine(),
        "cpu_features": [name for name in FEATURES if name in flags],
        "cores": cores_by_affinity(),
        **arithmetic(),
    }


def commit() -> str | None:
    """Return the commit that the program stands at, with "+" where files are changed; None without a checkout."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is the checkout of something around it
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _devices(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} x {name}"


def _processor(key: str) -> str:
    """Return what Linux says of the first processor under ``key``, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")

"""What is logged of the training itself: tokens per second, and the learning rate."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from mmrec.data.batches import Batch
from mmrec.training.compat import is_accumulating, is_logging_step


class LearningRate(Callback):
    """Logs the learning rate once: Lightning's monitor repeats it for every group of parameters."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if is_logging_step(trainer):  # at others it would be copied to the device for nothing
            pl_module.log("train/learning_rate", optimizer.param_groups[0]["lr"])


class Throughput(Callback):
    """Logs training tokens per second, over the time since it last did.

    All of that time counts, also what reading batches and saving take; only validations do not. A GPU is waited for
    before the time is taken.

    Attributes:
        latest: the figure that was logged last; None before the first.
    """

    def __init__(self) -> None:
        self.latest: float | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._start: float | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self._start is None:
            self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._tokens += batch.inputs.numel() * trainer.world_size
        if is_logging_step(trainer) and not is_accumulating(trainer):
            self._stop(pl_module.device)
            self.latest = self._tokens / self._seconds
            pl_module.log("train/tokens_per_second", self.latest)
            self._tokens, self._seconds, self._start = 0, 0.0, time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(pl_module.device)

    def _stop(self, device: torch.device) -> None:
        """Count the time until now, and none from here to the next batch."""
        if self._start is None:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds += time.perf_counter() - self._start
        self._start = None

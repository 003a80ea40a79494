"""What is logged of the training itself: tokens per second, and the learning rate."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from mmrec.data.batches import Batch
from mmrec.training.compat import is_accumulating, is_logging_step


class LearningRate(Callback):
    """Logs the learning rate once: Lightning's monitor repeats it for every group of parameters."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        pl_module.log("train/learning_rate", optimizer.param_groups[0]["lr"])


class Throughput(Callback):
    """Logs training tokens per second, over the steps since it last did; validation does not count."""

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - self._start
        self._tokens += batch.inputs.numel() * trainer.world_size
        if is_logging_step(trainer) and not is_accumulating(trainer):
            pl_module.log("train/tokens_per_second", self._tokens / self._seconds, prog_bar=True)
            self._tokens, self._seconds = 0, 0.0

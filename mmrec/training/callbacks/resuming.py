"""What Lightning does not do, or counts wrongly, when a run is resumed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mmrec.training.callbacks.checkpointing import LastCheckpoint
from mmrec.training.compat import complete_resumed_epoch, count_epoch_in_progress, run_missed_validation
from mmrec.training.module import RecurrentLMModule


class ResumeCorrections(Callback):
    """Runs the validation that a run was stopped before, and keeps the counts of batches and epochs right.

    Args:
        last: says whether a validation was due when it was saved.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        complete_resumed_epoch(trainer)
        if self.last.validation_due:
            assert isinstance(pl_module, RecurrentLMModule)
            pl_module.restore_training_state()  # the validation ends with a save
            run_missed_validation(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        count_epoch_in_progress(trainer)

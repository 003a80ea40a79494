"""Early stopping: training ends when the validation loss no longer falls."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping that says why it ends a run.

    Its patience is the one asked for now, not the one that a resumed checkpoint remembers. Before ``min_epochs`` or
    ``min_steps`` it stops nothing: Lightning remembers that it was asked to stop, and does once they are reached,
    also where the loss has fallen since.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = trainer.should_stop
        super().on_train_epoch_end(trainer, pl_module)
        self._decide(trainer, before)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = trainer.should_stop
        super().on_validation_end(trainer, pl_module)
        self._decide(trainer, before)

    def _decide(self, trainer: Trainer, before: bool) -> None:
        """Say why training stops, where this callback has just asked for it, or take the request back."""
        if before or not trainer.should_stop:
            return
        epochs = trainer.current_epoch + (1 if trainer.is_last_batch else 0)
        if epochs < (trainer.min_epochs or 0) or trainer.global_step < (trainer.min_steps or 0):
            trainer.should_stop = False
            return
        rank_zero_info(f"Early stopping: {self._reason()}")

    def _reason(self) -> str:
        match self.stopping_reason:
            case EarlyStoppingReason.PATIENCE_EXHAUSTED:
                best = f"{self.monitor} {float(self.best_score):.4f}"
                return f"no better loss in {self.wait_count} validations; the best was {best}"
            case EarlyStoppingReason.NON_FINITE_METRIC:
                return f"{self.monitor} is not finite"
            case EarlyStoppingReason.STOPPING_THRESHOLD:
                return f"{self.monitor} is below early_stopping.stopping_threshold {self.stopping_threshold:g}"
            case _:
                return f"{self.monitor} is above early_stopping.divergence_threshold {self.divergence_threshold:g}"

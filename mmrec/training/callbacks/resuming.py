"""What Lightning does not do, or counts wrongly, when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mmrec.checkpoints.checkpoint import read_checkpoint
from mmrec.checkpoints.runs import BEST, LAST, PREVIOUS, STABLE
from mmrec.core.errors import UserError
from mmrec.training.callbacks.checkpointing import BestCheckpoint, LastCheckpoint
from mmrec.training.compat import (
    begin_where_validation_is_due,
    complete_resumed_epoch,
    count_epoch_in_progress,
    run_missed_validation,
)
from mmrec.training.module import RecurrentLMModule


class ResumeCorrections(Callback):
    """Runs the validation that a run was stopped before, and keeps counts right: batches, epochs, and checkpoints.

    Args:
        last: says whether a validation was due when it was saved.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        begin_where_validation_is_due(trainer, lambda: self.last.validation_due)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        complete_resumed_epoch(trainer)
        if trainer.ckpt_path is not None:
            _adopt_later_checkpoints(trainer)
        if self.last.validation_due:
            assert isinstance(pl_module, RecurrentLMModule)
            pl_module.restore_training_state()  # the validation ends with a save
            run_missed_validation(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        count_epoch_in_progress(trainer)


def _adopt_later_checkpoints(trainer: Trainer) -> None:
    """Give each ModelCheckpoint that a user has added the state of the newest file that it wrote into its folder.

    It may have written files after the checkpoint that the run is resumed from was saved. It would not know them, and
    never remove them: of each resumed run one more would be left than ``save_top_k``.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or isinstance(callback, BestCheckpoint | LastCheckpoint):
            continue
        newest = _newest_state(callback) if trainer.is_global_zero else None
        newest = trainer.strategy.broadcast(newest)
        if newest is not None:
            callback.load_state_dict(newest)


def _newest_state(callback: ModelCheckpoint) -> dict[str, Any] | None:
    """Return the state of ``callback`` in the newest of the checkpoints in its folder that it wrote itself."""
    files = [
        path
        for path in Path(callback.dirpath or ".").glob("*.ckpt")
        if path.stem not in (BEST, LAST, PREVIOUS, STABLE)
    ]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            states = read_checkpoint(path, mmap=True).get("callbacks", {})
        except UserError:  # damaged, or of another program
            continue
        state: dict[str, Any] | None = states.get(callback.state_key)
        if state is None or state["dirpath"] != callback.dirpath:
            continue
        if str(path) in (state["best_model_path"], *state["best_k_models"]):
            return state
    return None

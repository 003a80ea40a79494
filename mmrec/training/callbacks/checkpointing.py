"""Which checkpoints are saved, and when: the best and the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mmrec.checkpoints.checkpoint import read_checkpoint
from mmrec.checkpoints.runs import BEST, LAST, STABLE
from mmrec.core.errors import UserError
from mmrec.training.compat import is_accumulating, is_fast_dev_run, is_validation_due, validate_also
from mmrec.training.module import RecurrentLMModule


class BestCheckpoint(ModelCheckpoint):
    """The checkpoint of the lowest validation loss, a finite one.

    Lightning's takes the first loss whatever it is; this one also finds its best again where the folder of the run
    has been moved, and has the last update of a training validated, whatever the interval between validations: the
    learning rate has fallen by then.
    """

    _end: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The second would be best-v1.ckpt; which of them is the best nobody could tell.
        if self.save_top_k not in (0, 1):
            raise UserError(
                f"--best.save_top_k is {self.save_top_k}; it must be 1, as best.ckpt is one, or 0 for none; for "
                f"more, add --trainer.callbacks+=ModelCheckpoint with options of its own"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        validate_also(trainer, lambda: self._is_at_end(trainer, pl_module.planned_steps))
        super().on_train_start(trainer, pl_module)

    def _is_at_end(self, trainer: Trainer, planned_steps: int | None) -> bool:
        """Return whether the last update was that of the end, or of an end that the run has gone on from."""
        step = trainer.global_step
        if step == planned_steps and not is_accumulating(trainer):
            self._end = step
        return step == self._end

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        return current is not None and bool(torch.isfinite(current)) and super().check_monitor_top_k(trainer, current)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"end": self._end}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning asks on resuming whether the update that was saved was validated: with another end, too.
        self._end = state_dict.get("end")
        own, score = Path(self.dirpath or ".") / f"{BEST}.ckpt", state_dict["best_model_score"]
        same_run = Path(state_dict["dirpath"]).parent.name == own.parent.parent.name
        if same_run and own.is_file() and (score := self._lowest(own, score)) is not None:
            path = str(own)
            moved = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            state_dict = state_dict | moved | {"best_k_models": {path: score}, "best_model_score": score}
        super().load_state_dict(state_dict)

    def _lowest(self, own: Path, score: Tensor | None) -> Tensor | None:
        """Return ``score`` or, where it is lower, that of the file: it may be later than the checkpoint resumed from.

        A run that goes on from before its learning rate fell must not replace what it ended with by less.
        """
        try:
            state = read_checkpoint(own, mmap=True, verify=False)["callbacks"][self.state_key]
            found: Tensor | None = state["best_model_score"]
        except (UserError, KeyError):  # damaged, or of another program: it is replaced
            return score
        return found if score is None or (found is not None and found < score) else score


class LastCheckpoint(ModelCheckpoint):
    """The checkpoint to resume from: saved every so many steps, after validations, and at the end.

    Args:
        every_n_train_steps: steps between two saves.
        if_save_fails: "stop" ends the run where a checkpoint cannot be written; "go_on" says so and trains on.

    Attributes:
        validation_due: whether a validation is to come after the current update; saved, so that a run that is
            resumed from there begins with it.
    """

    def __init__(self, every_n_train_steps: int = 100, if_save_fails: Literal["stop", "go_on"] = "stop") -> None:
        super().__init__(
            filename=LAST,
            monitor=None,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.if_save_fails = if_save_fails
        self.validation_due = False

    @property
    def path(self) -> Path:
        """Where it is saved."""
        return Path(self.dirpath or ".") / f"{LAST}.ckpt"

    def save(self, trainer: Trainer) -> None:
        """Save now, in all processes; not in a run that only tries a few batches."""
        if not is_fast_dev_run(trainer):
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.validation_due = is_validation_due(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # The end is not left to on_train_end: by then Lightning counts an epoch that max_steps broke off as
        # complete, and a run that is given more steps would resume at a wrong place.
        if trainer.is_last_batch or 0 <= trainer.max_steps <= trainer.global_step:
            self.save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation_due = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the validation changed: the best loss so far, and the patience that is left."""
        super().on_validation_end(trainer, pl_module)
        # Gradients that are still being accumulated are in no checkpoint: the update is awaited.
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not is_accumulating(trainer):
            self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"validation_due": self.validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.validation_due = state_dict.get("validation_due", False)


class StableCheckpoint(Callback):
    """Saves the state before the learning rate falls, from which a run with the schedule "wsd" can be made longer.

    Args:
        last: has the folder.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last
        self._is_before = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_before = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        first = pl_module.decay_start
        if not self._is_before or pl_module.options.schedule != "wsd" or first is None or is_accumulating(trainer):
            return
        if trainer.global_step >= first:
            self._is_before = False
            if trainer.global_step == first and not is_fast_dev_run(trainer):
                trainer.save_checkpoint(self.last.path.with_name(f"{STABLE}.ckpt"))

"""Gradients: their norm, and what happens where one is not finite."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from mmrec.core.errors import UserError
from mmrec.model.ops import dispatch
from mmrec.training.compat import is_logging_step
from mmrec.training.module import RecurrentLMModule
from mmrec.training.optim import updated_parameters


class GradientGuard(Callback):
    """Logs the gradient's norm before clipping, and keeps an update that would spoil the weights from happening.

    Args:
        if_not_finite: "stop" ends the run before the update; "skip" leaves the update out, forgets what was read,
            and counts it.
    """

    def __init__(self, if_not_finite: Literal["stop", "skip"] = "stop") -> None:
        self.if_not_finite = if_not_finite
        self.skipped = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        updated = updated_parameters(optimizer)
        gradients = [parameter.grad for parameter in updated if parameter.grad is not None]
        norm = dispatch.total_norm(gradients)
        pl_module.gradient_norm = norm
        if torch.isfinite(norm):  # the one place where an update waits for the device
            if is_logging_step(trainer):
                pl_module.log("train/grad_norm", norm)
        elif getattr(trainer.precision_plugin, "scaler", None) is not None:
            pass  # float16's loss scaling meets overflows as a matter of course, and skips them itself
        else:
            bad = [n for n, p in pl_module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            what = (
                f"the gradient is not finite at step {trainer.global_step} (first in {bad[0] if bad else 'its norm'})"
            )
            if self.if_not_finite == "stop":
                raise UserError(
                    f"{what}; stopped before the update, the last checkpoint is good; try a lower "
                    f"--model.learning_rate, or --gradients.if_not_finite skip"
                )
            self.skipped += 1
            rank_zero_info(f"{what}; update left out, {self.skipped} so far")
            for parameter in updated:
                parameter.grad = None
            pl_module.gradient_norm = None
            pl_module.reset_carried_state()
        if self.if_not_finite == "skip" and is_logging_step(trainer):
            pl_module.log("train/skipped_updates", float(self.skipped))

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

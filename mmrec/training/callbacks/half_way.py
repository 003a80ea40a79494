"""What a training has reached half-way, for whoever knows what that says of its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer

from mmrec.training.datamodule import TextDataModule
from mmrec.training.module import RecurrentLMModule
from mmrec.training.options import OptimizerOptions

BEGIN, LATEST = 0.49, 0.55
"""Shares of the updates between which a validation is half-way: of an odd number it may come just before."""


@dataclass(frozen=True)
class HalfWayScore:
    """The first validation about half-way through a training.

    Attributes:
        bits_per_byte: of the validation text, or of as much of it as is validated with.
        step: updates before it.
        planned_steps: updates at which the training is to end.
        epochs: how often it will have read its text then.
        vocab_size: number of different tokens.
        options: the schedule of the learning rate is one of them.
    """

    bits_per_byte: float
    step: int
    planned_steps: int
    epochs: float
    vocab_size: int
    options: OptimizerOptions


class HalfWay(Callback):
    """Prints what is made of the first validation half-way through a training, once.

    Args:
        tell: returns the line, or None where there is nothing to say.
    """

    def __init__(self, tell: Callable[[HalfWayScore], str | None]) -> None:
        self._tell = tell
        self._has_told = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        planned, reached = pl_module.planned_steps, trainer.callback_metrics.get("val/bits_per_byte")
        if self._has_told or not trainer.is_global_zero or planned is None or reached is None:
            return
        if trainer.global_step < BEGIN * planned:
            return
        self._has_told = True
        data = getattr(trainer, "datamodule", None)
        assert isinstance(data, TextDataModule)
        epochs = planned * trainer.accumulate_grad_batches / data.batches_per_epoch()
        vocab_size = pl_module.tokenizer.vocab_size
        score = HalfWayScore(float(reached), trainer.global_step, planned, epochs, vocab_size, pl_module.options)
        line = self._tell(score)
        if line is not None:
            pl_module.print(line)  # above the progress bar

"""Measurements at validations: loss by position, the recurrent layers' statistics, and samples of text.

They go to every logger that takes them, and leave no trace in the training.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mmrec.data.batches import Batch
from mmrec.inference.generate import generate_tokens
from mmrec.inference.metrics import MetricsByPosition
from mmrec.inference.sampling import SamplingOptions
from mmrec.model.statistics import layer_statistics
from mmrec.training.callbacks.checkpointing import BestCheckpoint
from mmrec.training.loggers import log_histogram, log_result, log_scalars, log_text
from mmrec.training.module import RecurrentLMModule

POSITION, HALF_LIFE, STATE, GATE = "val_loss_by_position", "val_half_life", "val_state_norm", "val_gate"
"""What the tags of measurements at validations begin with."""
HALF_LIVES = "val_half_life_log2"
"""What the tags of the histograms of half-lives begin with."""


def _can_measure(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Return whether this process runs the model by itself after a validation."""
    if trainer.sanity_checking or not trainer.is_global_zero or not trainer.loggers:
        return False
    # A model that is sharded across processes runs only in all of them at once.
    return not (isinstance(pl_module, RecurrentLMModule) and pl_module.is_sharded)


def _start_of_validation(trainer: Trainer, length: int, device: torch.device) -> Tensor:
    val = trainer.datamodule.tokens.val  # type: ignore[attr-defined]
    return torch.tensor(val[:length].astype("int64"), device=device)


class LossByPosition(Callback):
    """Logs the loss of each validation by position in the text, in the bands of ``mmrec score``."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._score = MetricsByPosition()
        self._position = 1  # the first token is not scored; counted from the last reset of the state

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        nats = outputs["nats"]
        if bool(batch.reset_mask[0]):  # a text that is scored in part has several begins
            self._position = 1
        self._score.update(nats, pl_module.token_lengths[batch.targets.flatten()], self._position)
        self._position += len(nats)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            losses = {
                f"{POSITION}/from_{start}": float(score.compute()["loss"])
                for start, score in self._score.compute().items()
            }
            log_scalars(trainer, losses)


class RecurrentLayerStatistics(Callback):
    """Logs after each validation the half-lives of the recurrent states, their norms, and how far the gates open.

    Measured on the first tokens of the validation text; a hundredth of the time that the validation takes.
    """

    LENGTH = 1024
    BINS = np.arange(-4, 24.25, 0.25)
    """Of the histograms: quarters of a power of 2."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _can_measure(trainer, pl_module):
            return
        assert isinstance(pl_module, RecurrentLMModule)
        figures: dict[str, float] = {}
        tokens = _start_of_validation(trainer, self.LENGTH, pl_module.device)
        for number, layer in enumerate(layer_statistics(pl_module.net, tokens)):
            name = f"layer{number}_{layer.kind}"
            figures[f"{HALF_LIFE}/{name}"] = float(layer.half_lives.median())
            figures[f"{STATE}/{name}"] = layer.state_norm
            figures |= {f"{GATE}/{name}_{gate}": value for gate, value in layer.gates.items()}
            powers = layer.half_lives.log2().clamp(self.BINS[0], self.BINS[-1])
            log_histogram(trainer, f"{HALF_LIVES}/{name}", powers, self.BINS)
        log_scalars(trainer, figures)


class TextSample(Callback):
    """Generates a text with the model after each validation, and logs it.

    The seed is fixed: what changes from sample to sample is the model. A table shows the samples so far side by
    side; of many, every second of the earlier ones is left out.
    """

    LENGTH = 300
    ROWS, IN_TABLE = 24, 160

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _can_measure(trainer, pl_module):
            return
        assert isinstance(pl_module, RecurrentLMModule)
        training = pl_module.net.training
        pl_module.net.eval()
        prompt = _start_of_validation(trainer, 1, pl_module.device)
        text = pl_module.tokenizer.decode(generate_tokens(pl_module.net, prompt, SamplingOptions(self.LENGTH)))
        pl_module.net.train(training)
        # Indented by four: TensorBoard reads Markdown, and shows such lines as they are.
        shown = "\n".join("    " + line for line in text.splitlines())
        log_text(trainer, "sample", text, shown)
        loss = trainer.callback_metrics.get("val/loss")
        row = [trainer.global_step, None if loss is None else float(loss), text[: self.IN_TABLE]]
        self._rows = [*(self._rows if len(self._rows) < self.ROWS else self._rows[::2]), row]
        log_text(trainer, "progress", samples_table(self._rows))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]


def samples_table(rows: list[list[Any]]) -> str:
    """Return rows of updates, validation loss (or None) and text as a Markdown table that shows any text as it is."""
    lines = ["updates | val/loss | sample", "---: | ---: | :---"]
    for updates, loss, text in rows:
        # Marks of Markdown as entities, which no reader of it takes for marks; what else is no space stays.
        shown = re.sub(r"[!-/:-@\[-`{-~]", lambda mark: f"&#{ord(mark[0])};", text)
        shown = "<br>".join(shown.strip("\n").splitlines())
        lines.append(f"{updates} | {'' if loss is None else f'{loss:.4f}'} | {shown}")
    return "\n".join(lines)


class FinalScore(Callback):
    """Logs the hyper-parameters with the best validation loss, for tables that compare runs."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        saved = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint)]
        best = next((callback.best_model_score for callback in saved), None)
        if best is None:
            return
        data = trainer.datamodule.hyperparameters()  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            result = {"val/best_loss": float(best)}
            log_result(logger, pl_module.hyperparameters() | data, result, trainer.global_step)

"""What the TensorBoard page shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from mmrec.generate import continue_text
from mmrec.module import TextModule

CHARTS = {"loss": {"training and validation, nats/token": ["Multiline", ["train/loss", "val/loss"]]}}
"""Curves that belong into one chart, on the page's tab "Custom scalars"."""


class Board(TensorBoardLogger):
    """Lightning's logger of ``ROOT/RUN``, with both losses in one chart and without the staircase of epochs.

    Args:
        folder: that holds the runs.
        run: name of the run.
    """

    def __init__(self, folder: Path, run: str) -> None:
        super().__init__(folder, "", run, default_hp_metric=False)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


class Charts(Callback):
    """Lays out the charts of :data:`CHARTS` when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.logger, Board) and trainer.is_global_zero:
            trainer.logger.experiment.add_custom_scalars(CHARTS)


class TextSample(Callback):
    """Writes a text with the model after each validation, and shows it on the TensorBoard page.

    The seed is fixed: what changes from sample to sample is the model.
    """

    LENGTH = 300

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logger = trainer.logger
        if trainer.sanity_checking or not isinstance(logger, Board) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, TextModule)
        val = trainer.datamodule.tokens.val  # type: ignore[attr-defined]
        prompt = torch.tensor(val[:1].astype("int64"), device=pl_module.device)
        training = pl_module.net.training
        pl_module.net.eval()
        tokens = list(continue_text(pl_module.net, prompt, self.LENGTH))
        pl_module.net.train(training)
        text = pl_module.tokenizer.decode(tokens)
        # Indented by four: TensorBoard reads Markdown, and shows such lines as they are.
        shown = "\n".join("    " + line for line in text.splitlines())
        logger.experiment.add_text("sample", shown, trainer.global_step)


class FinalScore(Callback):
    """Logs the hyper-parameters with the best validation loss, for TensorBoard's table of runs."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TextModule)
        best = next((c.best_model_score for c in trainer.checkpoint_callbacks if c.monitor), None)  # type: ignore[attr-defined]
        if isinstance(trainer.logger, Board) and best is not None:
            data = trainer.datamodule.hyperparameters()  # type: ignore[attr-defined]
            trainer.logger.log_hyperparams(
                pl_module.hyperparameters() | data, {"val/best_loss": float(best)}, trainer.global_step
            )

"""TensorBoard: the logger of a run, and the charts that its page shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from mmrec.training.callbacks.measurements import GATE, HALF_LIFE, POSITION, STATE
from mmrec.training.compat import survive_full_disk

CHARTS = {
    "loss": {
        "training and validation, nats/token": ["Multiline", ["train/loss", "val/loss"]],
        "validation by position in the text, nats/token": ["Multiline", [f"{POSITION}/.*"]],
    },
    "recurrent layers": {
        "half-life, tokens: median of each layer": ["Multiline", [f"{HALF_LIFE}/.*"]],
        "state, root mean square": ["Multiline", [f"{STATE}/.*"]],
    },
    "gates, 0 shut, 1 open": {
        name: ["Multiline", [f"{GATE}/.*_{name}"]] for name in ("recurrence", "input", "write", "output")
    },
}
"""Curves that belong into one chart, on the page's tab "Custom scalars"; tags are regular expressions."""


class TensorBoardRunLogger(TensorBoardLogger):
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
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, TensorBoardLogger):
                survive_full_disk(logger.experiment)
                logger.experiment.add_custom_scalars(CHARTS)

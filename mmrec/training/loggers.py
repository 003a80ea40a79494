"""Measurements, texts and histograms for whatever loggers a trainer has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, Logger, TensorBoardLogger
from torch import Tensor


def last_step(trainer: Trainer) -> int:
    """Return the number of the last update, from 0: Lightning logs what a validation measured by it."""
    return max(0, trainer.global_step - 1)


def log_scalars(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Log ``values`` by their names to every logger, at the last update."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), last_step(trainer))


def log_text(trainer: Trainer, name: str, text: str, markdown: str | None = None) -> None:
    """Log a text to every logger that takes texts: TensorBoard, Comet, those that are like W&B's and MLflow's.

    Args:
        trainer: has the loggers.
        name: of the text.
        text: as it is.
        markdown: the same for TensorBoard, which shows Markdown.
    """
    step = last_step(trainer)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text if markdown is None else markdown, step)
        elif hasattr(logger, "log_text"):  # WandbLogger: a table of one cell
            logger.log_text(key=name, columns=[name], data=[[text]], step=step)
        elif isinstance(logger, CometLogger):
            logger.experiment.log_text(text, step=step, metadata={"name": name})
        elif hasattr(getattr(logger, "experiment", None), "log_text"):  # MLFlowLogger: a file
            logger.experiment.log_text(logger.run_id, text, f"{name}/{step}.txt")  # type: ignore[attr-defined]


def log_histogram(trainer: Trainer, name: str, values: Tensor, bins: np.ndarray) -> None:
    """Log a histogram of ``values`` to every logger that makes histograms: TensorBoard's."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(name, values, last_step(trainer), bins=bins)


def log_result(logger: Logger, hyperparameters: dict[str, Any], result: Mapping[str, float], step: int) -> None:
    """Log what a run was trained with, and what came of it: where a logger compares runs, as one entry."""
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(hyperparameters, dict(result), step)
    else:
        logger.log_hyperparams(hyperparameters)
        logger.log_metrics(dict(result), max(0, step - 1))

"""What the TensorBoard page shows."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mmrec.data.batches import Batch
from mmrec.inference.generate import generate_tokens
from mmrec.inference.metrics import MetricsByPosition
from mmrec.inference.sampling import SamplingOptions
from mmrec.model.statistics import layer_statistics
from mmrec.training.module import RecurrentLMModule

POSITION, HALF_LIFE, STATE, GATE = "val_loss_by_position", "val_half_life", "val_state_norm", "val_gate"
"""What the tags of measurements at validations begin with."""
HALF_LIVES = "val_half_life_log2"
"""What the tags of the histograms of half-lives begin with."""

CHARTS = {
    "loss": {
        "training and validation, nats/token": ["Multiline", ["train/loss", "val/loss"]],
        "validation by position in the text, nats/token": ["Multiline", [f"{POSITION}/.*"]],
    },
    "memories": {
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


def _shown(trainer: Trainer, pl_module: LightningModule) -> TensorBoardRunLogger | None:
    """Return the page that this process shows things on after a validation, if it does."""
    board = trainer.logger
    if trainer.sanity_checking or not isinstance(board, TensorBoardRunLogger) or not trainer.is_global_zero:
        return None
    # A model cut over processes runs only in all of them at once.
    return None if isinstance(pl_module, RecurrentLMModule) and pl_module.is_sharded else board


def _start_of_validation(trainer: Trainer, length: int, device: torch.device) -> Tensor:
    val = trainer.datamodule.tokens.val  # type: ignore[attr-defined]
    return torch.tensor(val[:length].astype("int64"), device=device)


def _step(trainer: Trainer) -> int:
    """Return the number of the last update, from 0: Lightning logs what a validation found by it."""
    return max(0, trainer.global_step - 1)


def _outlive(writer: SummaryWriter) -> None:
    """Make a writer that meets a full disk say so once, and write no more; training is worth more than its curves.

    TensorBoard would print a traceback from its own thread, and raise in every later call.
    """
    events = writer.file_writer.event_writer._async_writer._writer  # type: ignore[attr-defined]
    failed = False

    def guarded(call: Callable[..., object]) -> Callable[..., None]:
        def attempt(*data: bytes) -> None:
            nonlocal failed
            try:
                if not failed:
                    call(*data)
            except OSError as error:
                failed = True
                said = f"{writer.log_dir}: cannot write the curves: {error.strerror}; training goes on without them"
                print(f"\n{said}", file=sys.stderr, flush=True)

        return attempt

    for name in ("write", "flush", "close"):
        setattr(events, name, guarded(getattr(events, name)))


class Charts(Callback):
    """Lays out the charts of :data:`CHARTS` when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.logger, TensorBoardRunLogger) and trainer.is_global_zero:
            _outlive(trainer.logger.experiment)
            trainer.logger.experiment.add_custom_scalars(CHARTS)


class LossByPosition(Callback):
    """Logs the loss of each validation by position in the text, in the bands of ``mmrec score``."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._score = MetricsByPosition()
        self._position = 1  # the first token is not scored

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
        self._score.update(nats, pl_module.token_lengths[batch.targets.flatten()], self._position)
        self._position += len(nats)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            isinstance(trainer.logger, TensorBoardRunLogger)
            and trainer.is_global_zero
            and not trainer.sanity_checking
        ):
            losses = {
                f"{POSITION}/from_{start}": float(score.compute()["loss"])
                for start, score in self._score.compute().items()
            }
            trainer.logger.log_metrics(losses, _step(trainer))


class MemoryStatistics(Callback):
    """Logs after each validation how long the memories last, what they hold, and how far their gates open.

    Measured on the first tokens of the validation text; a hundredth of the time that the validation takes.
    """

    LENGTH = 1024
    BINS = np.arange(-4, 24.25, 0.25)
    """Of the histograms: quarters of a power of 2."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        board = _shown(trainer, pl_module)
        if board is None:
            return
        assert isinstance(pl_module, RecurrentLMModule)
        step, figures = _step(trainer), {}
        tokens = _start_of_validation(trainer, self.LENGTH, pl_module.device)
        for number, layer in enumerate(layer_statistics(pl_module.net, tokens)):
            name = f"layer{number}_{layer.kind}"
            figures[f"{HALF_LIFE}/{name}"] = float(layer.half_lives.median())
            figures[f"{STATE}/{name}"] = layer.state_norm
            figures |= {f"{GATE}/{name}_{gate}": value for gate, value in layer.gates.items()}
            powers = layer.half_lives.log2().clamp(self.BINS[0], self.BINS[-1])
            board.experiment.add_histogram(f"{HALF_LIVES}/{name}", powers, step, bins=self.BINS)
        board.log_metrics(figures, step)


class TextSample(Callback):
    """Writes a text with the model after each validation, and shows it on the TensorBoard page.

    The seed is fixed: what changes from sample to sample is the model. A table shows the samples so far side by
    side; of many, every second of the earlier ones is left out.
    """

    LENGTH = 300
    ROWS, IN_TABLE = 24, 160

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        board = _shown(trainer, pl_module)
        if board is None:
            return
        assert isinstance(pl_module, RecurrentLMModule)
        training = pl_module.net.training
        pl_module.net.eval()
        prompt = _start_of_validation(trainer, 1, pl_module.device)
        text = pl_module.tokenizer.decode(generate_tokens(pl_module.net, prompt, SamplingOptions(self.LENGTH)))
        pl_module.net.train(training)
        # Indented by four: TensorBoard reads Markdown, and shows such lines as they are.
        shown = "\n".join("    " + line for line in text.splitlines())
        board.experiment.add_text("sample", shown, _step(trainer))
        loss = trainer.callback_metrics.get("val/loss")
        row = [trainer.global_step, None if loss is None else float(loss), text[: self.IN_TABLE]]
        self._rows = [*(self._rows if len(self._rows) < self.ROWS else self._rows[::2]), row]
        board.experiment.add_text("progress", samples_table(self._rows), _step(trainer))

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
    """Logs the hyper-parameters with the best validation loss, for TensorBoard's table of runs."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        saved = trainer.checkpoint_callbacks
        best = next((c.best_model_score for c in saved if c.monitor == "val/loss"), None)  # type: ignore[attr-defined]
        if isinstance(trainer.logger, TensorBoardRunLogger) and best is not None:
            data = trainer.datamodule.hyperparameters()  # type: ignore[attr-defined]
            trainer.logger.log_hyperparams(
                pl_module.hyperparameters() | data, {"val/best_loss": float(best)}, trainer.global_step
            )

"""What the terminal shows of a training: a table of the model at its start, and the progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import lightning.pytorch.callbacks
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mmrec.model import RecurrentLM
from mmrec.training.callbacks.throughput import Throughput
from mmrec.training.compat import is_accumulating, is_logging_step
from mmrec.training.module import RecurrentLMModule

SECONDS_ON_TERMINAL, SECONDS_ELSEWHERE = 0.1, 10.0
"""How often the bar is drawn anew: at each update it would take 1 % of a small model's time, and make a file that the
output is written to long."""


class ProgressBar(TQDMProgressBar):
    """Lightning's bar over all updates of a training, with the time that is left, where its end is planned.

    The time goes by what updates and validations have taken since training started. Where no end is planned, there is
    a bar for each epoch. The loss and the tokens per second are those that are logged: to read one at every update
    would be to wait for the device at every update. The number of the version, which here is a name, is left out.

    Args:
        throughput: measures the tokens per second.
    """

    def __init__(self, throughput: Throughput | None = None) -> None:
        super().__init__()
        self._throughput = throughput
        self._logged: dict[str, Any] = {}
        self._seconds = SECONDS_ON_TERMINAL if sys.stdout.isatty() else SECONDS_ELSEWHERE
        self._drawn = float("-inf")

    def _should_update(self, current: int, total: int) -> bool:
        now = time.monotonic()
        if not self.is_enabled or (now < self._drawn + self._seconds and current != total):
            return False
        self._drawn = now
        return True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_logging_step(trainer) and "train/loss" in trainer.callback_metrics:
            self._logged = {"train/loss": float(trainer.callback_metrics["train/loss"])}
            if self._throughput is not None and self._throughput.latest is not None:
                self._logged["train/tokens_per_second"] = self._throughput.latest
        planned, step = _planned_steps(pl_module), trainer.global_step
        if planned is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif not is_accumulating(trainer):
            self.train_progress_bar.total, self.train_progress_bar.n = planned, step
            if self._should_update(step, planned):
                self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start, self._first_step = time.monotonic(), trainer.global_step
        self.train_progress_bar.initial = self._first_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        planned = _planned_steps(pl_module)
        if planned is None:
            super().on_train_epoch_start(trainer, pl_module)
        else:
            self.train_progress_bar.total, self.train_progress_bar.n = planned, trainer.global_step
            self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"} | self._logged
        planned, step = _planned_steps(pl_module), trainer.global_step
        if trainer.training and planned is not None and step > self._first_step:
            pace = (time.monotonic() - self._start) / (step - self._first_step)
            metrics["left"] = str(timedelta(seconds=round(pace * max(0, planned - step))))
        return metrics


def has_progress_bar(callbacks: Sequence[Callback]) -> bool:
    """Return whether one of ``callbacks`` is a progress bar, of any kind; Lightning allows one."""
    return any(isinstance(callback, lightning.pytorch.callbacks.ProgressBar) for callback in callbacks)


def _planned_steps(pl_module: LightningModule) -> int | None:
    """Return the number of updates at which the training is planned to end; None where nothing says so."""
    assert isinstance(pl_module, RecurrentLMModule)
    return pl_module.planned_steps


class Summary(Callback):
    """Prints where the parameters are, and the size of what is remembered of a text."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        if stage == "fit":
            rank_zero_info(summary_table(pl_module.net))


def summary_table(net: RecurrentLM) -> str:
    """Return the model as a table: its parts, their parameters, and the size of the recurrent state of a row."""
    layer_types = net.layer_types()
    sizes = [sum(tensor.numel() for tensor in layer) for layer in net.zero_state(1, torch.device("meta"))]
    layers = [sum(p.numel() for p in block.parameters()) for block in net.blocks]
    total = net.parameter_count()
    rows = [("part", "parameters", "recurrent state")]
    counting = 0 if net.counts is None else sum(p.numel() for p in net.counts.parameters())
    rows.append(("embedding, output, norm", f"{total - sum(layers) - counting:,}", ""))
    for kind in dict.fromkeys(layer_types):
        members = [i for i, other in enumerate(layer_types) if other == kind]
        parameters, numbers = sum(layers[i] for i in members), sum(sizes[i] for i in members)
        rows.append((f"{len(members)} x {kind} layer", f"{parameters:,}", f"{numbers:,} numbers"))
    if counting:
        rows.append(("counts of tokens", f"{counting:,}", f"{sizes[-1]:,} numbers"))
    remembered = net.state_size()
    size = f"{remembered:,} numbers ({remembered * 4 / 1000:.0f} kB), however long it is"
    rows.append(("in all", f"{total:,}", size))
    return "\n".join(f"{name:<24}{parameters:>14}   {state}".rstrip() for name, parameters, state in rows)

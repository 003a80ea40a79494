"""A callback that writes down which tokens a process was given to learn from."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class TokensRead(Callback):
    """Appends a line for each batch to ``read.jsonl``: run, update, process, inputs and targets of its rows."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        row = {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "inputs": batch.inputs.tolist(),
            "targets": batch.targets.tolist(),
        }
        with open("read.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

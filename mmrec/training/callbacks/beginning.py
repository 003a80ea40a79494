"""What is done when a training begins, and not where it is refused before."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer


class Beginning(Callback):
    """Calls a function in the first process as soon as training begins: its run is locked by then.

    Args:
        call: has no arguments.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._call()

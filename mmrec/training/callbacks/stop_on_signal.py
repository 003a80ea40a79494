"""Stopping by a signal: Ctrl-C (SIGINT), SIGTERM, and Slurm's warning before the time is up (SIGUSR1)."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed

from mmrec.training.callbacks.checkpointing import LastCheckpoint
from mmrec.training.compat import is_accumulating, leave_out_sigterm_broadcast
from mmrec.training.exchange import gather_all
from mmrec.training.slurm import REQUEUE_SIGNAL, current_job, requeue


class StoppedBySignal(Exception):
    """Raised in training after a signal, at the end of an update and after saving.

    Args:
        number: of the signal.
        path: the checkpoint to resume from.
    """

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.path = path


class StopOnSignal(Callback):
    """Ends training after the update in progress, once the last checkpoint is saved, when a signal asks for it.

    The first Ctrl-C or SIGTERM is obeyed so; a second Ctrl-C ends the process at once. Under Slurm its warning before
    the time is up (SIGUSR1) does the same, and has the job queued again. Where several processes train, one that gets
    the signal is enough.

    It has to come after all other callbacks (:class:`TrainingCLI` appends it): what they change at the end of a batch
    belongs into the checkpoint. Lightning saves from within the signal's handler instead, wherever training is
    (issue 21406).

    Args:
        last: saves.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last
        self._signal: int | None = None
        self._says = True
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signal, self._says = None, trainer.is_global_zero
        numbers = [signal.SIGINT, signal.SIGTERM, *([REQUEUE_SIGNAL] if REQUEUE_SIGNAL and current_job() else [])]
        leave_out_sigterm_broadcast(trainer)  # in a thread, too: the others wait for no such thing
        try:
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        except ValueError:  # not in the main thread, which alone may handle signals
            self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # the second one ends the process, wherever it is
        if self._says:  # a terminal sends Ctrl-C to all processes
            # Written past Python's buffers, which the signal may have interrupted.
            os.write(2, b"\nStopping after this update ...\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = 0 if is_accumulating(trainer) else self._agreed_signal(trainer)
        if not number:
            return
        self.last.save(trainer)
        job = current_job()
        if number == REQUEUE_SIGNAL and job is not None and trainer.is_global_zero:
            requeue(job)
        raise StoppedBySignal(number, self.last.path)

    def _agreed_signal(self, trainer: Trainer) -> int:
        """Return the signal that one of the processes has been sent, or 0: all must stop after the same update."""
        mine = self._signal or 0
        if trainer.world_size == 1:
            return mine
        if trainer.strategy.root_device.type == "cpu":
            return int(gather_all(torch.tensor([mine])).max())
        if self._group is None:
            # On the CPUs: to agree by the devices would be to wait for them at every update.
            self._group = distributed.new_group(backend="gloo")
        agreed = torch.tensor(mine)
        distributed.all_reduce(agreed, distributed.ReduceOp.MAX, self._group)
        return int(agreed)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            # Lightning has given back what it replaced itself by now; its own handler would swallow the next signal.
            if number == signal.SIGINT or signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._before = {}
        self._group = None

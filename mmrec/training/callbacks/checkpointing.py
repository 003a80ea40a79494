"""What happens around training: saving, stopping, measuring, and what the terminal shows of it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from mmrec.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from mmrec.checkpoints.runs import BEST, LAST, PREVIOUS
from mmrec.core.errors import UserError
from mmrec.data.batches import Batch
from mmrec.model import RecurrentLM
from mmrec.training.module import RecurrentLMModule
from mmrec.training.slurm import REQUEUE_SIGNAL, requeue, requeues


class DurableCheckpointIO(TorchCheckpointIO):
    """CheckpointIO plugin for :mod:`mmrec.checkpoints.checkpoint`: files are whole or absent, and run no code.

    Args:
        go_on: a save that fails is reported, and training goes on; the next save tries again.
        damaged: a ``last.ckpt`` that must not become the previous one, which is whole.
    """

    def __init__(self, go_on: bool = False, damaged: Path | None = None) -> None:
        super().__init__()
        self.go_on = go_on
        self.damaged = damaged

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        keeps = target.name == f"{LAST}.ckpt" and target != self.damaged
        try:
            write_checkpoint(checkpoint, target, target.with_name(f"{PREVIOUS}.ckpt") if keeps else None)
            if target == self.damaged:
                self.damaged = None  # it is whole now
        except UserError as error:
            if not self.go_on:
                raise
            # To the terminal itself: a save that failed is worth a line, whatever becomes of log messages.
            print(f"\n{error}; training goes on, the next save tries again", file=sys.stderr, flush=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # Lightning brings old checkpoints to its present form, by their version; a model alone has nothing of it.
        return {"pytorch-lightning_version": lightning.__version__} | read_checkpoint(Path(path), map_location)


class StoppedBySignal(Exception):
    """Training was stopped by a signal, at the end of an update and after saving.

    Args:
        number: of the signal.
        path: the checkpoint to go on from.
    """

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.path = path


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, which also knows its best again where the folder of the run has been moved."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The second would be best-v1.ckpt; which of them is the best nobody could tell.
        if self.save_top_k not in (0, 1):
            raise UserError(
                f"--best.save_top_k is {self.save_top_k}; it must be 1, as best.ckpt is one, or 0 for none; for "
                f"more, add --trainer.callbacks+=ModelCheckpoint with options of its own"
            )
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own, score = Path(self.dirpath or ".") / f"{BEST}.ckpt", state_dict["best_model_score"]
        same_run = Path(state_dict["dirpath"]).parent.name == own.parent.parent.name
        if same_run and own.is_file() and score is not None:
            path = str(own)
            moved = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            state_dict = state_dict | moved | {"best_k_models": {path: score}}
        super().load_state_dict(state_dict)


class LastCheckpoint(ModelCheckpoint):
    """The checkpoint to go on from: saved every so many steps, at the end, and when a signal stops the run.

    The first Ctrl-C or SIGTERM is obeyed after the update that is under way, and saving; a second Ctrl-C at once.
    Under Slurm its warning before the time is up (SIGUSR1) does the same, and has the job queued again.

    Args:
        every_n_train_steps: steps between two saves.
        if_save_fails: "stop" ends the run where a checkpoint cannot be written; "go_on" says so and trains on.
    """

    def __init__(self, every_n_train_steps: int = 100, if_save_fails: Literal["stop", "go_on"] = "stop") -> None:
        super().__init__(
            filename=LAST,
            monitor=None,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.if_save_fails = if_save_fails
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        self._validation_due = False

    @property
    def path(self) -> Path:
        """Where it is saved."""
        return Path(self.dirpath or ".") / f"{LAST}.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._signal = None
        numbers = [signal.SIGINT, signal.SIGTERM, *([REQUEUE_SIGNAL] if requeues() else [])]
        try:
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        except ValueError:  # not in the main thread, which alone may handle signals
            self._before = {}
        if self._validation_due:
            pl_module.on_train_start()  # Lightning calls it after this: what is saved below needs it before
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        """Make up for the validation that the run was stopped before: Lightning would go on without it."""
        epochs: Any = trainer.fit_loop.epoch_progress
        counted = [(progress, progress.processed, progress.completed) for progress in (epochs.total, epochs.current)]
        for progress, *_ in counted:  # Lightning has counted an epoch that ends here already; what is saved must not
            progress.processed = progress.completed = progress.ready - 1
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False  # none of it has been done yet
        trainer.validating = True
        loop.run()
        trainer.training = True
        for progress, processed, completed in counted:
            progress.processed, progress.completed = processed, completed

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # the second one ends the process, wherever it is
        # Written past Python's buffers, which the signal may have interrupted.
        os.write(2, b"\nStopping after this update ...\n")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the epoch that is under way: Lightning does not after resuming at the end of one.

        What is saved in that epoch would then be taken for its end, and a run resumed from there be too long.
        """
        epochs: Any = trainer.fit_loop.epoch_progress
        for progress in (epochs.total, epochs.current):
            progress.ready = progress.started = progress.processed + 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._validation_due = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # The end is not left to on_train_end: by then Lightning counts an epoch that max_steps broke off as
        # complete, and a run that is given more steps would go on from a wrong place.
        ending = trainer.is_last_batch or 0 <= trainer.max_steps <= trainer.global_step
        stop = not trainer.fit_loop._should_accumulate() and self._agreed_signal(trainer)
        if (ending or stop) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path)
        if stop:
            if stop == REQUEUE_SIGNAL and trainer.is_global_zero:
                requeue()
            raise StoppedBySignal(stop, self.path)

    def _agreed_signal(self, trainer: Trainer) -> int:
        """Return the signal that one of the processes has been sent, or 0: all must stop after the same update."""
        mine = self._signal or 0
        if trainer.world_size == 1:
            return mine
        return int(trainer.strategy.reduce(torch.tensor(mine, device=trainer.strategy.root_device), reduce_op="max"))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_due = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the validation changed: the best loss so far, and the patience that is left."""
        super().on_validation_end(trainer, pl_module)
        # Gradients that are still being accumulated are in no checkpoint: the update is awaited.
        accumulating = trainer.fit_loop._should_accumulate()
        trying_out = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.state.fn == "fit" and not trying_out and not accumulating:
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._validation_due = state_dict.get("validation_due", False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping whose patience is the one asked for now, not the one a resumed checkpoint remembers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})


class GradientGuard(Callback):
    """Logs the gradient's norm before clipping, and keeps an update that would spoil the weights from happening.

    Args:
        if_not_finite: "stop" ends the run before the update; "skip" leaves the update out, forgets what was read,
            and counts it.
    """

    def __init__(self, if_not_finite: Literal["stop", "skip"] = "stop") -> None:
        self.if_not_finite = if_not_finite
        self.skipped = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            pl_module.log("train/grad_norm", norm)
        elif getattr(trainer.precision_plugin, "scaler", None) is not None:
            pass  # float16's loss scaling meets overflows as a matter of course, and skips them itself
        else:
            bad = [n for n, p in pl_module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            what = (
                f"the gradient is not finite at step {trainer.global_step} (first in {bad[0] if bad else 'its norm'})"
            )
            if self.if_not_finite == "stop":
                raise UserError(
                    f"{what}; stopped before the update, the last checkpoint is good; try a lower "
                    f"--model.learning_rate, or --gradients.if_not_finite skip"
                )
            self.skipped += 1
            rank_zero_info(f"{what}; update left out, {self.skipped} so far")
            for parameter in pl_module.parameters():
                parameter.grad = None
            pl_module.reset_carried_state()
        if self.if_not_finite == "skip":
            pl_module.log("train/skipped_updates", float(self.skipped))

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]


class LearningRate(Callback):
    """Logs the learning rate once: Lightning's monitor repeats it for every group of parameters."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        pl_module.log("train/learning_rate", optimizer.param_groups[0]["lr"])


class Throughput(Callback):
    """Logs training tokens per second, over the steps since it last did; validation does not count."""

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - self._start
        self._tokens += batch.inputs.numel() * trainer.world_size
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            pl_module.log("train/tokens_per_second", self._tokens / self._seconds, prog_bar=True)
            self._tokens, self._seconds = 0, 0.0


class ProgressBar(TQDMProgressBar):
    """Lightning's bar without the number of the version, which here is a name."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


class Summary(Callback):
    """Prints where the parameters are, and the size of what is remembered of a text."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        if stage == "fit":
            rank_zero_info(summary_table(pl_module.net))


def summary_table(net: RecurrentLM) -> str:
    """Return the model as a table: its parts, their parameters, and the numbers in the state of one text."""
    layer_types = net.layer_types()
    state = [sum(tensor.numel() for tensor in layer) for layer in net.zero_state(1, torch.device("meta"))]
    layers = [sum(p.numel() for p in block.parameters()) for block in net.blocks]
    total = net.parameter_count()
    rows = [("part", "parameters", "memory of a text")]
    rows.append(("embedding, output, norm", f"{total - sum(layers):,}", ""))
    for kind in dict.fromkeys(layer_types):
        members = [i for i, other in enumerate(layer_types) if other == kind]
        parameters, numbers = sum(layers[i] for i in members), sum(state[i] for i in members)
        rows.append((f"{len(members)} x {kind} memory layer", f"{parameters:,}", f"{numbers:,} numbers"))
    remembered = net.state_size()
    size = f"{remembered:,} numbers ({remembered * 4 / 1000:.0f} kB), however long it is"
    rows.append(("in all", f"{total:,}", size))
    return "\n".join(f"{name:<24}{parameters:>14}   {memory}".rstrip() for name, parameters, memory in rows)

"""What happens around training: saving, stopping, measuring, and what the terminal shows of it."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from mmrec.checkpoint import read_checkpoint, write_checkpoint
from mmrec.errors import UserError
from mmrec.model import MemoryLM
from mmrec.module import TextModule
from mmrec.stream import Batch


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's door to :mod:`mmrec.checkpoint`: files that are whole or absent, and never unpickle code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)


class Stopped(Exception):
    """Training was stopped by a signal, at the end of a batch and after saving.

    Args:
        number: of the signal.
        path: the checkpoint to go on from.
    """

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.path = path


class LastCheckpoint(ModelCheckpoint):
    """The checkpoint to go on from: saved every so many steps, at the end, and when a signal stops the run.

    The first Ctrl-C or SIGTERM is obeyed after the update that is under way, and saving; a second Ctrl-C at once.

    Args:
        every_n_train_steps: steps between two saves.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, every_n_train_steps: int = 100) -> None:
        super().__init__(
            filename="last",
            monitor=None,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def path(self) -> Path:
        """Where it is saved."""
        return Path(self.dirpath or ".") / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._signal = None
        try:
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        except ValueError:  # not in the main thread, which alone may handle signals
            self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        rank_zero_info("\nStopping after this update ...")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # The end is not left to on_train_end: by then Lightning counts an epoch that max_steps broke off as
        # complete, and a run that is given more steps would go on from a wrong place.
        ending = trainer.is_last_batch or 0 <= trainer.max_steps <= trainer.global_step
        # Gradients that are still being accumulated are in no checkpoint: the update is awaited.
        updated = ending or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if ending or (updated and self._signal is not None):
            trainer.save_checkpoint(self.path)
        if updated and self._signal is not None:
            raise Stopped(self._signal, self.path)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the validation changed: the best loss so far, and the patience that is left."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Patience(EarlyStopping):
    """Early stopping whose patience is the one asked for now, not the one a resumed checkpoint remembers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})


class GradientNorm(Callback):
    """Logs the gradient's norm before clipping, and stops before an update that would spoil the weights."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            bad = [n for n, p in pl_module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            raise UserError(
                f"the gradient is not finite at step {trainer.global_step} (first in "
                f"{bad[0] if bad else 'its norm'}); stopped before the update, the last checkpoint is good; try a "
                f"lower --model.learning_rate"
            )
        pl_module.log("train/grad_norm", norm)


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
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/tokens_per_second", self._tokens / self._seconds, prog_bar=True)
            self._tokens, self._seconds = 0, 0.0


class ProgressBar(TQDMProgressBar):
    """Lightning's bar without the number of the version, which here is a name."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


class Summary(Callback):
    """Prints where the parameters are, and the size of what is remembered of a text."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, TextModule)
        if stage == "fit":
            rank_zero_info(summary_table(pl_module.net))


def summary_table(net: MemoryLM) -> str:
    """Return the model as a table: its parts, their parameters, and the numbers in the state of one text."""
    kinds = net.kinds()
    state = [sum(tensor.numel() for tensor in layer) for layer in net.zero_state(1, torch.device("meta"))]
    layers = [sum(p.numel() for p in block.parameters()) for block in net.blocks]
    total = net.parameter_count()
    rows = [("part", "parameters", "memory of a text")]
    rows.append(("embedding, output, norm", f"{total - sum(layers):,}", ""))
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        parameters, numbers = sum(layers[i] for i in members), sum(state[i] for i in members)
        rows.append((f"{len(members)} x {kind} memory layer", f"{parameters:,}", f"{numbers:,} numbers"))
    remembered = net.state_count()
    size = f"{remembered:,} numbers ({remembered * 4 / 1024:.0f} kB), however long it is"
    rows.append(("in all", f"{total:,}", size))
    return "\n".join(f"{name:<24}{parameters:>14}   {memory}".rstrip() for name, parameters, memory in rows)

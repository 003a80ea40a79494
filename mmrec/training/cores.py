"""Training on several cores of one machine: the strategy ``cores``, and how its processes begin."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, distributed

from mmrec.checkpoints.checkpoint import read_checkpoint
from mmrec.checkpoints.contents import PROGRESS_KEY
from mmrec.core.devices import device_of_accelerator
from mmrec.core.errors import UserError, exit_status, one_line
from mmrec.core.forks import can_fork, end, fork, wait_for
from mmrec.core.threads import available_cores, available_memory, is_set_by_user, processes_that_pay
from mmrec.model import ModelConfig, layer_parameters
from mmrec.model.ops import dispatch
from mmrec.training import exchange
from mmrec.training.arithmetic import DIFFERS
from mmrec.training.compat import ProcessLauncher, call_in_place, is_left_to_lightning, most_processes
from mmrec.training.exchange import Exchange, ProcessEndedError, failures_of_gloo
from mmrec.training.slurm import current_job

BYTES_OF_PARAMETER, MEMORY_SHARE = 16, 0.25
"""What a process needs for a parameter, with its gradient, momentum and buffers; and the share of the memory that all
may take for that."""
PATIENCE = 10.0
"""Seconds that other processes have to end by themselves after this one has failed."""
MOST_SAID = 4096
"""Bytes that a process says of what was wrong: a pipe takes so many at once."""


class SharedMemoryStrategy(DDPStrategy):
    """The model replicated in processes on the cores of one machine, which exchange gradients in memory they share.

    The rows of a batch are shared out over them, so that their number does not change the updates. The gradients are
    exchanged after the backward pass: there is no wrapper around the model that would do it within.
    """

    _accumulates = False
    _exchange: Exchange | None = None

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        environment = self.cluster_environment
        assert environment is not None
        if self.num_processes == 1 or environment.creates_processes_externally:
            return
        exchange.kernels()  # while they are compiled there is another thread, of which no copy can be made
        if can_fork():
            self._launcher = ForkLauncher(environment, self.num_processes, self.num_nodes)

    def setup_distributed(self) -> None:
        before = logging.root.manager.disable
        logging.disable(logging.INFO)  # seven lines of Lightning about processes that nobody has asked for
        try:
            super().setup_distributed()
        finally:
            logging.disable(before)

    def check(self) -> None:
        """Raise UserError where this strategy cannot train: several machines would wait for each other."""
        if self.root_device.type != "cpu" or self.num_nodes > 1:
            raise UserError(
                "--trainer.strategy cores is for the CPU cores of one machine; use ddp for GPUs and several"
            )
        exchange.kernels()

    def configure_ddp(self) -> None:
        assert self.model is not None
        self.check()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            distributed.broadcast(tensor.detach(), 0)
        self._exchange = exchange.begin(sum(parameter.numel() for parameter in self.model.parameters()))

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False

    def post_backward(self, closure_loss: Tensor) -> None:
        if self._accumulates or self._exchange is None or self._exchange.processes == 1:
            return
        assert self.model is not None
        self._exchange.mean_gradients(self.model.parameters())

    def teardown(self) -> None:
        self._exchange = None
        exchange.end()
        super().teardown()


def choose_processes(config: Any, command: str, checkpoint: Path | None) -> None:
    """Set how many processes train, where nobody has said it, in the parsed ``config`` of ``command``.

    On a CPU they are as many as pay, on GPUs one: each would add ``data.batch_size`` rows to an update. A text is
    read by one.

    Args:
        config: is changed.
        command: fit, validate, test or predict.
        checkpoint: of the run that is resumed, or None.
    """
    trainer = config.trainer
    if command != "fit" and trainer.strategy == "cores":
        trainer.devices, trainer.strategy = 1, "auto"
    if command == "fit" and checkpoint is not None and _cannot_begin(trainer):
        trainer.devices = trainer.strategy = "auto"
    if not is_left_to_lightning(trainer):
        return
    trainer.devices, name = 1, str(trainer.accelerator)
    if command == "fit" and name in ("auto", "cpu") and device_of_accelerator(name).type == "cpu":
        before = None if checkpoint is None else _processes_of(checkpoint)
        count = processes_for(config.model.config, config.data.batch_size, config.data.seq_len, before)
        if count > 1:
            trainer.devices, trainer.strategy = count, "cores"
            rows = config.data.batch_size
            rank_zero_info(f"{count} processes share out the {rows} rows of a batch; --trainer.devices 1 leaves one")


def _cannot_begin(trainer: Any) -> bool:
    """Return whether the strategy ``cores`` of a run that is resumed finds no compiled kernels, or too few cores."""
    if trainer.strategy != "cores" or not str(trainer.devices).isdigit() or int(trainer.devices) == 1:
        return False
    return not dispatch.uses_native() or int(trainer.devices) > most_processes()


def processes_for(config: ModelConfig, rows: int, seq_len: int, before: int | None = None, spare: int = 1) -> int:
    """Return by how many processes a model is trained on the CPU of this machine where nobody has said it.

    The number follows from sizes, not from a trial, so that a command gives the same bits each time. One core is left
    to other programs: where one of several processes has to wait for them, all do.

    Args:
        config: of the model.
        rows: of a batch.
        seq_len: tokens of a row.
        before: those of the run that is resumed, which keeps its number where there are as many cores.
        spare: cores that are left to other programs.
    """
    cores = 1 if is_set_by_user() or current_job() is not None else available_cores()
    fit = int(MEMORY_SHARE * available_memory() / (BYTES_OF_PARAMETER * layer_parameters(config)))
    pays = processes_that_pay(config.dim, rows, seq_len, min(cores - spare, fit))
    count = pays if before is None or before > cores else before
    if count > 1 and not (dispatch.uses_native() and can_fork()):
        count = 1
    if before is not None and count != before:
        rank_zero_info(f"The run was trained by {before} process(es) until now, and goes on by {count}: {DIFFERS}")
    return count


def _processes_of(checkpoint: Path) -> int:
    """Return by how many processes the training was done that ``checkpoint`` is of."""
    progress = read_checkpoint(checkpoint, mmap=True, verify=False).get(PROGRESS_KEY)
    return len(progress["random"]) if progress else 1


def rows_of_process(trainer: Trainer | None, batch_size: int) -> int:
    """Return how many rows of a batch of ``batch_size`` this process has: its share with the strategy ``cores``.

    Raises:
        UserError: they cannot be shared out evenly.
    """
    if trainer is None or not isinstance(trainer.strategy, SharedMemoryStrategy):
        return batch_size
    processes = trainer.world_size
    if batch_size % processes:
        raise UserError(
            f"data.batch_size is {batch_size}, which {processes} processes cannot share out evenly; give a multiple "
            "of their number, or another --trainer.devices"
        )
    return batch_size // processes


def check_processes(trainer: Trainer, batch_size: int) -> None:
    """Raise UserError where the strategy ``cores`` cannot train on such batches, before any process begins."""
    if isinstance(trainer.strategy, SharedMemoryStrategy):
        trainer.strategy.check()
        rows_of_process(trainer, batch_size)


class ForkLauncher(ProcessLauncher):
    """Begins the other processes of a training as copies of this one, which is the first of them.

    Lightning's own starts the command again for each, which takes seconds.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Call ``function`` in every process, and return what it returns in this one."""
        assert trainer is not None
        environment = {
            "MASTER_ADDR": self.cluster_environment.main_address,
            "MASTER_PORT": str(self.cluster_environment.main_port),
            "WORLD_SIZE": str(self.num_processes),
        }
        os.environ |= environment
        others: list[int] = []
        source, target = os.pipe()  # what was wrong, by the others: it is said once
        try:
            for rank in range(1, self.num_processes):
                others.append(fork(partial(_be_other, rank, target, trainer, function, args, kwargs)))
            with failures_of_gloo():
                result = function(*args, **kwargs)
        except BaseException as error:
            end(others, PATIENCE)
            os.set_blocking(source, False)
            with suppress(BlockingIOError):
                if isinstance(error, ProcessEndedError) and (said := os.read(source, MOST_SAID)):
                    raise UserError(said.decode(errors="replace").splitlines()[0]) from error
            raise
        else:
            for number in others:
                wait_for(number)
        finally:
            os.close(source)
            os.close(target)
            # Whatever this process does after the training, it does alone.
            for name in environment:
                os.environ.pop(name, None)
            if distributed.is_initialized():
                distributed.destroy_process_group()
        return result


def _be_other(rank: int, target: int, trainer: Trainer, function: Callable[..., Any], args: Any, kwargs: Any) -> int:
    """Train as the process ``rank``, write to ``target`` what was wrong, and return its exit status."""
    from mmrec.training.callbacks.stop_on_signal import StoppedBySignal

    os.environ["LOCAL_RANK"] = str(rank)

    def train() -> None:
        try:
            with failures_of_gloo():
                call_in_place(trainer, function, *args, **kwargs)
        except ProcessEndedError:
            raise  # the first may have been killed, and say nothing any more
        except UserError as error:
            os.write(target, f"{one_line(error)}\n".encode()[:MOST_SAID])
            told.append(2)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C before the first update: the first process says so
            told.append(128 + signal.SIGINT)

    told: list[int] = []
    try:
        status = exit_status(train)
        return told[0] if told else status
    except StoppedBySignal as stop:
        return 128 + stop.number


StrategyRegistry.register("cores", SharedMemoryStrategy, description="processes on the cores of one machine")

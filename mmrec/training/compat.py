"""Private interfaces of Lightning, jsonargparse and TensorBoard that training needs, all of them in this file.

Checked with Lightning 2.6.6, jsonargparse 4.47 and TensorBoard 2.21. Each says which public interface is missing,
and the upstream issue that it is for ("no issue known" where a search found none). On an upgrade, this is the file to
read. Private interfaces of jsonargparse that all commands need are in ``mmrec/core/options.py``; messages that are
kept from the screen in ``mmrec/core/runtime.py``.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities import cloud_io
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _call_and_handle_interrupt
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

from mmrec.core.errors import UserError, one_line

# The training loop


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether the update of the current batch is still to come (``accumulate_grad_batches``).

    Lightning has no public name for it; no issue known.
    """
    return bool(trainer.fit_loop._should_accumulate())


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether Lightning passes what is logged at this batch on to the loggers (``log_every_n_steps``).

    Lightning has no public name for it; no issue known.
    """
    return bool(trainer._logger_connector.should_update_logs)


def leave_out_sigterm_broadcast(trainer: Trainer) -> None:
    """Keep Lightning from sending at every batch, to all processes, whether the first was sent SIGTERM.

    That is a wait for the device and for the others. A callback that handles the signal itself, and has the processes
    agree once an update, has no use for it; no issue known.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def is_validation_due(trainer: Trainer) -> bool:
    """Return whether a validation follows the batch that has just been trained on.

    A callback that saves there is called before that validation (Lightning issues 14431 and 17417, open), and cannot
    otherwise know that one is still to come.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


def validate_also(trainer: Trainer, is_due: Callable[[], bool]) -> None:
    """Validate after a batch where ``is_due`` says so, too, beside what ``val_check_interval`` says.

    Lightning has no public way to add a validation to those that are counted by batches; no issue known.
    """
    loop = trainer.fit_loop.epoch_loop
    by_options = loop._should_check_val_fx

    def is_due_at_all(data_fetcher: _DataFetcher) -> bool:
        return by_options(data_fetcher) or (trainer.enable_validation and is_due())

    loop._should_check_val_fx = is_due_at_all  # type: ignore[method-assign]


def updates_to_come(trainer: Trainer, batches_per_epoch: int) -> int:
    """Return the number of updates from here to the end of ``max_epochs``, also when a run has just been resumed.

    Lightning's counters, as they are between the start of training and its first batch: an epoch whose last batch was
    trained on is counted at once or only later, by what was saved (issue 19367, open).
    """
    epoch_loop, every = trainer.fit_loop.epoch_loop, trainer.accumulate_grad_batches
    ended: Any = trainer.fit_loop.epoch_progress.current
    epochs: int = max(0, (trainer.max_epochs or 0) - ended.processed)
    progress: Any = epoch_loop.batch_progress
    is_counted = epoch_loop.restarted_on_train_batch_end and progress.is_last_batch
    done: int = 0 if is_counted else progress.current.processed
    per_epoch = -(-batches_per_epoch // every)
    done_updates = per_epoch if done >= batches_per_epoch else done // every
    return max(0, epochs * per_epoch - done_updates)


def complete_resumed_epoch(trainer: Trainer) -> None:
    """Make an epoch that ended when the checkpoint was saved one that has ended, however many batches it has now.

    Lightning compares the number of batches then with the number now (other sequences, another text), and would go on
    with the epoch where there are more; no issue known.
    """
    loop = trainer.fit_loop.epoch_loop
    if loop.restarting and loop.batch_progress.is_last_batch:
        current: Any = loop.batch_progress.current
        less = current.processed - current.completed
        current.ready = current.started = current.processed = int(trainer.num_training_batches)
        current.completed = current.processed - less


def begin_where_validation_is_due(trainer: Trainer, is_due: Callable[[], bool]) -> None:
    """Begin a training of which only a validation is missing, if ``is_due``; Lightning skips it (no issue known)."""
    kind: Any = type(trainer.fit_loop)
    skip = property(lambda loop: not is_due() and kind.skip.fget(loop))
    trainer.fit_loop.__class__ = type(kind.__name__, (kind,), {"skip": skip})


def run_missed_validation(trainer: Trainer) -> None:
    """Run the validation that a run was stopped before, when training starts again.

    Lightning resumes after it, or runs one batch of it (issues 19549, 20277 and 20288, open).
    """
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


def count_epoch_in_progress(trainer: Trainer) -> None:
    """Make Lightning's counters name the epoch in progress, which they do not after resuming at the end of one.

    A checkpoint of that epoch would be taken for one of its end, and a run resumed from it be too long (the counters
    after a restart: issue 19367, open; pull request 20379 mended part of it).
    """
    epochs: Any = trainer.fit_loop.epoch_progress
    for progress in (epochs.total, epochs.current):
        progress.ready = progress.started = progress.processed + 1


def average_without_waiting(trainer: Trainer) -> None:
    """Make moving averages of weights update without waiting for the device.

    torch reads the number of updates that were averaged from the device, twice at each; Lightning has no way to give
    another ``AveragedModel`` (no issue known).
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, EMAWeightAveraging) or callback._average_model is None:
            continue
        average, begun = callback._average_model, bool(callback._average_model.n_averaged)
        if callback._use_buffers and average.avg_fn is not None:
            average.update_parameters = _AverageUpdate(average, average.avg_fn, begun)  # type: ignore[method-assign]


class _AverageUpdate:
    """``AveragedModel.update_parameters`` with buffers and without a wait for the device.

    Args:
        average: the averaged model.
        mean_of: the mean after a value, of the mean before, the value, and the number of values before.
        begun: whether it has averaged anything.
    """

    def __init__(self, average: AveragedModel, mean_of: Callable[..., Any], begun: bool) -> None:
        self.average = average
        self.mean_of = mean_of
        self.begun = begun

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> None:
        own, count = self.average.module, self.average.n_averaged
        averages = itertools.chain(own.parameters(), own.buffers())
        for mean, value in zip(averages, itertools.chain(model.parameters(), model.buffers()), strict=False):
            value = value.detach().to(mean.device)
            mean.detach().copy_(self.mean_of(mean.detach(), value, count) if self.begun else value)
        count += 1
        self.begun = True


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Return whether the trainer only tries a few batches; the attribute is made by ``setattr``, unknown to mypy."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


# Processes


def is_first_process() -> bool:
    """Return whether this process is the first of those that train together, before a trainer exists.

    ``rank_zero_only.rank`` is set at import, from the environment; no issue known.
    """
    machine = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
    return not getattr(rank_zero_only, "rank", 0) and machine == "0"


ProcessLauncher = _SubprocessScriptLauncher
"""What begins the processes of a training; Lightning has no public name for it, no issue known."""


def call_in_place(trainer: Trainer, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a trainer's function in this process as Lightning does: what is to happen after an error, happens.

    A launcher has no public way to do that in a process that it has begun; no issue known.
    """
    trainer.strategy._launcher = None
    _call_and_handle_interrupt(trainer, function, *args, **kwargs)


def is_left_to_lightning(trainer: Any) -> bool:
    """Return whether the options of a trainer leave to Lightning how many devices train, and nobody else has said it.

    Others are torchrun and Slurm, which have started a process for each device.
    """
    started = any(int(os.environ.get(name) or 1) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    return trainer.devices == "auto" and trainer.strategy == "auto" and trainer.num_nodes == 1 and not started


def most_processes() -> int:
    """Return how many processes may be begun on the CPUs of this machine: one a core; two always may."""
    return max(2, os.cpu_count() or 1)


def refuse_too_many_processes(trainer: Trainer) -> None:
    """Raise UserError where Lightning would start more processes on CPUs than there are cores; two it always may.

    Lightning starts as many as it is told; no issue known.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or environment.creates_processes_externally:
        return  # there is one, or others have started them all: torchrun, Slurm
    most = most_processes()
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > most:
        raise UserError(
            f"--trainer.devices {trainer.num_devices} starts as many processes on the {os.cpu_count() or 1} CPU "
            f"cores of this machine; give at most {most} (torchrun starts more, if they are wanted)"
        )


def shard_over_all_processes(strategy: ModelParallelStrategy) -> None:
    """Make ``strategy`` shard a model over the processes of all machines.

    Its default replicates the model on each machine (``data_parallel_size="auto"`` is the number of machines), and
    the number of processes is not known yet when the constructor could be told; no issue known.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


# Folders


_is_object_storage = cloud_io._is_object_storage


def _is_in_a_cloud(file_system: Any) -> bool:
    return not isinstance(file_system, LocalFileSystem) and _is_object_storage(file_system)


def know_local_folders() -> None:
    """Let Lightning know that a folder of this machine is in no cloud.

    Otherwise it imports the clients of all clouds that are installed, to ask whether the folder is theirs: a second
    of every start; no issue known.
    """
    cloud_io._is_object_storage = _is_in_a_cloud  # type: ignore[assignment]


# The command line


class SubcommandCLI(LightningCLI):
    """LightningCLI with public hooks in place of the private methods that have no other way in.

    ``_parse_ckpt_path`` is turned off: it would look for hyper-parameters in the checkpoint and let them win over the
    command line (issues 20310 and 20801, pull request 21455, open).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        know_local_folders()
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the one subcommand that runs, with the arguments of the trainer's method that are not options.

        LightningCLI builds the parsers of all its subcommands, each in a tenth of a second; no issue known.
        """
        every = super().subcommands()
        return {name: every[name] for name in every if name == self.subcommand_name()}

    def subcommand_name(self) -> str:
        """Return the name of the subcommand that runs."""
        raise NotImplementedError

    def add_subcommand_arguments(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """Add to ``parser`` what only ``subcommand`` has; LightningCLI has a hook for all of them alone.

        No issue known.
        """

    def subcommand_arguments(self, subcommand: str) -> dict[str, Any]:
        """Return arguments of the trainer's method that take the place of those parsed; no issue known."""
        return {}

    def component(self, config: Any, key: str) -> Any:
        """Return the part ``key`` of ``config`` for the subcommand that runs; no issue known."""
        return self._get(config, key)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self.add_subcommand_arguments(parser, subcommand)
        return parser

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return super()._prepare_subcommand_kwargs(subcommand) | self.subcommand_arguments(subcommand)

    def _parse_ckpt_path(self) -> None:
        pass


def refusal(error: Exception) -> str | None:
    """Return why Lightning, or its logger, does not take what it was given, as one line; None for another error."""
    of_input = isinstance(error, MisconfigurationException | ValueError | ModuleNotFoundError)
    if of_input and _raised_by_lightning(error):
        return one_line(error)
    logger = _logger_that_failed(error)
    return f"the logger {logger} does not start: {one_line(error)}" if logger is not None else None


def _raised_by_lightning(error: Exception) -> bool:
    """Return whether Lightning itself raised ``error``, for what it was given, and nothing that it called.

    Lightning has no class of its own for errors in what a user gives; no issue known.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lightning.")


def _logger_that_failed(error: Exception) -> str | None:
    """Return the name of the class of logger that could not begin what it logs to.

    Lightning lets through what the package of the logger raises (no key, no server, a database of another version);
    no issue known.
    """
    trace = error.__traceback__
    while trace is not None:
        logger = trace.tb_frame.f_locals.get("self")
        if trace.tb_frame.f_code.co_name == "experiment" and isinstance(logger, Logger):
            return type(logger).__name__
        trace = trace.tb_next
    return None


# TensorBoard


def survive_full_disk(writer: SummaryWriter) -> None:
    """Make a writer that meets a full disk say so once, and write no more; training is worth more than its curves.

    TensorBoard prints a traceback from its own thread, and raises in every later call (TensorBoard issues 4036 and
    6167).
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
                message = f"{writer.log_dir}: cannot write the curves: {error.strerror}"
                print(f"\n{message}; training goes on without them", file=sys.stderr, flush=True)

        return attempt

    for name in ("write", "flush", "close"):
        setattr(events, name, guarded(getattr(events, name)))

"""The commands that Lightning runs: fit, validate, test and predict."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import register_type
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mmrec.checkpoints import runs
from mmrec.checkpoints.chat_template import ChatOptions
from mmrec.checkpoints.checkpoint import read_checkpoint
from mmrec.core.errors import UserError
from mmrec.core.options import Parser, resolve_configs
from mmrec.core.parse_errors import instantiation_error
from mmrec.core.runtime import native_precision
from mmrec.core.threads import keep_for_other_processes
from mmrec.training.callbacks.checkpoint_io import DurableCheckpointIO
from mmrec.training.callbacks.checkpointing import BestCheckpoint, LastCheckpoint, StableCheckpoint
from mmrec.training.callbacks.early_stopping import ResumableEarlyStopping
from mmrec.training.callbacks.gradients import GradientGuard
from mmrec.training.callbacks.measurements import FinalScore, LossByPosition, RecurrentLayerStatistics, TextSample
from mmrec.training.callbacks.resuming import ResumeCorrections
from mmrec.training.callbacks.run_config import SaveRunConfig
from mmrec.training.callbacks.run_log import RunLog
from mmrec.training.callbacks.stop_on_signal import StopOnSignal, StoppedBySignal
from mmrec.training.callbacks.tensorboard import Charts, TensorBoardRunLogger
from mmrec.training.callbacks.terminal import ProgressBar, Summary, has_progress_bar
from mmrec.training.callbacks.throughput import LearningRate, Throughput
from mmrec.training.callbacks.time_limit import TimeLimit
from mmrec.training.compat import (
    SubcommandCLI,
    is_first_process,
    refusal,
    refuse_too_many_processes,
)
from mmrec.training.cores import check_processes, choose_processes
from mmrec.training.datamodule import Evaluation, TextDataModule
from mmrec.training.module import RecurrentLMModule
from mmrec.training.options import check_seed
from mmrec.training.predictions import write_predictions
from mmrec.training.run_plan import OPTIONS, RunPlan, RunRequest, plan_run, read_request
from mmrec.training.slurm import current_job

SECTIONS = ("trainer", "model", "data", "chat", "best", "last", "early_stopping", "gradients", "time_limit")
"""Parts of a config that hold options of their own."""
BEST_DEFAULTS = {
    "monitor": "val/loss",
    "filename": runs.BEST,
    "auto_insert_metric_name": False,
    "enable_version_counter": False,
    "save_on_train_epoch_end": False,
}
PATIENCE_DEFAULTS = {"monitor": "val/loss", "patience": 5, "check_on_train_epoch_end": False}
TRAINER_DEFAULTS = {
    "max_epochs": 10,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    # The check costs a pass over validation batches at every start, and all that it finds the first
    # validation finds too.
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # callbacks.Summary takes its place
}


register_type(torch.device, str, torch.device)  # a default of some callbacks, which a saved config would lose


class TrainingArgumentParser(Parser, LightningArgumentParser):
    """Lightning's parser, as strict as that of the other commands."""


class RunNameTakenError(Exception):
    """Another command has begun a run of the name that this one chose for a new one."""


class TrainingCLI(SubcommandCLI):
    """LightningCLI for :class:`RecurrentLMModule` and :class:`TextDataModule`, for runs with a name and a folder.

    Args:
        request: what the arguments ask for.
        plan: what is done; None where only a help or a config is printed.
        typed: the arguments as they were typed, the command first.
        held: what is released when the command ends: the lock of the run.
        added: callbacks beside those of every training.
        kwargs: of LightningCLI.
    """

    def __init__(
        self,
        request: RunRequest,
        plan: RunPlan | None,
        typed: list[str],
        held: ExitStack,
        added: Sequence[Callback] = (),
        **kwargs: Any,
    ) -> None:
        self.request = request
        self._plan = plan
        self.typed = typed
        self.held = held
        self._added = added
        super().__init__(
            RecurrentLMModule,
            TextDataModule,
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            **kwargs,
        )

    @property
    def plan(self) -> RunPlan:
        """What is done."""
        assert self._plan is not None
        return self._plan

    def subcommand_name(self) -> str:
        return self.request.command

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", ["lightning.pytorch"])
        parser = TrainingArgumentParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action="config", help="config file, or name of a shipped one; they stack"
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="name of the run's folder in lightning_logs; if left out, a new version_N, or the latest run where "
            "one is resumed or evaluated",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="for fit: initialize with the weights of a trained model: best, last, the path of a checkpoint, a "
            "run's folder or a safetensors file, or hf:OWNER/NAME; the text has to be prepared with its tokenizer",
        )
        parser.add_class_arguments(ChatOptions, "chat")
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(ResumableEarlyStopping, "early_stopping")
        parser.add_lightning_class_args(GradientGuard, "gradients")
        parser.add_lightning_class_args(TimeLimit, "time_limit")
        parser.set_defaults({f"best.{key}": value for key, value in BEST_DEFAULTS.items()})
        parser.set_defaults({f"early_stopping.{key}": value for key, value in PATIENCE_DEFAULTS.items()})
        parser.link_arguments("data.tokenizer", "model.tokenizer", apply_on="instantiate")

    def add_subcommand_arguments(self, parser: LightningArgumentParser, subcommand: str) -> None:
        if subcommand not in ("validate", "test"):
            return
        parser.set_defaults({"verbose": False})  # one line of ours takes the place of Lightning's table
        parser.add_argument(
            "--window",
            type=int | None,
            default=None,
            help="score windows of so many tokens, each from the zero state",
        )
        parser.add_argument(
            "--learn",
            action="store_true",
            help="let the weights learn from each part of the text after it is scored (dynamic evaluation)",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse ``args`` and not ``sys.argv``, which holds what Lightning starts other processes with."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)
        check_seed(self.config[self.config.subcommand].seed_everything)

    def before_instantiate_classes(self) -> None:
        """Make the config that of the plan."""
        config = self.config[str(self.subcommand)]
        if self.plan.config is None:
            self._check_request(config)
        else:  # of a run that may have been trained under another name, or elsewhere
            config.run = self.plan.run if self.plan.is_named else None
            config.trainer.default_root_dir = None if self.plan.root == Path() else str(self.plan.root)
        choose_processes(config, str(self.subcommand), self.plan.checkpoint)
        if config.trainer.precision is None:
            config.trainer.precision = native_precision(str(config.trainer.accelerator))
        self.evaluation = Evaluation(config.get("window"), bool(config.get("learn")))

    def _check_request(self, config: Any) -> None:
        """Refuse options that decide on the run, and that only the parser found: as part of a group's JSON."""
        for option, field in OPTIONS.items():
            value = config.get(option)
            if (str(value) if value else None) != getattr(self.request, field):
                raise UserError(f"give --{option} by its own name, as --{option}={value}")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise (instantiation_error(str(error)) or error) from None
        self.model.chat_options = self.component(self.config_init, "chat")
        if self.plan.init_from is not None:
            self.model.load_weights(read_checkpoint(self.plan.init_from, verify=False))
            rank_zero_info(f"Initialized with the weights of {self.plan.init_from}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.component(self.config_init, "trainer")
        checkpoints = str(runs.checkpoint_folder(self.plan.root, self.plan.run).absolute())
        for name in (runs.BEST, runs.LAST):
            self.component(self.config_init, name).dirpath = checkpoints
        self.save_config_kwargs = {"folder": self.plan.folder}
        self._complete_trainer_config(config)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError, ImportError) as error:
            gpu = config["accelerator"] in ("gpu", "cuda")
            advice = "; without a GPU leave trainer/gpu, ddp and fsdp out" if gpu else ""
            raise UserError(f"--trainer options that cannot be used here: {error}{advice}") from None
        refuse_too_many_processes(trainer)
        if self.subcommand == "fit":
            last = self.component(self.config_init, runs.LAST)
            # After all others, which Lightning has put in its order: what they change belongs into the checkpoint.
            after = [StableCheckpoint(last), StopOnSignal(last), ResumeCorrections(last)]
            trainer.callbacks += after  # type: ignore[attr-defined]
        return trainer

    def _complete_trainer_config(self, config: dict[str, Any]) -> None:
        """Add our logger, callbacks and plugins to what was asked for."""
        fit = self.subcommand == "fit"
        if config["barebones"]:
            raise UserError("--trainer.barebones is true, but every run here logs and saves; leave it out")
        for name in ("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches", "log_every_n_steps"):
            if isinstance(config[name], int | float) and config[name] <= 0:
                raise UserError(f"trainer.{name} is {config[name]}; it must be more than 0")
        if config["logger"] in (None, True):
            config["logger"] = TensorBoardRunLogger(self.plan.root / runs.LOGS, self.plan.run) if fit else False
        limit = self.component(self.config_init, "time_limit")
        if fit and config["max_time"] is not None and limit.minutes is None:
            limit.minutes = (Timer(duration=config["max_time"]).time_remaining() or 0) / 60
        throughput = Throughput()
        added: list[Callback] = [throughput] if fit else []
        chosen = _listed(config["callbacks"])
        if config["enable_progress_bar"] is not False and not has_progress_bar(chosen):
            added.append(ProgressBar(throughput))
        if fit:
            added += [Summary(), LearningRate(), Charts()]
            added += [LossByPosition(), RecurrentLayerStatistics(), TextSample(), FinalScore()]
            added += [RunLog(self.plan.folder, self.typed), *self._added]
        for callback in chosen:
            if isinstance(callback, LearningRateFinder | BatchSizeFinder):
                raise UserError(
                    f"{type(callback).__name__} cannot be used: it trains on the text before the run begins; compare "
                    f"short runs instead (--trainer.max_steps)"
                )
        config["callbacks"] = [*chosen, *added]
        if not _sharded(config["strategy"]):
            go_on = self.component(self.config_init, runs.LAST).if_save_fails == "go_on"
            config["plugins"] = [
                *_listed(config["plugins"]),
                DurableCheckpointIO(go_on, self.plan.damaged, self.plan.checkpoint),
            ]

    def subcommand_arguments(self, subcommand: str) -> dict[str, Any]:
        self.datamodule.evaluation = self.evaluation
        if self.trainer.num_devices > 1:
            keep_for_other_processes(1)  # each chooses anew
        if subcommand == "fit":
            check_processes(self.trainer, self.datamodule.options.batch_size)
            self._check_interval()
            if is_first_process():  # not before all that was given is known to be good
                self._hold_run()
        return {"ckpt_path": self.plan.checkpoint}

    def _hold_run(self) -> None:
        """Lock the run, so that no other process trains it."""
        is_new = not self.plan.is_named
        try:
            self.held.callback(runs.lock_run(self.plan.root, self.plan.run).release)
        except runs.RunInUseError:
            if is_new:
                raise RunNameTakenError(self.plan.run) from None
            raise
        if is_new and self.plan.folder.exists():  # begun, and even ended, since the name was chosen
            raise RunNameTakenError(self.plan.run)

    def _check_interval(self) -> None:
        """Refuse a validation that would never come, before the run has a folder."""
        every = getattr(self.trainer, "val_check_interval", None)  # not there where it is a time
        if self.trainer.check_val_every_n_epoch is None or not isinstance(every, int):
            return
        self.datamodule.trainer = self.trainer  # which knows the number of processes
        batches = self.datamodule.batches_per_epoch()
        if every > batches:
            raise UserError(
                f"trainer.val_check_interval is {every}, and an epoch has {batches} batches; give no more, or "
                "--trainer.check_val_every_n_epoch null to count on through the epochs"
            )

    def after_validate(self) -> None:
        self._print_score("val", "validation")

    def after_test(self) -> None:
        self._print_score("test", "test")

    def _print_score(self, prefix: str, name: str) -> None:
        if not self.trainer.callback_metrics:
            raise UserError("nothing was scored: --trainer.limit_val_batches or limit_test_batches is 0")
        if not self.trainer.is_global_zero:
            return
        part = self.evaluation.part(int(self.model.score.tokens), len(self.datamodule.tokens.val))
        score = {k.removeprefix(f"{prefix}/"): float(v) for k, v in self.trainer.callback_metrics.items()}
        print(
            f"{name} ({self.evaluation}, {part}{self.datamodule.data_dir}): {score['loss']:.4f} nats/token, "
            f"{score['nats_per_char']:.4f} nats/char, {score['bits_per_byte']:.4f} bits/byte, "
            f"perplexity {score['perplexity']:.3f}{part and f'; --trainer.limit_{prefix}_batches=1.0 scores all'}"
        )

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write predictions.tsv into the run's folder: position, token, its text, and its negative log-likelihood."""
        parts: Any = self.trainer.predict(model, **kwargs)
        if not parts:
            raise UserError("nothing was predicted: --trainer.limit_predict_batches is 0")
        if self.trainer.is_global_zero:
            path = self.plan.folder / "predictions.tsv"
            print(f"{path}: {write_predictions(path, parts, self.datamodule.tokens.tokenizer):,} tokens")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _sharded(strategy: Any) -> bool:
    """Return whether ``strategy`` writes checkpoints in shards of its own, which it does not let others do."""
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    return any(word in name.lower() for word in ("fsdp", "sharded", "modelparallel"))


def run_lightning(
    command: str, args: list[str], resume_by: str | None = None, added: Sequence[Callback] = ()
) -> None:
    """Run ``command`` with ``args``; after a signal that stops it, say that it is resumed by typing ``resume_by``.

    A run that is resumed, or evaluated, brings its own config where the arguments name none; another model brings
    its architecture. The callbacks ``added`` are those of this process alone.
    """
    args = resolve_configs(args, SECTIONS)
    request = read_request(command, args, current_job())
    prints = "help" if {"-h", "--help"} & {*args} else "config" if _prints_config(args) else None
    taken: set[str] = set()
    while True:
        plan = None
        if prints is None or (prints == "config" and (request.checkpoint or request.init_from)):
            plan = plan_run(request, taken)
        try:
            _run(request, plan, args, resume_by, added)
        except RunNameTakenError:
            assert plan is not None
            taken.add(plan.run)
        else:
            return


def _prints_config(args: list[str]) -> bool:
    return any(arg.partition("=")[0] == "--print_config" for arg in args)


def _run(
    request: RunRequest, plan: RunPlan | None, args: list[str], resume_by: str | None, added: Sequence[Callback]
) -> None:
    """Parse ``args`` with what ``plan`` adds, and run the command."""
    before = sys.argv
    program = Path(sys.executable).with_name("mmrec")
    # Lightning starts the processes of the other devices by what stands here.
    for_others = args if plan is None else plan.for_other_processes(args)
    sys.argv = [str(program) if program.exists() else before[0], request.command, *for_others]
    complete = args if plan is None else plan.complete(args)
    try:
        with ExitStack() as held:
            TrainingCLI(request, plan, [request.command, *args], held, added, args=[request.command, *complete])
    except StoppedBySignal as stop:
        line = resume_by or f"mmrec fit {runs.run_option(stop.path.parent.parent.name)} --ckpt_path last"
        print(f"\nStopped and saved. Resume with: {line}", file=sys.stderr)
        sys.exit(128 + stop.number)
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise UserError(reason) from error
    finally:
        sys.argv = before

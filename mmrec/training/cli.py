"""The commands that Lightning runs: fit, validate, test and predict."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from mmrec.checkpoints import runs
from mmrec.checkpoints.checkpoint import KEY, PROGRESS_KEY, find_intact_checkpoint, read_checkpoint
from mmrec.core.errors import UserError, one_line
from mmrec.core.files import staged_file, staged_text
from mmrec.core.options import Parser, given, resolve_configs
from mmrec.core.runtime import native_precision
from mmrec.model import ModelConfig
from mmrec.training import slurm
from mmrec.training.callbacks.checkpointing import (
    BestCheckpoint,
    DurableCheckpointIO,
    GradientGuard,
    LastCheckpoint,
    LearningRate,
    ProgressBar,
    ResumableEarlyStopping,
    StoppedBySignal,
    Summary,
    Throughput,
)
from mmrec.training.callbacks.run_log import RunLog
from mmrec.training.callbacks.tensorboard import (
    Charts,
    FinalScore,
    LossByPosition,
    MemoryStatistics,
    TensorBoardRunLogger,
    TextSample,
)
from mmrec.training.datamodule import Evaluation, TextDataModule
from mmrec.training.module import RecurrentLMModule

SECTIONS = ("trainer", "model", "data", "best", "last", "early_stopping", "gradients")
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


class TrainingArgumentParser(Parser, LightningArgumentParser):
    """Lightning's parser, as strict as that of the other commands."""


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml into the folder of a run that trains, whatever logger it has, or none."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path) -> None:
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False)
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning would save here, before the checkpoint has been compared with what was asked for."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Whole or not at all, as a run is gone on with by what stands there.
        with staged_file(self.folder / runs.CONFIG, parents=True) as file:
            self.parser.save(self.config, file.name, skip_none=False, overwrite=True)


class TrainingCLI(LightningCLI):
    """LightningCLI for :class:`RecurrentLMModule` and :class:`TextDataModule`, for runs with a name and a folder.

    Args:
        held: what is let go of when the command ends: the lock of the run.
        kwargs: of LightningCLI.
    """

    def __init__(self, held: ExitStack, **kwargs: Any) -> None:
        self.held = held
        super().__init__(RecurrentLMModule, TextDataModule, **kwargs)

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
            help="name of the run's folder in lightning_logs; if left out, a new version_N, or on resuming and "
            "validating the latest run",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="for fit: begin with the weights of a trained model: best, last, or the path of a checkpoint, of a "
            "run's folder or of a safetensors file; the text has to be prepared with its tokenizer",
        )
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(ResumableEarlyStopping, "early_stopping")
        parser.add_lightning_class_args(GradientGuard, "gradients")
        parser.set_defaults({f"best.{key}": value for key, value in BEST_DEFAULTS.items()})
        parser.set_defaults({f"early_stopping.{key}": value for key, value in PATIENCE_DEFAULTS.items()})
        parser.link_arguments("data.tokenizer", "model.tokenizer", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # one line of ours takes the place of Lightning's table
            parser.add_argument(
                "--window",
                type=int | None,
                default=None,
                help="score windows of so many tokens, each from an empty memory",
            )
            parser.add_argument(
                "--dynamic", action="store_true", help="go on learning from the text, each part after it is scored"
            )
        return parser

    def _parse_ckpt_path(self) -> None:
        """Lightning would look for hyper-parameters in the file; ours are compared when it is loaded."""

    def before_instantiate_classes(self) -> None:
        """Decide on the run's folder, and on the checkpoint to start from, before anything is made."""
        config = self.config[str(self.subcommand)]
        if config.trainer.precision is None:
            config.trainer.precision = native_precision(str(config.trainer.accelerator))
        self.root = Path(config.trainer.default_root_dir or ".")
        which, name = config.get("ckpt_path"), config.get("run")
        fit = self.subcommand == "fit"
        asked_for = name
        if name is not None and (Path(name).name != name or name == ".."):
            raise UserError(f"--run is {name!r}; it must be the name of a folder, not a path")
        if fit and name is None and slurm.requeues():
            name = f"slurm_{slurm.job()}"  # the same name when the job is queued again
        if fit and slurm.restarted() and name in runs.runs(self.root):
            which = runs.LAST
        self.ckpt = runs.find_checkpoint(self.root, name, which) if which else None
        self.damaged: Path | None = None
        if self.ckpt is not None:
            asked, self.ckpt = self.ckpt, find_intact_checkpoint(self.ckpt)  # what is none is refused before all else
            if fit and PROGRESS_KEY not in read_checkpoint(self.ckpt, mmap=True):
                raise UserError(
                    f"{self.ckpt}: holds a model, but no training to go on with; begin one with its weights by "
                    f"--init_from"
                )
            if fit:
                _refuse_old_shards(self.ckpt)
            self.damaged = asked.absolute() if self.ckpt != asked else None
            own = runs.run_of(self.root, self.ckpt)
            self.run = asked_for or own or name or runs.new_run(self.root)
            if fit and self.run != own:
                self._refuse_to_replace(self.run)
        elif fit:
            self.run = name or runs.new_run(self.root)
            self._refuse_to_replace(self.run)
        else:
            raise UserError(f"nothing to {self.subcommand}: give --ckpt_path best, last, or a file")
        init = config.get("init_from") if fit and self.ckpt is None else None
        self.initial = _find_intact_model(self.root, init) if init else None
        self.evaluation = Evaluation(config.get("window"), bool(config.get("dynamic")))

    def _refuse_to_replace(self, run: str) -> None:
        if run in runs.runs(self.root):
            raise UserError(
                f"the run {run!r} is there already; go on with it by --ckpt_path last, or choose another --run"
            )

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.initial is not None:
            self.model.load_weights(read_checkpoint(self.initial))
            rank_zero_info(f"Beginning with the weights of {self.initial}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        folder = self.root / runs.LOGS / self.run
        fit = self.subcommand == "fit"
        for name in (runs.BEST, runs.LAST):
            self._get(self.config_init, name).dirpath = str(runs.checkpoint_folder(self.root, self.run).absolute())
        self.save_config_kwargs = {"folder": folder}
        if config["logger"] in (None, True):
            config["logger"] = TensorBoardRunLogger(self.root / runs.LOGS, self.run) if fit else False
        added: list[Callback] = []
        if self.evaluation.dynamic:
            config["inference_mode"] = False  # tensors made in it can never be learned from
        if config["enable_progress_bar"] is not False:
            added.append(ProgressBar())
        if fit:
            added += [Summary(), LearningRate(), Throughput(), Charts()]
            added += [LossByPosition(), MemoryStatistics(), TextSample(), FinalScore(), RunLog(folder, sys.argv[1:])]
        config["callbacks"] = [*_listed(config["callbacks"]), *added]
        if not _sharded(config["strategy"]):
            go_on = self._get(self.config_init, runs.LAST).if_save_fails == "go_on"
            config["plugins"] = [*_listed(config["plugins"]), DurableCheckpointIO(go_on, self.damaged)]
        for name in ("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches", "log_every_n_steps"):
            if isinstance(config[name], int | float) and config[name] <= 0:
                raise UserError(f"trainer.{name} is {config[name]}; it must be more than 0")
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError, ImportError) as error:
            gpu = config["accelerator"] in ("gpu", "cuda")
            advice = "; without a GPU leave trainer/gpu, ddp and fsdp out" if gpu else ""
            raise UserError(f"--trainer options that cannot be had here: {error}{advice}") from None

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        self.datamodule.evaluation = self.evaluation
        if subcommand == "fit":
            self._check_interval()
        if subcommand == "fit" and _is_first():  # not before all that was given is known to be good
            self.held.callback(runs.lock_run(self.root, self.run).release)
        return kwargs | {"ckpt_path": self.ckpt}

    def _check_interval(self) -> None:
        """Refuse a validation that would never come, before the run has a folder."""
        every = self.trainer.val_check_interval
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
            return  # every process has read the whole text
        score = {k.removeprefix(f"{prefix}/"): float(v) for k, v in self.trainer.callback_metrics.items()}
        print(
            f"{name} ({self.evaluation}, {self.datamodule.data_dir}): {score['loss']:.4f} nats/token, "
            f"{score['nats_per_char']:.4f} nats/char, {score['bits_per_byte']:.4f} bits/byte, "
            f"perplexity {score['perplexity']:.3f}"
        )

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write predictions.tsv into the run's folder: position, token, its text, and the nats that it cost."""
        parts: Any = self.trainer.predict(model, **kwargs)
        if not self.trainer.is_global_zero:
            return
        path = self.root / runs.LOGS / self.run / "predictions.tsv"
        tokenizer = self.datamodule.tokens.tokenizer
        with staged_text(path, parents=True) as file:
            file.write("position\ttoken\ttext\tnats\n")
            position = 1  # the first token has nothing before it that could predict it
            for part in parts or []:
                for token, nats in zip(part["tokens"].tolist(), part["nats"].tolist(), strict=True):
                    file.write(f"{position}\t{token}\t{tokenizer.decode([token])!r}\t{nats:.5f}\n")
                    position += 1
        print(f"{path}: {position - 1:,} tokens")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _refused_by_lightning(error: BaseException) -> bool:
    """Return whether Lightning itself raised ``error``, for what it was given, and nothing that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lightning.")


def _find_intact_model(root: Path, which: str) -> Path:
    """Return the path of the checkpoint ``which``, of whatever run; UserError where there is none."""
    return find_intact_checkpoint(runs.find_checkpoint(root, None, which))


def _config_option(path: Path) -> str:
    """Return the option that makes a model of the architecture of the checkpoint ``path``."""
    config = ModelConfig.from_dict(read_checkpoint(path, mmap=True)[KEY]["shape"])
    return f"--model.config={json.dumps(asdict(config))}"


def _refuse_old_shards(path: Path) -> None:
    """Refuse to resume shards with a module of another name: each process reads them by the names of today."""
    checkpoint = read_checkpoint(path, mmap=True)
    options = checkpoint[PROGRESS_KEY]["hyperparameters"]
    if path.is_dir() and checkpoint[KEY]["written_as"] == 1 and options.get("mtp_loss_weight"):
        raise UserError(
            f"{path}: is in shards of format version 1 with multi-token prediction, from which training cannot go "
            f"on; begin a run with its weights by --init_from"
        )


def _is_first() -> bool:
    """Return whether this process is the first of those that train together, which writes what all share."""
    machine = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
    return not getattr(rank_zero_only, "rank", 0) and machine == "0"


def _sharded(strategy: Any) -> bool:
    """Return whether ``strategy`` writes checkpoints in shards of its own, which it does not let others do."""
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    return any(word in name.lower() for word in ("fsdp", "sharded", "modelparallel"))


def run_lightning(command: str, args: list[str]) -> None:
    """Run ``command`` with ``args``.

    A run that is taken up again, or evaluated, brings its own config where the arguments name none; another model
    brings its architecture.
    """
    args = resolve_configs(args, SECTIONS)
    which, name = given(args, "ckpt_path"), given(args, "run")
    init = given(args, "init_from") if command == "fit" and not which else None
    no_config = not any(arg in ("-c", "--config") or arg.startswith("--config=") for arg in args)
    configured = any(arg.startswith("--model.config") for arg in args)
    if (which or init) and "--help" not in args and "-h" not in args:
        root = Path(given(args, "trainer.default_root_dir") or ".")
        path = runs.find_checkpoint(root, name, which) if which else _find_intact_model(root, str(init))
        saved = path.parent.parent / runs.CONFIG
        in_run = path.parent.name == runs.CHECKPOINTS and saved.is_file()
        if which and in_run and no_config:
            # The name in the config may be one that the folder had before, or that it has in another root.
            args = ["--config", str(saved), f"--run={runs.run_of(root, path) or ''}", *args]
        elif (init or not in_run) and not configured:  # a model has the architecture that it has
            args = [*args, _config_option(path)]
    before = sys.argv
    # jsonargparse reads the command from here, and so does Lightning to start the processes of the other devices.
    program = Path(sys.executable).with_name("mmrec")
    sys.argv = [str(program) if program.exists() else before[0], command, *args]
    try:
        with ExitStack() as held:
            TrainingCLI(
                held,
                save_config_callback=SaveRunConfig,
                auto_configure_optimizers=False,
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=0,
            )
    except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
        if not _refused_by_lightning(error):
            raise
        raise UserError(one_line(error)) from error
    except StoppedBySignal as stop:
        run = stop.path.parent.parent.name
        print(f"\nStopped and saved. Go on with: mmrec fit --run {run} --ckpt_path last", file=sys.stderr)
        sys.exit(128 + stop.number)
    finally:
        sys.argv = before

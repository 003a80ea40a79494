"""What a command of Lightning's works on: which run, which checkpoint, whose weights, which config. Decided once.

The decision is made from the arguments and what they name, before anything is parsed in full, imported or made:
a run that is resumed or evaluated brings its own config, and a model its architecture, which are then parsed with
the arguments.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from mmrec.checkpoints import runs
from mmrec.checkpoints.checkpoint import find_intact_checkpoint, read_checkpoint
from mmrec.checkpoints.contents import MODEL_KEY, PROGRESS_KEY
from mmrec.core.errors import UserError
from mmrec.model import ModelConfig
from mmrec.training.slurm import Job

CONFIG_FLAGS = ("-c", "--config")
DATA_FLAGS = ("--data", "--data.data_dir", "--data.corpus")
OPTIONS = {
    "run": "run",
    "ckpt_path": "checkpoint",
    "init_from": "init_from",
    "trainer.default_root_dir": "root",
}
"""The options that decide, and the fields of :class:`RunRequest` that hold their values."""


@dataclass(frozen=True)
class RunRequest:
    """What the arguments of a command, and the configs among them, ask for.

    Args:
        command: fit, validate, test or predict.
        run: name of the run.
        checkpoint: best, last, or a path.
        init_from: the same, of the model to begin with.
        root: folder that holds ``lightning_logs``; the current one if None.
        has_config: whether a config is named.
        has_architecture: whether ``model.config`` is set on the command line.
        has_data: whether the command line says which text is read.
        job: the Slurm job that the command runs in.
    """

    command: str
    run: str | None = None
    checkpoint: str | None = None
    init_from: str | None = None
    root: str | None = None
    has_config: bool = False
    has_architecture: bool = False
    has_data: bool = False
    job: Job | None = None


@dataclass(frozen=True)
class RunPlan:
    """What is done.

    Args:
        root: folder that holds ``lightning_logs``.
        run: name of the run whose folder is written to.
        checkpoint: intact checkpoint to resume or to evaluate; None begins anew.
        damaged: the checkpoint that was asked for, where another takes its place.
        init_from: intact checkpoint of the model to begin with.
        config: of the run that is resumed or evaluated, to be parsed before the arguments.
        architecture: option that gives the model the architecture of the checkpoint.
        is_named: whether the run has a name of its own: another command can mean it.
    """

    root: Path
    run: str
    checkpoint: Path | None = None
    damaged: Path | None = None
    init_from: Path | None = None
    config: Path | None = None
    architecture: str | None = None
    is_named: bool = True

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.root / runs.LOGS / self.run

    def complete(self, args: list[str]) -> list[str]:
        """Return the arguments ``args`` of the command with what the plan adds to them."""
        config = ["--config", str(self.config)] if self.config else []
        return [*config, *args, *([self.architecture] if self.architecture else [])]

    def for_other_processes(self, args: list[str]) -> list[str]:
        """Return arguments by which the other processes of this training come to the same plan."""
        options = {
            "trainer.default_root_dir": self.root,
            "run": self.run,
            "ckpt_path": self.checkpoint and self.checkpoint.absolute(),
            "init_from": self.init_from and self.init_from.absolute(),
        }
        return [*args, *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def read_request(command: str, args: list[str], job: Job | None = None) -> RunRequest:
    """Return what ``args`` ask for; of an option that is given twice, in a config too, the last value counts.

    Args:
        command: fit, validate, test or predict.
        args: what was typed after it, the names of configs made paths.
        job: the Slurm job that the command runs in.
    """
    found: dict[str, str | None] = {}
    has_config = has_architecture = has_data = False
    for name, value in _pairs(args):
        if name in CONFIG_FLAGS:
            has_config = True
            found |= _in_config(Path(value))
        elif name.startswith("--model.config"):
            has_architecture = True
        elif name in DATA_FLAGS:
            has_data = True
        elif name.removeprefix("--") in OPTIONS:
            found[OPTIONS[name.removeprefix("--")]] = value or None
    return RunRequest(
        command, **found, has_config=has_config, has_architecture=has_architecture, has_data=has_data, job=job
    )


def _pairs(args: list[str]) -> Iterator[tuple[str, str]]:
    """Yield every option with its value, in one word with ``=`` or in two words."""
    for number, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.startswith("-"):
            yield name, value if equals else "".join(args[number + 1 : number + 2])


def _in_config(path: Path) -> dict[str, str | None]:
    """Return those of :data:`OPTIONS` that a config sets; one that cannot be read is left to the parser's message."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found: dict[str, str | None] = {}
    for option, field in OPTIONS.items():
        group: Any = content
        *outer, name = option.split(".")
        for key in outer:
            group = group.get(key) if isinstance(group, dict) else None
        if isinstance(group, dict) and name in group:
            found[field] = None if group[name] is None else str(group[name])
    return found


def plan_run(request: RunRequest, taken: Collection[str] = ()) -> RunPlan:
    """Return what is to be done.

    Args:
        request: what was asked for.
        taken: names of runs that other processes have just begun.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or a run of that name exists already.
    """
    if request.run is not None:
        runs.check_name(request.run)
    root = Path(request.root or ".")
    name, which = request.run, request.checkpoint
    if request.command == "fit" and request.job is not None:
        name = name or f"slurm_{request.job.name}"  # the same name when the job is queued again
        if request.job.restarted and name in runs.runs(root):
            which = runs.LAST
    if which is not None:
        return _plan_from_checkpoint(request, root, name, which, taken)
    if request.command != "fit":
        raise UserError(f"nothing to {request.command}: give --ckpt_path best, last, or a file")
    run = name or _new_run(root, taken)
    _refuse_to_replace(root, run)
    if request.init_from is None:
        return RunPlan(root, run, is_named=name is not None)
    init = find_intact_checkpoint(runs.find_checkpoint(root, None, request.init_from))
    architecture = None if request.has_architecture else _architecture(read_checkpoint(init, mmap=True, verify=False))
    return RunPlan(root, run, init_from=init, architecture=architecture, is_named=name is not None)


def _plan_from_checkpoint(
    request: RunRequest, root: Path, name: str | None, which: str, taken: Collection[str]
) -> RunPlan:
    """Return the plan of a command that resumes or evaluates ``which``, of the run ``name`` or of any."""
    found = runs.find_checkpoint(root, name, which)
    checkpoint = find_intact_checkpoint(found)  # what is none is refused before all else
    content = read_checkpoint(checkpoint, mmap=True, verify=False)
    if request.command == "fit":
        _refuse_to_resume(checkpoint, content)
    beside = found.parent.parent / runs.CONFIG
    in_run = found.parent.name == runs.CHECKPOINTS and beside.is_file()
    config = beside if in_run and not request.has_config else None
    if config is not None:
        runs.read_config(config)  # one that is none is refused by its name
    own = runs.run_of(root, found)
    if own is None and not (in_run or request.has_config or request.has_data):
        raise UserError(_unknown_text(checkpoint, content))
    if own is None and config is not None and request.root is None:
        root = runs.root_of(found) or root  # the run stays where it is, whatever folder its config names
        own = runs.run_of(root, found)
    run = request.run or own or name or _new_run(root, taken)
    if request.command == "fit" and run != own:
        _refuse_to_replace(root, run)
    return RunPlan(
        root,
        run,
        checkpoint,
        damaged=found.absolute() if checkpoint != found else None,
        config=config,
        architecture=None if in_run or request.has_architecture else _architecture(content),
        is_named=own is not None or name is not None,
    )


def _unknown_text(path: Path, checkpoint: dict[str, Any]) -> str:
    """Return that a checkpoint without its run's config does not say which text is read, and what it says."""
    options = checkpoint.get("TextDataModule", {})  # Lightning's key of what the data module saves
    known = options.get("data_dir") or options.get("corpus")
    trained = f" (it was trained on {known})" if known else ""
    return f"{path}: the config of its run is not beside it; name the token folder by --data.data_dir{trained}"


def _refuse_to_resume(path: Path, checkpoint: dict[str, Any]) -> None:
    """Raise UserError where ``checkpoint`` holds no training, or one that the processes cannot read any more."""
    if PROGRESS_KEY not in checkpoint:
        raise UserError(
            f"{path}: holds a model, but no training to resume; begin one with its weights by --init_from"
        )
    # Each process reads its shards by the names that the module has today.
    options = checkpoint[PROGRESS_KEY]["hyperparameters"]
    if path.is_dir() and checkpoint[MODEL_KEY]["written_as"] == 1 and options.get("mtp_loss_weight"):
        raise UserError(
            f"{path}: is in shards of format version 1 with multi-token prediction, from which training cannot be "
            f"resumed; begin a run with its weights by --init_from"
        )


def _refuse_to_replace(root: Path, run: str) -> None:
    if run in runs.runs(root):
        raise UserError(f"the run {run!r} already exists; resume it by --ckpt_path last, or choose another --run")


def _new_run(root: Path, taken: Collection[str]) -> str:
    """Return the first free name, which is none of ``taken``."""
    first = int(runs.new_run(root).removeprefix("version_"))
    return next(name for number in range(first, first + len(taken) + 1) if (name := f"version_{number}") not in taken)


def _architecture(checkpoint: dict[str, Any]) -> str:
    """Return the option that makes a model of the architecture of ``checkpoint``."""
    return f"--model.config={json.dumps(asdict(ModelConfig.from_dict(checkpoint[MODEL_KEY]['shape'])))}"

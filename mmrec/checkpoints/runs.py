"""Where a run keeps its files: ``ROOT/lightning_logs/RUN``, with its checkpoints in a folder of that."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mmrec.checkpoints.hub import EXPORTED, download_model, is_on_hub
from mmrec.core.devices import AUTO, check_device_name
from mmrec.core.errors import UserError, nearest

LOGS = "lightning_logs"
CHECKPOINTS = "checkpoints"
CONFIG, HISTORY = "config.yaml", "history.jsonl"
BEST, LAST, PREVIOUS, STABLE = "best", "last", "previous", "stable"


def check_name(run: str) -> None:
    """Raise UserError where ``run`` cannot be the name of a run: its folder would lie elsewhere."""
    if Path(run).name != run or run == "..":
        raise UserError(f"--run is {run!r}; it must be the name of a folder, not a path")
    if "$" in run:
        raise UserError(f"the run {run!r}: TensorBoard takes a $ for that of a variable; give another --run")


def run_option(run: str) -> str:
    """Return ``--run`` with the name ``run``, as it is typed into a shell."""
    return f"--run{'=' if run.startswith('-') else ' '}{shlex.quote(run)}"


def checkpoint_folder(root: Path, run: str) -> Path:
    """Return the folder of the checkpoints of ``run``."""
    return root / LOGS / run / CHECKPOINTS


def new_run(root: Path) -> str:
    """Return the first free name of Lightning's series version_0, version_1, ..."""
    taken = [re.fullmatch(r"version_(\d+)", path.name) for path in (root / LOGS).glob("version_*")]
    return f"version_{max((int(match[1]) for match in taken if match), default=-1) + 1}"


class RunInUseError(UserError):
    """Another process trains the run: both would write the same checkpoints."""


def lock_run(root: Path, run: str) -> FileLock:
    """Return a lock that is held on ``run`` until it is released, or the process ends, in whatever way.

    Raises:
        RunInUseError: another process trains it.
    """
    folder = root / LOGS / run
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunInUseError(f"the run {run!r} is being trained by another process; choose another --run") from None
    return lock


def runs(root: Path) -> list[str]:
    """Return the names of the runs that have a checkpoint, the latest written last."""
    newest: dict[str, float] = {}
    for path in (root / LOGS).glob(f"*/{CHECKPOINTS}/*.ckpt"):
        run = path.parent.parent.name
        newest[run] = max(newest.get(run, 0.0), path.stat().st_mtime)
    return sorted(newest, key=lambda run: newest[run])


def find_run(root: Path, run: str | None) -> str:
    """Return ``run``, or the latest run where it is None; UserError where there is none."""
    known = runs(root)
    if run is None:
        if not known:
            raise UserError(f"no run with a checkpoint in {root / LOGS}; train one first by 'mmrec fit'")
        return known[-1]
    if run not in known:
        raise UserError(f"no checkpoint of a run {run!r} in {root / LOGS}{nearest(run, known)}")
    return run


def find_checkpoint(root: Path, run: str | None, which: str) -> Path:
    """Return the path of a checkpoint.

    Args:
        root: folder that holds ``lightning_logs``.
        run: name of the run; the latest if None.
        which: "best", "last", the path of a file or of a run's folder, or hf:OWNER/NAME, which is downloaded.
    """
    if is_on_hub(which):
        return download_model(which)
    if which in (BEST, LAST):
        folder = checkpoint_folder(root, find_run(root, run))
        path = folder / f"{which}.ckpt"
        if which == LAST and not path.exists() and (folder / f"{PREVIOUS}.ckpt").exists():
            return folder / f"{PREVIOUS}.ckpt"
        if not path.exists():
            why = {
                BEST: "no validation had a finite loss yet, or --best.save_top_k is 0: take last",
                LAST: "take best, or another --run",
            }
            raise UserError(f"no {which}.ckpt in {folder}; {why[which]}")
        return path
    path = Path(which)
    if path.is_dir() and path.suffix != ".ckpt":  # such a folder is a checkpoint in shards
        for inside in (
            path / CHECKPOINTS / "best.ckpt",
            path / "best.ckpt",
            path / CHECKPOINTS / "last.ckpt",
            path / "last.ckpt",
            path / EXPORTED,
        ):
            if inside.exists():
                return inside
        raise UserError(f"{path}: no checkpoint in this folder")
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give best, last, or the path of a .ckpt file")
    return path


def run_of(root: Path, checkpoint: Path) -> str | None:
    """Return the name of the run in ``root`` whose checkpoint this is, also by way of links; None if of none."""
    for folder in _possible_folders(checkpoint):
        if folder.parent.resolve() == (root / LOGS).resolve():
            return folder.name
    return None


def root_of(checkpoint: Path) -> Path | None:
    """Return the folder whose ``lightning_logs`` holds the run of this checkpoint; None where it is in none."""
    for folder in _possible_folders(checkpoint):
        if folder.parent.name == LOGS:
            return folder.parent.parent
    return None


def _possible_folders(checkpoint: Path) -> tuple[Path, Path, Path]:
    """Return the folder of the run of ``checkpoint`` as it is named, and where links lead."""
    named, led_to = (path.parent.parent for path in (checkpoint.absolute(), checkpoint.resolve()))
    return named, named.resolve(), led_to


@dataclass(frozen=True)
class CheckpointOptions:
    """The checkpoint to take.

    Args:
        ckpt: best, last, the path of a checkpoint or of a run's folder, or hf:OWNER/NAME, a model of the Hugging Face
            Hub.
        run: name of the run that best and last mean; the latest if left out.
        root: folder that holds lightning_logs.
        device: compute on auto, cpu, cuda, mps or cuda:NUMBER; auto takes a GPU where one works.

    Raises:
        UserError: the device is of no known kind.
    """

    ckpt: str = "best"
    run: str | None = None
    root: Path = Path()
    device: str = AUTO

    def __post_init__(self) -> None:
        check_device_name(self.device)

    def path(self) -> Path:
        """Return its path; UserError where there is none."""
        return find_checkpoint(self.root, self.run, self.ckpt)


def read_config(path: Path) -> tuple[dict[str, Any], str]:
    """Return what the config of a run says, and its text; UserError where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not the config of a run; put back the one that was written, or move it away")
    return config, text


def find_folder(root: Path, run: str) -> Path:
    """Return the folder of a run that is given by its name or its path, with or without a checkpoint in it."""
    for folder in (root / LOGS / run, Path(run)):
        if run and (folder / CONFIG).is_file():
            return folder
    known = [path.parent.name for path in (root / LOGS).glob(f"*/{CONFIG}")]
    raise UserError(f"no run {run!r}: neither in {root / LOGS} nor a folder with a {CONFIG}{nearest(run, known)}")

"""What a checkpoint of this program holds beside Lightning's own, how it is written, and how it is opened."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmrec.errors import UserError
from mmrec.model import MemoryLM, Shape
from mmrec.tokenizers import Tokenizer, load_tokenizer

KEY = "mmrec"
"""Under this key: format version, shape and tokenizer; plain values, so that ``weights_only`` loads them."""
PROGRESS_KEY = "mmrec_progress"
"""Under this key: what only a resumed training needs."""
VERSION = 1


def write_checkpoint(checkpoint: dict[str, Any], target: Path) -> None:
    """Write a checkpoint whole or not at all, also when the disk fills up or the machine stops.

    The file is written beside its target, synchronized with the disk, and then renamed over it.

    Raises:
        UserError: it could not be written; names the path. What stood there before still does.
    """
    staged = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(staged, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, target)
        _synchronize_folder(target.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"{target}: cannot save the checkpoint: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()  # nothing is there after a good save


def _synchronize_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Return the checkpoint at ``path``; UserError where it is missing, damaged, or not of this program.

    With ``mmap`` the tensors stay in the file until they are used: for a look at what describes the model.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # zip, pickle, end of file: torch has no common class for a bad file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason[:120]})") from error
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise UserError(f"{path}: is not a checkpoint of mmrec")
    version = checkpoint[KEY].get("version")
    if version != VERSION:
        raise UserError(f"{path}: checkpoint format version {version}; this program reads {VERSION}")
    return checkpoint


def describe(net: MemoryLM, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a checkpoint says of its model, for :data:`KEY`."""
    return {"version": VERSION, "shape": net.shape.as_dict(), "tokenizer": tokenizer.state()}


def check_same(checkpoint: dict[str, Any], net: MemoryLM, tokenizer: Tokenizer) -> None:
    """Raise UserError where the checkpoint is of another architecture or tokenizer, saying what differs."""
    if KEY not in checkpoint:
        raise UserError("the checkpoint is not one of mmrec")
    saved, here = checkpoint[KEY]["shape"], net.shape.as_dict()
    differ = [f"{name} {saved.get(name)} there, {here[name]} here" for name in here if saved.get(name) != here[name]]
    if differ:
        raise UserError(f"the checkpoint is of another architecture: {'; '.join(differ)}")
    if checkpoint[KEY]["tokenizer"] != tokenizer.state():
        other = load_tokenizer(checkpoint[KEY]["tokenizer"])
        raise UserError(
            f"the checkpoint was trained with another tokenizer ({other.name}, {other.vocab_size} tokens) than "
            f"the data was prepared with ({tokenizer.name}, {tokenizer.vocab_size} tokens)"
        )


@dataclass(frozen=True)
class Trained:
    """A model that a checkpoint holds, ready to read and write: nothing else is needed."""

    net: MemoryLM
    tokenizer: Tokenizer
    step: int


def load_trained(path: Path) -> Trained:
    """Return the model of the checkpoint at ``path``, in evaluation mode on the CPU."""
    checkpoint = read_checkpoint(path)
    description = checkpoint[KEY]
    tokenizer = load_tokenizer(description["tokenizer"])
    net = MemoryLM(Shape(**description["shape"]), tokenizer.vocab_size)
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    net.load_state_dict(weights)
    return Trained(net.eval(), tokenizer, checkpoint["global_step"])

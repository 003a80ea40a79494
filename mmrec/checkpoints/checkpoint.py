"""What a checkpoint of this program holds beside Lightning's own, how it is written, and how it is opened."""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mmrec.checkpoints.migrations import VERSION, migrate
from mmrec.checkpoints.weights import SUFFIX, read_weights
from mmrec.core.errors import UserError, one_line
from mmrec.core.files import staged_file
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.tokenizers import Tokenizer, load_tokenizer

KEY = "mmrec"
"""Under this key: format version, shape and tokenizer; plain values, so that ``weights_only`` loads them."""
PROGRESS_KEY = "mmrec_progress"
"""Under this key: what only a resumed training needs."""
END, END_SIZE = b"PK\5\6", 22
"""How the record at the end of a zip archive begins, and its bytes before the comment (APPNOTE 4.3.16)."""
SEAL = b"mmrec sha256 "
"""Stands before the digest in the comment at the end of the file."""


SHARDS_DESCRIPTION = "meta.pt"
"""Lightning's name for what is not in shards, in a checkpoint that is a folder."""


class _Hashing:
    """Passes what is written on to a file and takes its sha256 on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(checkpoint: dict[str, Any], target: Path, previous: Path | None = None) -> None:
    """Write a checkpoint whole or not at all, also when the disk fills up or the machine stops.

    The file ends in its own sha256: in the comment that a zip archive, which it is, may end in.

    Args:
        checkpoint: what ``torch.save`` takes.
        target: the file.
        previous: under this name what stood at ``target`` is kept.

    Raises:
        UserError: it could not be written; names the path. What stood there before still does.
    """
    try:
        with staged_file(target, keep=previous, parents=True) as file:
            writer: Any = _Hashing(file)
            try:
                torch.save(checkpoint, writer)
            except RuntimeError:
                if writer.error is None:
                    raise
                raise writer.error from None  # what the disk said, of which torch makes an error of its own
            seal = SEAL + writer.sha256.hexdigest().encode()
            file.seek(-2, os.SEEK_END)
            file.write(struct.pack("<H", len(seal)) + seal)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"cannot be written: {one_line(error)[:200]}"
        raise UserError(f"{target}: {reason}; the checkpoint that stood there is as it was") from error


def _comment(file: BinaryIO, size: int) -> bytes | None:
    """Return the comment of a zip archive of ``size`` bytes, or None where its end is not that of one."""
    start = max(0, size - len(SEAL) - 2 * hashlib.sha256().digest_size - END_SIZE)
    file.seek(start)
    end = file.read()
    record = end.rfind(END)
    if record < 0 or len(end) < record + END_SIZE:
        return None
    comment = end[record + END_SIZE :]
    (length,) = struct.unpack_from("<H", end, record + END_SIZE - 2)
    return comment if length == len(comment) else None


def verify_checksum(path: Path) -> None:
    """Raise UserError where the bytes of ``path`` are not those that were sealed, or are no plain archive.

    A file without a seal, as ``torch.save`` writes it, is only looked at for entries that no checkpoint has:
    compressed ones, whose size in memory has no bound, and those with a path out of the archive.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        comment = _comment(file, size)
        if comment is None:
            raise UserError(f"{path}: not a readable checkpoint (its end is missing)")
        if comment:
            file.seek(0)
            sha256, left = hashlib.sha256(), size - len(comment) - 2
            while left > 0:
                part = file.read(min(left, 1 << 20))
                if not part:
                    break
                sha256.update(part)
                left -= len(part)
            sha256.update(b"\0\0")  # the length of the comment before it was added
            if comment != SEAL + sha256.hexdigest().encode():
                raise UserError(f"{path}: is damaged: its sha256 is not the one that it was sealed with")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({one_line(error)[:120]})") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(f"{path}: not a checkpoint: its entry {entry.filename[:80]!r} is compressed")
        if entry.filename.startswith("/") or ".." in Path(entry.filename).parts:
            raise UserError(f"{path}: not a checkpoint: its entry {entry.filename[:80]!r} leads out of it")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{path}: not a checkpoint: its entries overlap")


def read_checkpoint(path: Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Return the checkpoint at ``path``; UserError where it is missing, damaged, or not of this program.

    A safetensors file of :mod:`mmrec.checkpoints.weights` is one without a training. With ``mmap`` the tensors stay
    in the file until they are used: for a look at what describes the model.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if path.suffix == SUFFIX:
        description, named, step = read_weights(path)
        weights = {f"net.{name}": weight for name, weight in named.items()}
        return {KEY: description | {"version": VERSION}, "global_step": step, "state_dict": weights}
    try:
        if path.is_dir():
            checkpoint = _read_shards(path, described_only=mmap)
        else:
            verify_checksum(path)
            checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except UserError as error:
        if path.is_dir():
            raise UserError(f"{path}: not a readable checkpoint ({error})") from None
        raise
    except Exception as error:  # zip, pickle, end of file: torch has no common class for a bad file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason[:120]})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict):
        raise UserError(f"{path}: is not a checkpoint of mmrec")
    try:
        return migrate(checkpoint, KEY, PROGRESS_KEY)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_shards(folder: Path, described_only: bool) -> dict[str, Any]:
    """Return what several processes wrote into ``folder`` (FSDP2), put together."""
    from mmrec.checkpoints.distributed import read_index, read_weights

    checkpoint: dict[str, Any] = torch.load(folder / SHARDS_DESCRIPTION, map_location="cpu", weights_only=True)
    if described_only:
        read_index(folder)  # what torch will unpickle, should training go on from here
        return checkpoint
    return checkpoint | read_weights(folder)


def find_intact_checkpoint(path: Path) -> Path:
    """Return ``path``, or the previous checkpoint beside it where ``path`` is a damaged ``last.ckpt``, saying so."""
    previous = path.with_name("previous.ckpt")
    try:
        read_checkpoint(path, mmap=True)
    except UserError as error:
        if path.name != "last.ckpt" or not previous.exists():
            raise
        read_checkpoint(previous, mmap=True)
        print(f"{error}; taking {previous} instead", file=sys.stderr)
        return previous
    return path


def describe(net: RecurrentLM, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a checkpoint says of its model, for :data:`KEY`."""
    return {"version": VERSION, "shape": net.config.as_dict(), "tokenizer": tokenizer.state()}


def check_compatible(checkpoint: dict[str, Any], net: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Raise UserError where the checkpoint is of another architecture or tokenizer, saying what differs."""
    if KEY not in checkpoint:
        raise UserError("the checkpoint is not one of mmrec")
    saved, here = checkpoint[KEY]["shape"], net.config.as_dict()
    sides = {name: (saved.get(name, False), here.get(name, False)) for name in here | saved}
    differ = [f"{name} {there} there, {ours} here" for name, (there, ours) in sides.items() if there != ours]
    if differ:
        raise UserError(f"the checkpoint is of another architecture: {'; '.join(differ)}")
    if checkpoint[KEY]["tokenizer"] != tokenizer.state():
        other = load_tokenizer(checkpoint[KEY]["tokenizer"])
        raise UserError(
            f"the checkpoint was trained with another tokenizer ({other.name}, {other.vocab_size} tokens) than "
            f"the data was prepared with ({tokenizer.name}, {tokenizer.vocab_size} tokens)"
        )


def model_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of the model by the names that it has for them, without what only training needs."""
    weights = checkpoint["state_dict"]
    return {name.removeprefix("net."): weights[name] for name in weights if name.startswith("net.")}


@dataclass(frozen=True)
class LoadedModel:
    """A model that a checkpoint holds, ready to read and write: nothing else is needed."""

    net: RecurrentLM
    tokenizer: Tokenizer
    step: int


def load_model(path: Path) -> LoadedModel:
    """Return the model of the checkpoint or the safetensors file at ``path``, in evaluation mode on the CPU.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = find_intact_checkpoint(path)
    checkpoint = read_checkpoint(path)
    try:
        description = checkpoint[KEY]
        tokenizer = load_tokenizer(description["tokenizer"])
        net = _model(ModelConfig.from_dict(description["shape"]), tokenizer.vocab_size, model_weights(checkpoint))
        return LoadedModel(net.eval(), tokenizer, int(checkpoint["global_step"]))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, UserError) as error:
        raise UserError(f"{path}: holds no model that can be used ({one_line(error)[:200]})") from error


def _model(config: ModelConfig, vocab_size: int, weights: dict[str, Any]) -> RecurrentLM:
    """Return a model with ``weights``, which needs no more memory than they do, whatever the config says."""
    if config.layers > len(weights):
        raise ValueError(f"{config.layers} layers, {len(weights)} weights")
    with torch.device("meta"):
        net = RecurrentLM(config, vocab_size)
    net.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    net.tie()
    return net

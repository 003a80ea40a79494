"""Checkpoint files: written atomically with a checksum, verified, and read without running code.

What a checkpoint holds is in :mod:`mmrec.checkpoints.contents`.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mmrec.checkpoints.contents import MODEL_KEY, PROGRESS_KEY
from mmrec.checkpoints.migrations import VERSION, migrate
from mmrec.checkpoints.weights import SUFFIX, read_weights
from mmrec.core.errors import UserError, one_line
from mmrec.core.files import staged_file

END_RECORD, END_RECORD_SIZE = b"PK\5\6", 22
"""How the record at the end of a zip archive begins, and its bytes before the comment (APPNOTE 4.3.16)."""
CHECKSUM_PREFIX = b"mmrec sha256 "
"""Begins the comment of the archive; the sha256 follows, in hexadecimal."""


SHARDED_METADATA = "meta.pt"
"""Lightning's name of the file with what is not sharded, in a checkpoint that is a folder."""


class _HashingWriter:
    """A file that computes the sha256 of what is written to it."""

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
    stood = target.exists()
    try:
        with staged_file(target, keep=previous, parents=True) as file:
            writer: Any = _HashingWriter(file)
            try:
                torch.save(checkpoint, writer)
            except RuntimeError:
                if writer.error is None:
                    raise
                raise writer.error from None  # what the disk said, of which torch makes an error of its own
            comment = CHECKSUM_PREFIX + writer.sha256.hexdigest().encode()
            file.seek(-2, os.SEEK_END)
            file.write(struct.pack("<H", len(comment)) + comment)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"cannot be written: {one_line(error)[:200]}"
        kept = "the checkpoint that stood there is as it was" if stood else "no checkpoint stands there"
        raise UserError(f"{target}: {reason}; {kept}") from error


def _archive_comment(file: BinaryIO, size: int) -> bytes | None:
    """Return the comment of a zip archive of ``size`` bytes, or None where its end is not that of one."""
    start = max(0, size - len(CHECKSUM_PREFIX) - 2 * hashlib.sha256().digest_size - END_RECORD_SIZE)
    file.seek(start)
    end = file.read()
    record = end.rfind(END_RECORD)
    if record < 0 or len(end) < record + END_RECORD_SIZE:
        return None
    comment = end[record + END_RECORD_SIZE :]
    (length,) = struct.unpack_from("<H", end, record + END_RECORD_SIZE - 2)
    return comment if length == len(comment) else None


def verify_checksum(path: Path) -> None:
    """Raise UserError where the bytes of ``path`` are not those that were written, or no plain archive.

    A file without a checksum, as ``torch.save`` writes it, is only searched for entries that no checkpoint has:
    compressed ones, whose size in memory has no bound, and those with a path out of the archive.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        comment = _archive_comment(file, size)
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
            if comment != CHECKSUM_PREFIX + sha256.hexdigest().encode():
                raise UserError(f"{path}: is damaged: its sha256 is not the one that it was saved with")
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


def read_checkpoint(path: Path, map_location: Any = "cpu", mmap: bool = False, verify: bool = True) -> dict[str, Any]:
    """Return the checkpoint at ``path``; UserError where it is missing, damaged, or not of this program.

    A safetensors file of :mod:`mmrec.checkpoints.weights` is one without a training. With ``mmap`` the tensors stay
    in the file until they are used: for a look at what describes the model. Without ``verify`` its sha256 is not
    compared: for a file that this process has verified before.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if path.suffix == SUFFIX:
        description, named, step = read_weights(path)
        weights = {f"net.{name}": weight for name, weight in named.items()}
        return {MODEL_KEY: description | {"version": VERSION}, "global_step": step, "state_dict": weights}
    try:
        if path.is_dir():
            checkpoint = _read_sharded(path, described_only=mmap)
        else:
            if verify:
                verify_checksum(path)
            checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except UserError as error:
        if path.is_dir():
            raise UserError(f"{path}: not a readable checkpoint ({error})") from None
        raise
    except Exception as error:  # zip, pickle, end of file: torch has no common class for a bad file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason[:120]})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(MODEL_KEY), dict):
        raise UserError(f"{path}: is not a checkpoint of mmrec")
    try:
        return migrate(checkpoint, MODEL_KEY, PROGRESS_KEY)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_sharded(folder: Path, described_only: bool) -> dict[str, Any]:
    """Return a sharded checkpoint (FSDP2), of which each process wrote a file, as one dictionary."""
    from mmrec.checkpoints.distributed import read_metadata, read_sharded_weights

    checkpoint: dict[str, Any] = torch.load(folder / SHARDED_METADATA, map_location="cpu", weights_only=True)
    if described_only:
        read_metadata(folder)  # what torch will unpickle, should training go on from here
        return checkpoint
    return checkpoint | read_sharded_weights(folder)


def find_intact_checkpoint(path: Path, says: bool = True) -> Path:
    """Return ``path``, or the previous checkpoint beside it where ``path`` is a damaged ``last.ckpt``.

    That is said, unless ``says`` is false: for a look before training goes on from there, which says so.
    """
    previous = path.with_name("previous.ckpt")
    try:
        read_checkpoint(path, mmap=True)
    except UserError as error:
        if path.name != "last.ckpt" or not previous.exists():
            raise
        read_checkpoint(previous, mmap=True)
        if says:
            print(f"{error}; taking {previous} instead", file=sys.stderr)
        return previous
    return path

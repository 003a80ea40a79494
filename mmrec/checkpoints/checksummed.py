"""Checksummed safetensors files: tensors and metadata, with a format version and a sha256."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from mmrec.core.errors import UserError
from mmrec.core.files import write_file


@dataclass(frozen=True)
class FileFormat:
    """A format of such files.

    Attributes:
        format: its name in the file.
        version: of the format, in the file.
        title: its name in messages.
        remedy: what to do where it is damaged.
        older: versions before it that are read, too.
    """

    format: str
    version: str
    title: str
    remedy: str
    older: tuple[str, ...] = ()


def write_checksummed(
    path: Path, file_format: FileFormat, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors, contiguous and none of them shared, and ``metadata`` of them: whole, or not at all.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    metadata = {"format": file_format.format, "version": file_format.version, **metadata}
    data = save(tensors, metadata | {"sha256": _digest(tensors, metadata)})
    write_file(path, data)


def read_checksummed(
    path: Path, file_format: FileFormat, data: bytes | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what :func:`write_checksummed` wrote; UserError where it is missing, damaged, or of another format.

    Args:
        path: of the file.
        file_format: of the file.
        data: the content of the file, where it is in memory; ``path`` then only names it.
    """
    metadata, tensors = (
        _open(path, file_format, with_tensors=True) if data is None else _load(path, file_format, data)
    )
    digest = metadata.pop("sha256", None)
    try:
        whole = digest == _digest(tensors, metadata)
    except TypeError:  # numbers of a kind that is never written
        whole = False
    if not whole:
        raise UserError(f"{path}: is damaged (wrong sha256); {file_format.remedy}")
    return tensors, metadata


def read_metadata(path: Path, file_format: FileFormat) -> dict[str, str]:
    """Return the metadata of the tensors, which are neither read nor checked; raises as :func:`read_checksummed`."""
    return _open(path, file_format, with_tensors=False)[0]


def _open(path: Path, file_format: FileFormat, with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            names = file.keys() if with_tensors else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, file_format, error) from None
    _check_format(path, file_format, metadata)
    return metadata, tensors


def _load(path: Path, file_format: FileFormat, data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        tensors = load(data)  # checks all of the header: its length in 8 bytes, then JSON
        header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError) as error:
        raise _unreadable(path, file_format, error) from None
    metadata = dict(header.get("__metadata__") or {})
    _check_format(path, file_format, metadata)
    return metadata, tensors


def _unreadable(path: Path, file_format: FileFormat, error: Exception) -> UserError:
    return UserError(f"{path}: is not a readable {file_format.title} ({str(error)[:100]})")


def _check_format(path: Path, file_format: FileFormat, metadata: dict[str, str]) -> None:
    """Raise UserError where a file is of another format, or of another version of it."""
    if metadata.get("format") != file_format.format:
        raise UserError(f"{path}: is not a {file_format.title} of mmrec")
    version = metadata.get("version")
    if version not in (file_format.version, *file_format.older):
        raise UserError(
            f"{path}: {file_format.title} format version {version}; this program reads {file_format.version}"
        )


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the numbers of a tensor in little-endian order, on any machine."""
    array = tensor.cpu().numpy()
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tobytes()


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()

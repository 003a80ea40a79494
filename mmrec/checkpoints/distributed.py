"""Sharded checkpoints (FSDP2): a folder with a file of each process, read without running code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.futures import Future

from mmrec.core.errors import UserError, one_line

TORCH_METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    (TORCH_METADATA, "Metadata"),
    (TORCH_METADATA, "MetadataIndex"),
    (TORCH_METADATA, "StorageMeta"),
    (TORCH_METADATA, "TensorStorageMetadata"),
    (TORCH_METADATA, "BytesStorageMetadata"),
    (TORCH_METADATA, "ChunkStorageMetadata"),
    (TORCH_METADATA, "TensorProperties"),
    (TORCH_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}
"""Classes that torch's metadata of a sharded checkpoint, a pickle, consists of, besides dtypes."""


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise UserError(f"the metadata of its shards names {module}.{name}, which no checkpoint has; it was not run")


class _CheckedReader(FileSystemReader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.checked = read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.checked

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for info in self.storage_data.values():
            path = PurePath(info.relative_path)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"its shard {info.relative_path!r} leads out of it")
        return super().read_data(plan, planner)


class _TensorsOnlyPlanner(_EmptyStateDictLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn} is no tensor")  # torch would unpickle it


def read_metadata(folder: Path) -> Metadata:
    """Return torch's metadata of the shards in ``folder``; UserError where reading it would run code."""
    with open(folder / ".metadata", "rb") as file:
        index = _RestrictedUnpickler(file).load()
    if not isinstance(index, Metadata):
        raise UserError("its metadata is not that of shards")
    return index


def read_sharded_weights(folder: Path) -> dict[str, Any]:
    """Return the tensors under "state_dict", put together, as a dictionary with that key."""
    found: dict[str, Any] = {}  # filled in
    planner = _TensorsOnlyPlanner(keys={"state_dict"})
    try:
        _load_state_dict(found, storage_reader=_CheckedReader(folder), planner=planner, no_dist=True)
    except CheckpointException as error:  # no Exception; it holds what went wrong in each process
        cause, _ = next(iter(error.failures.values()))
        raise UserError(one_line(cause)[:200]) from None
    return found

"""A checkpoint in shards, a folder that several processes wrote (FSDP2), read without running what it may hold."""

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

METADATA = "torch.distributed.checkpoint.metadata"
KNOWN = {
    (METADATA, "Metadata"),
    (METADATA, "MetadataIndex"),
    (METADATA, "StorageMeta"),
    (METADATA, "TensorStorageMetadata"),
    (METADATA, "BytesStorageMetadata"),
    (METADATA, "ChunkStorageMetadata"),
    (METADATA, "TensorProperties"),
    (METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}
"""All that torch's index of shards, a pickle, is made of, beside dtypes."""


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise UserError(f"the index of its shards holds {module}.{name}, which no checkpoint has; it was not run")


class _Reader(FileSystemReader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index = read_index(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for info in self.storage_data.values():
            path = PurePath(info.relative_path)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"its shard {info.relative_path!r} leads out of it")
        return super().read_data(plan, planner)


class _OnlyTensors(_EmptyStateDictLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn} is no tensor")  # torch would unpickle it


def read_index(folder: Path) -> Metadata:
    """Return the index of the shards in ``folder``; UserError where it would run code."""
    with open(folder / ".metadata", "rb") as file:
        index = _Index(file).load()
    if not isinstance(index, Metadata):
        raise UserError("its index of shards is none")
    return index


def read_weights(folder: Path) -> dict[str, Any]:
    """Return the tensors under "state_dict", put together, as a dictionary with that key."""
    found: dict[str, Any] = {}  # filled in
    planner = _OnlyTensors(keys={"state_dict"})
    try:
        _load_state_dict(found, storage_reader=_Reader(folder), planner=planner, no_dist=True)
    except CheckpointException as error:  # no Exception; it holds what went wrong in each process
        cause, _ = next(iter(error.failures.values()))
        raise UserError(one_line(cause)[:200]) from None
    return found

"""What a model has read, as a small file: safetensors, bound to the model that read it by a hash."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmrec.errors import UserError
from mmrec.model import MemoryLM, State
from mmrec.tokenizers import Tokenizer

FORMAT, VERSION = "mmrec-memory", "1"


@dataclass(frozen=True)
class Memory:
    """The state after a text, and what the model expects next.

    Attributes:
        state: of one text, as :meth:`MemoryLM.forward` returns it.
        logits: [N], of the next token; zeros before the first.
        position: tokens that were read.
    """

    state: State
    logits: Tensor
    position: int

    @classmethod
    def empty(cls, net: MemoryLM) -> Memory:
        """Return the memory of a model that has read nothing."""
        return cls(net.zero_state(1), torch.zeros(net.head.weight.shape[0]), 0)


def model_hash(net: MemoryLM, tokenizer: Tokenizer) -> str:
    """Return a sha256 that tells models apart: of shape, tokenizer and every weight."""
    digest = hashlib.sha256(json.dumps([net.shape.as_dict(), tokenizer.digest()], sort_keys=True).encode())
    for name, weight in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(weight.detach()))
    return digest.hexdigest()


def save_memory(path: Path, memory: Memory, model: str) -> None:
    """Write a memory: whole, or not at all.

    Args:
        path: the file.
        memory: of one text.
        model: hash of the model, of :func:`model_hash`.
    """
    tensors = {"logits": memory.logits.contiguous()}
    for number, (past, inner) in enumerate(memory.state):
        tensors |= {f"{number}.past": past.contiguous(), f"{number}.memory": inner.contiguous()}
    said = {"format": FORMAT, "version": VERSION, "model": model, "position": str(memory.position)}
    data = save(tensors, said | {"sha256": _digest(tensors, said)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def load_memory(path: Path, net: MemoryLM, model: str) -> Memory:
    """Read a memory that ``net``, whose hash is ``model``, has saved.

    Raises:
        UserError: the file is missing or damaged, or is of another model.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            said = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no dictionary
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: is not a readable memory ({str(error)[:100]})") from None
    if said.get("format") != FORMAT:
        raise UserError(f"{path}: is not a memory of mmrec")
    if said.get("version") != VERSION:
        raise UserError(f"{path}: memory format version {said.get('version')}; this program reads {VERSION}")
    digest = said.pop("sha256", None)
    if digest != _digest(tensors, said):
        raise UserError(f"{path}: is damaged (wrong sha256); read the text again")
    if said["model"] != model:
        raise UserError(f"{path}: is the memory of another model; name that one, or read the text with this one")
    empty = Memory.empty(net)
    state: State = [(tensors[f"{n}.past"], tensors[f"{n}.memory"]) for n in range(len(empty.state))]
    return Memory(state, tensors["logits"], int(said["position"]))


def _bytes(tensor: Tensor) -> bytes:
    """Return the numbers of a tensor in little-endian order, on any machine."""
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tobytes()


def _digest(tensors: dict[str, Tensor], said: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()

"""What a model has read, as a small file: safetensors, bound to the model that read it by a hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmrec.errors import UserError
from mmrec.model import MemoryLM, State
from mmrec.sealed import Kind, read_sealed, tensor_bytes, write_sealed
from mmrec.tokenizers import Tokenizer

KIND = Kind("mmrec-memory", "1", "memory", "read the text again")


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
        digest.update(tensor_bytes(weight.detach()))
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
    write_sealed(path, KIND, tensors, {"model": model, "position": str(memory.position)})


def load_memory(path: Path, net: MemoryLM, model: str) -> Memory:
    """Read a memory that ``net``, whose hash is ``model``, has saved.

    Raises:
        UserError: the file is missing or damaged, or is of another model.
    """
    tensors, said = read_sealed(path, KIND)
    if said["model"] != model:
        raise UserError(f"{path}: is the memory of another model; name that one, or read the text with this one")
    empty = Memory.empty(net)
    state: State = [(tensors[f"{n}.past"], tensors[f"{n}.memory"]) for n in range(len(empty.state))]
    return Memory(state, tensors["logits"], int(said["position"]))


"""Files of a saved state: the carried state after a text, bound by a hash to the model that read it."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmrec.checkpoints.checksummed import FileFormat, read_checksummed, read_metadata, tensor_bytes, write_checksummed
from mmrec.core.errors import UserError
from mmrec.model import RecurrentLM, State
from mmrec.tokenizers import Tokenizer

FORMAT = FileFormat("mmrec-memory", "1", "memory", "read the text again")


@dataclass(frozen=True)
class SavedState:
    """The state after a text, and what the model expects next.

    Attributes:
        state: of one text, as :meth:`~mmrec.model.RecurrentLM.forward` returns it.
        logits: [N], of the next token; zeros before the first.
        position: tokens that were read.
        pending: bytes of a character that the text ends inside of; the next tokens may complete it.
    """

    state: State
    logits: Tensor
    position: int
    pending: bytes = b""

    @classmethod
    def empty(cls, net: RecurrentLM) -> SavedState:
        """Return the memory of a model that has read nothing."""
        return cls(net.zero_state(1), torch.zeros(net.head.weight.shape[0]), 0)


def model_hash(net: RecurrentLM, tokenizer: Tokenizer) -> str:
    """Return a sha256 that tells models apart: of shape, tokenizer and every weight."""
    digest = hashlib.sha256(json.dumps([net.config.as_dict(), tokenizer.digest()], sort_keys=True).encode())
    for name, weight in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(weight.detach()))
    return digest.hexdigest()


def save_memory(path: Path, memory: SavedState, model: str) -> None:
    """Write a memory: whole, or not at all.

    Args:
        path: the file.
        memory: of one text.
        model: hash of the model, of :func:`model_hash`.

    Raises:
        UserError: of :func:`check_memory_target`.
    """
    check_memory_target(path)
    metadata = {"model": model, "position": str(memory.position)}
    if memory.pending:
        metadata["pending"] = memory.pending.hex()
    write_checksummed(path, FORMAT, _tensors(memory), metadata)


def check_memory_target(path: Path) -> None:
    """Raise UserError where ``path`` is a file that is no memory: a memory would replace it."""
    if path.is_file() and path.stat().st_size:
        try:
            memory_header(path)
        except UserError:
            raise UserError(f"{path}: holds something else than a memory; choose another name for it") from None


def load_memory(path: Path, net: RecurrentLM, model: str) -> SavedState:
    """Read a memory that ``net``, whose hash is ``model``, has saved.

    Raises:
        UserError: the file is missing or damaged, or is of another model.
    """
    tensors, metadata = read_checksummed(path, FORMAT)
    if metadata.get("model") != model:
        raise UserError(f"{path}: is the memory of another model; name that one, or read the text with this one")
    empty = _tensors(SavedState.empty(net))
    if {name: (x.shape, x.dtype) for name, x in tensors.items()} != {n: (x.shape, x.dtype) for n, x in empty.items()}:
        raise UserError(f"{path}: does not hold what a memory of this model does")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{path}: holds numbers that are not finite")
    state: State = [(tensors[f"{n}.past"], tensors[f"{n}.memory"]) for n in range(len(net.blocks))]
    return SavedState(state, tensors["logits"], _position(path, metadata), _pending(path, metadata))


def memory_header(path: Path) -> tuple[str, int]:
    """Return the hash of a memory's model and the tokens that were read, without reading the rest of the file.

    Raises:
        UserError: the file is missing, or is not a memory.
    """
    metadata = read_metadata(path, FORMAT)
    return metadata.get("model", ""), _position(path, metadata)


def _position(path: Path, metadata: dict[str, str]) -> int:
    position = metadata.get("position", "")
    if not re.fullmatch(r"[0-9]{1,18}", position):
        raise UserError(f"{path}: does not say how many tokens were read")
    return int(position)


def _pending(path: Path, metadata: dict[str, str]) -> bytes:
    """Return the bytes of an incomplete character; UserError where they are not such."""
    try:
        pending = bytes.fromhex(metadata.get("pending", ""))
        decoder = codecs.getincrementaldecoder("utf-8")()
        if decoder.decode(pending) == "" and decoder.getstate()[0] == pending:
            return pending
    except ValueError:
        pass
    raise UserError(f"{path}: holds bytes that begin no character")


def _tensors(memory: SavedState) -> dict[str, Tensor]:
    """Return the numbers of a memory by their names in the file."""
    tensors = {"logits": memory.logits.contiguous()}
    for number, (past, inner) in enumerate(memory.state):
        tensors |= {f"{number}.past": past.contiguous(), f"{number}.memory": inner.contiguous()}
    return tensors

"""Memory files: the carried state after a text, what was learned from it, and its n-grams, bound to a model."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.checkpoints.cached import LARGEST_VOCABULARY, CachedNgrams, megabytes_of
from mmrec.checkpoints.checksummed import FileFormat, read_checksummed, read_metadata, tensor_bytes, write_checksummed
from mmrec.checkpoints.learned import PART, Form, LearnedWeights, form_of, has_parts_of_this_length
from mmrec.core.errors import UserError
from mmrec.model import RecurrentLM, State, state_to
from mmrec.tokenizers import Tokenizer

FORMAT = FileFormat("mmrec-memory", "2", "memory", "read the text again", older=("1",))
"""Version 2 may hold what was learned, and n-grams; version 1 holds the state alone."""


@dataclass(frozen=True)
class SavedState:
    """The state after a text, and what the model expects next.

    Attributes:
        state: of one text, as :meth:`~mmrec.model.RecurrentLM.forward` returns it; where the model has learned, of
            the model with what it has learned.
        logits: [N], of the next token; zeros before the first.
        position: tokens that were read.
        pending: bytes of a character that the text ends inside of; the next tokens may complete it.
        learned: what the model has learned from the text; None where its weights are those that were trained.
        cached: the n-grams that were read; None where they are not counted.
    """

    state: State
    logits: Tensor
    position: int
    pending: bytes = b""
    learned: LearnedWeights | None = None
    cached: CachedNgrams | None = None

    @classmethod
    def empty(cls, net: RecurrentLM) -> SavedState:
        """Return the memory of a model that has read nothing."""
        weight = net.head.weight
        return cls(net.zero_state(1), torch.zeros(weight.shape[0], device=weight.device), 0)

    def to(self, device: torch.device) -> SavedState:
        """Return this memory with what the model computes with on ``device``."""
        return replace(
            self,
            state=state_to(self.state, device),
            logits=self.logits.to(device),
            learned=None if self.learned is None else self.learned.to(device),
            cached=None if self.cached is None else self.cached.to(device),
        )

    def learning(self, net: RecurrentLM, form: Form | None = None) -> SavedState:
        """Return this memory as one of which ``net`` learns from now on: "full" or "small", by default the first.

        Raises:
            UserError: it learns already, in another form.
        """
        if self.learned is not None:
            if form not in (None, self.learned.form):
                raise UserError(f"the memory learns in the form {self.learned.form}, not {form}")
            return self
        if self.cached is None or self.cached.begin is None:
            return replace(self, learned=LearnedWeights.empty(net, form or "full", self.state, self.logits))
        # Both go on from the begin of the same part.
        learned = LearnedWeights.empty(net, form or "full", *self.cached.begin)
        learned = replace(learned, tokens=self.cached.tokens.to(self.logits.device))
        return replace(self, learned=learned, cached=replace(self.cached, begin=None))

    def caching(self, megabytes: int) -> SavedState:
        """Return this memory as one that counts the n-grams of what is read, in a table of so many MiB.

        Raises:
            UserError: it does already, in a table of another size; or the size is out of range; or the model has too
                many tokens.
        """
        if self.cached is not None:
            if megabytes != self.cached.megabytes:
                raise UserError(f"the memory has a cache of {self.cached.megabytes} MiB, not {megabytes}")
            return self
        if len(self.logits) > LARGEST_VOCABULARY:
            raise UserError(
                f"a cache counts the n-grams of models with at most {LARGEST_VOCABULARY:,} tokens; this one has "
                f"{len(self.logits):,}; train one by characters or bytes"
            )
        if self.learned is None:
            return replace(self, cached=CachedNgrams.empty(megabytes, (self.state, self.logits)))
        cached = replace(CachedNgrams.empty(megabytes), tokens=self.learned.tokens.cpu())
        return replace(self, cached=cached)


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
    if memory.learned is not None:
        metadata |= memory.learned.metadata()
    if memory.cached is not None:
        metadata |= memory.cached.metadata()
    # Copies: at the end of a part the two states are one, which safetensors refuses.
    tensors = {name: tensor.cpu().clone().contiguous() for name, tensor in _tensors(memory).items()}
    write_checksummed(path, FORMAT, tensors, metadata)


def check_memory_target(path: Path) -> None:
    """Raise UserError where ``path`` is a file that is no memory: a memory would replace it."""
    if path.is_file() and path.stat().st_size:
        try:
            memory_header(path)
        except UserError:
            raise UserError(f"{path}: holds something else than a memory; choose another name for it") from None


class OtherModelError(UserError):
    """A memory is of another model than the one that is to go on from it."""


def load_memory(path: Path, net: RecurrentLM, model: str, data: bytes | None = None) -> SavedState:
    """Read a memory that ``net``, whose hash is ``model``, has saved on whatever device, onto the device of ``net``.

    Args:
        path: of the file.
        net: the model.
        model: its hash.
        data: the content of the file, where it is in memory; ``path`` then only names it.

    Raises:
        OtherModelError: the file is of another model.
        UserError: it is missing or damaged, or was learned from or counted in parts of another length.
    """
    tensors, metadata = read_checksummed(path, FORMAT, data)
    if metadata.get("model") != model:
        raise OtherModelError(
            f"{path}: is the memory of another model; name that one, or read the text with this one"
        )
    if not has_parts_of_this_length(metadata):
        raise UserError(f"{path}: was not made in parts of {PART} tokens, as this program reads; {FORMAT.remedy}")
    try:
        empty = SavedState.empty(net)
        learns = "learned" in metadata
        wanted = empty.learning(net, form_of(metadata)) if learns else empty
        _check_tensors(tensors, wanted.caching(megabytes_of(metadata)) if "cache" in metadata else wanted)
        learned = LearnedWeights.from_file(net, tensors, metadata) if learns else None
        cached = CachedNgrams.from_file(len(empty.logits), tensors) if "cache" in metadata else None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    state: State = [(tensors[f"{n}.past"], tensors[f"{n}.memory"]) for n in range(len(empty.state))]
    position, pending = _position(path, metadata), _pending(path, metadata)
    found = SavedState(state, tensors["logits"], position, pending, learned, cached)
    return found.to(net.embedding.weight.device)


def _check_tensors(tensors: dict[str, Tensor], empty: SavedState) -> None:
    """Raise UserError where ``tensors`` are of other shapes than those of ``empty``, or not finite."""
    wanted = {name: (x.shape, x.dtype) for name, x in _tensors(empty).items()}
    found = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    for name in {"learned.tokens", "cache.tokens"} & found.keys():  # as many as there are
        wanted[name] = (found[name][0], torch.int32)
    if found != wanted:
        raise UserError("does not hold what a memory of this model does")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError("holds numbers that are not finite")


def memory_bytes(memory: SavedState) -> int:
    """Return the bytes of a memory's numbers in its file."""
    return sum(tensor.nbytes for tensor in _tensors(memory).values())


def largest_memory(net: RecurrentLM) -> int:
    """Return the most bytes that the numbers of a memory of ``net`` take in its file."""
    device = torch.device("meta")
    empty = SavedState(net.zero_state(1, device), torch.zeros(net.head.weight.shape[0], device=device), 0)
    return memory_bytes(empty.learning(net, "full")) + 4 * PART


class MemoryHeader(NamedTuple):
    """What a memory's file says of it.

    Attributes:
        model: hash of its model.
        position: tokens that were read.
        learned: the form in which it learned; None where it did not.
        is_current: whether what it learned or counted has parts as long as this program's.
    """

    model: str
    position: int
    learned: Form | None
    is_current: bool


def memory_header(path: Path) -> MemoryHeader:
    """Return what the file of a memory says of it, which is not checked.

    Raises:
        UserError: the file is missing, or is not a memory.
    """
    metadata = read_metadata(path, FORMAT)
    try:
        learned = form_of(metadata) if "learned" in metadata else None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    position = _position(path, metadata)
    return MemoryHeader(metadata.get("model", ""), position, learned, has_parts_of_this_length(metadata))


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
    tensors = {"logits": memory.logits}
    for number, (past, inner) in enumerate(memory.state):
        tensors |= {f"{number}.past": past, f"{number}.memory": inner}
    if memory.learned is not None:
        tensors |= memory.learned.tensors()
    return tensors | (memory.cached.tensors() if memory.cached is not None else {})

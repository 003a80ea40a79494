"""Reading tokens in constant memory: the state after them, and the logits or the negative log-likelihood of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel, load_model
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import SavedState, load_memory, model_hash
from mmrec.inference.metrics import token_nll
from mmrec.model import RecurrentLM, State

READ_CHUNK = 2048
"""Tokens that are read at a time: bounds the memory that a long text takes."""


def load_model_and_state(checkpoint: CheckpointOptions, memory: Path | None) -> tuple[LoadedModel, str, SavedState]:
    """Return a model, its hash, and what it has read: the state in the file ``memory``, or the zero state if None."""
    trained = load_model(checkpoint.path())
    digest = model_hash(trained.net, trained.tokenizer)
    empty = SavedState.empty(trained.net)
    return trained, digest, empty if memory is None else load_memory(memory, trained.net, digest)


@torch.inference_mode()
def read_tokens(net: RecurrentLM, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Read ``tokens`` [B, T], T at least 1; return the logits after the last one [B, N] and the state."""
    for chunk in tokens.split(READ_CHUNK, dim=1):
        logits, state = net(chunk, state)
    return logits[:, -1], state


@torch.inference_mode()
def iter_logits(
    net: RecurrentLM, tokens: np.ndarray, memory: SavedState
) -> Iterator[tuple[Tensor, Tensor, SavedState]]:
    """Read tokens [T] on from ``memory``, a chunk at a time.

    Yields:
        The logits [n, N] that predict each token of the chunk (of no meaning before the very first token of a text);
        those tokens [n], int64; and the state after the chunk.
    """
    for first in range(0, len(tokens), READ_CHUNK):
        chunk = torch.from_numpy(tokens[first : first + READ_CHUNK].astype(np.int64))
        logits, state = net(chunk[None], memory.state)
        predictions = torch.cat([memory.logits[None], logits[0, :-1]])
        memory = SavedState(state, logits[0, -1].clone(), memory.position + len(chunk))
        yield predictions.float(), chunk, memory


@torch.inference_mode()
def iter_nll(net: RecurrentLM, tokens: np.ndarray, memory: SavedState) -> Iterator[tuple[Tensor, SavedState]]:
    """Read tokens [T] on from ``memory``, a chunk at a time.

    Yields:
        The negative log-likelihood of each token of the chunk [n], in nats, given all before it (0 for the very first
        token of a text, which nothing predicts); and the state after the chunk.
    """
    for logits, chunk, after in iter_logits(net, tokens, memory):
        nll = token_nll(logits, chunk)
        if after.position == len(chunk):  # nothing was read before it
            nll[0] = 0
        yield nll, after

"""Reading tokens in constant memory: what each was given before it was read, and the memory after it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from mmrec.checkpoints import runs
from mmrec.checkpoints.cached import CachedNgrams
from mmrec.checkpoints.learned import PART, Form, LearnedWeights
from mmrec.checkpoints.loading import LoadedModel, load_chosen
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import OtherModelError, SavedState, load_memory, memory_header, model_hash
from mmrec.core.errors import UserError
from mmrec.inference.cached_reading import CachedGenerating, CachedReading, HeldBack, with_counted
from mmrec.inference.decoders import CachedDecoder, MixedDecoder, TokenDecoder, make_decoder
from mmrec.inference.learner import Learner, kernels_of
from mmrec.inference.metrics import token_nll
from mmrec.inference.text_input import iter_file_tokens
from mmrec.model import RecurrentLM, State
from mmrec.tokenizers import Tokenizer

READ_CHUNK = 2048
"""Tokens that are read at a time: bounds the memory that a long text takes."""
WEIGHED = 11
"""Last parts of a text that is counted, by which its n-grams and the model are weighed."""


@dataclass(frozen=True)
class LearnOptions:
    """Whether the model learns from what it reads.

    Args:
        learn: change the weights by what is read, each part after it was predicted; the memory keeps the difference.
            A memory that learned goes on learning without being told.
        form: which weights learn: full, all of them, or small, vectors, convolutions and embeddings; full by default.
    """

    learn: bool = False
    form: Form | None = None

    def __post_init__(self) -> None:
        if self.form not in (None, *get_args(Form)):
            raise UserError(f"the form is {self.form!r}; it must be one of {', '.join(get_args(Form))}")

    def applied(self, net: RecurrentLM, memory: SavedState) -> SavedState:
        """Return ``memory`` as one that learns, where that is wanted; UserError where it learns in another form."""
        return memory.learning(net, self.form) if self.learn or self.form is not None else memory


@dataclass(frozen=True)
class CacheOptions:
    """Whether the n-grams of what is read are counted.

    Args:
        cache: count them, in a table of so many MiB, and mix what they predict with what the model does; the memory
            keeps the table, and counts on without being told. It holds what the text says.
        cache_text: with a new cache, count the n-grams of this text first, as of the model's training text; of it the
            model reads the last tokens alone, which say how much the n-grams are to be believed beside it.
    """

    cache: int | None = None
    cache_text: Path | None = None

    def applied(self, net: RecurrentLM, memory: SavedState, tokenizer: Tokenizer) -> SavedState:
        """Return ``memory`` as one that counts, where that is wanted; UserError where it cannot."""
        if self.cache_text is not None and (self.cache is None or memory.cached is not None):
            raise UserError("--cache_text is for a new cache, of --cache")
        if self.cache is None:
            return memory
        if self.cache_text is None:
            return memory.caching(self.cache)
        return with_text_counted(net, memory, self.cache, iter_file_tokens(tokenizer, str(self.cache_text)))


def load_model_and_state(checkpoint: CheckpointOptions, memory: Path | None) -> tuple[LoadedModel, str, SavedState]:
    """Return a model, its hash, and what it has read: the memory in the file ``memory``, or an empty one if None.

    Where no model is named it is that of the latest run, or of the latest whose model the memory is of.

    Raises:
        UserError: there is no such model, or the memory is of another, or it cannot be read.
    """
    checkpoint, trained, digest = load_model_of(checkpoint, memory)
    if memory is None:
        return trained, digest, SavedState.empty(trained.net)
    try:
        return trained, digest, load_memory(memory, trained.net, digest)
    except OtherModelError:
        raise UserError(
            f"{memory}: is the memory of another model than {checkpoint.path()}; name that one by --run or --ckpt, "
            f"or read the text with this one"
        ) from None


def load_model_of(checkpoint: CheckpointOptions, memory: Path | None) -> tuple[CheckpointOptions, LoadedModel, str]:
    """Return which checkpoint :func:`load_model_and_state` takes, its model, and the model's hash; raises as that."""
    known = runs.runs(checkpoint.root)[::-1]
    if memory is None or (checkpoint.ckpt, checkpoint.run) != (runs.BEST, None) or len(known) < 2:
        trained = load_chosen(checkpoint)
        return checkpoint, trained, model_hash(trained.net, trained.tokenizer)
    wanted = memory_header(memory).model
    for run in known:
        of_run = replace(checkpoint, run=run)
        try:
            trained = load_chosen(of_run)
        except UserError:  # without a best checkpoint, damaged, or of a layer that is not known here
            continue
        if model_hash(trained.net, trained.tokenizer) == wanted:
            if run != known[0]:
                print(f"{memory}: is the memory of {of_run.path()}, which is taken", file=sys.stderr)
            return of_run, trained, wanted
    raise UserError(
        f"{memory}: is the memory of none of the best checkpoints of the {len(known)} runs in "
        f"{checkpoint.root / runs.LOGS}; name its model by --ckpt, or read the text with one of these"
    )


@torch.inference_mode()
def read_tokens(net: RecurrentLM, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Read ``tokens`` [B, T], T at least 1; return the logits after the last one [B, N] and the state."""
    for chunk in tokens.split(READ_CHUNK, dim=1):
        logits, state = net(chunk, state)
    return logits[:, -1], state


@dataclass(frozen=True)
class ReadPart:
    """Some tokens that were read, what the model gave them before, and the memory after them.

    Attributes:
        tokens: [n], int64, on the CPU.
        logits: [n, N], float32, on the model's device, that predict each of them (of no meaning before the very
            first token of a text).
        memory: after the last of them.
    """

    tokens: Tensor
    logits: Tensor
    memory: SavedState

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of each token given all before it, [n], in nats; 0 for the first of a text.

        On the CPU, as the tokens are.
        """
        nll = token_nll(self.logits, self.tokens.to(self.logits.device)).cpu()
        nll[: self.scored.start] = 0
        return nll

    @property
    def scored(self) -> slice:
        """Those of the tokens that something predicts: all, but for the first of a text."""
        return slice(1 if self.memory.position == len(self.tokens) else 0, None)


class Reader:
    """Reads on from a memory, and learns from what it reads where the memory does.

    Args:
        net: the model; it is not changed.
        memory: what was read before.
    """

    def __init__(self, net: RecurrentLM, memory: SavedState) -> None:
        self.memory = memory
        self._net = net
        self._learner = None if memory.learned is None else Learner(net, memory.learned)
        self._cached = None if memory.cached is None else CachedReading(memory.cached, len(memory.logits))

    def read(self, tokens: np.ndarray | Tensor) -> Iterator[ReadPart]:
        """Read tokens [T] on from the memory, a part at a time; :attr:`memory` is what was read until then."""
        given = torch.as_tensor(np.asarray(tokens, dtype=np.int64) if isinstance(tokens, np.ndarray) else tokens)
        given, device, begin = given.cpu(), self._net.embedding.weight.device, 0
        while begin < len(given):
            learned, cached = self.memory.learned, self.memory.cached
            if learned is not None:
                chunk = given[begin : begin + PART - len(learned.tokens)]
                logits = self._read_learning(chunk.to(device), learned)
            elif cached is not None:
                chunk = given[begin : begin + PART - len(cached.tokens)]
                logits = self._read_counting(chunk.to(device), cached)
            else:
                chunk = given[begin : begin + READ_CHUNK]
                logits = self._read(chunk.to(device))
            begin += len(chunk)
            yield ReadPart(chunk, logits, self.memory)

    @torch.inference_mode()
    def _read(self, tokens: Tensor) -> Tensor:
        memory = self.memory
        logits, state = self._net(tokens[None], memory.state)
        self.memory = SavedState(state, logits[0, -1].clone(), memory.position + len(tokens))
        return torch.cat([memory.logits[None].to(logits), logits[0, :-1]]).float()

    @torch.inference_mode(False)
    def _read_learning(self, new: Tensor, learned: LearnedWeights) -> Tensor:
        """Read what fits into the part that was begun, and learn from the part where it ends; return the logits."""
        assert self._learner is not None
        tokens = torch.cat([learned.tokens, new])
        part = self._learner.read(learned, tokens)
        mixture, cached = part.mixture, None
        if self._cached is not None:
            with kernels_of(learned):
                is_whole, scored = len(tokens) == PART, self._scored(learned.tokens)
                mixture = self._cached.read(part.logits.flip(0), tokens, scored, is_whole)
            cached = self._cached.ngrams
        position = self.memory.position + len(new)
        self.memory = SavedState(part.state, part.expected, position, learned=part.learned, cached=cached)
        return mixture[-len(new) :]

    @torch.inference_mode()
    def _read_counting(self, new: Tensor, cached: CachedNgrams) -> Tensor:
        """Read what fits into the part that was begun, and count its n-grams where it ends; return the logits."""
        assert self._cached is not None
        assert cached.begin is not None
        tokens = torch.cat([cached.tokens.to(new.device), new])
        is_whole = len(tokens) == PART
        logits, state = self._net(tokens[None], cached.begin[0])
        expected = torch.cat([cached.begin[1][None].float(), logits[0].float()])[None]
        mixture = self._cached.read(expected, tokens, self._scored(cached.tokens), is_whole)
        last = logits[0, -1].float().clone()
        if is_whole:
            self._cached.ngrams = replace(self._cached.ngrams, begin=(state, last))
        position = self.memory.position + len(new)
        self.memory = SavedState(state, last, position, cached=self._cached.ngrams)
        return mixture[-len(new) :]

    def _scored(self, begun: Tensor) -> slice:
        """Return those tokens of a part that something predicts: all, but for the first of a text."""
        return slice(1 if self.memory.position == len(begun) else 0, None)

    @torch.inference_mode()
    def generating(self, length: int, verbatim: int = 0) -> tuple[Tensor, TokenDecoder]:
        """Return what text is generated with: the logits [N] of the next token, and what reads on from the memory.

        It learns and counts nothing.

        Args:
            length: number of tokens to generate, about.
            verbatim: let the n-grams of the memory take part, with at most so many tokens in a row as they were read;
                0 leaves them out.

        Raises:
            UserError: the memory has no cache of n-grams, and ``verbatim`` asks for it.
        """
        memory = self.memory
        if verbatim and memory.cached is None:
            raise UserError("verbatim is for a memory with a cache of n-grams; read the text with one: --cache")
        models = [(self._net, memory.state)]
        logits, mix = memory.logits[None], None
        if memory.learned is not None and self._learner is not None:
            logits, untouched, mix = self._learner.at_the_end(memory.learned)
            models = [(self._net, untouched), (self._learner.net, memory.state)]
        decoders = [make_decoder(net, state, length) for net, state in models]
        if verbatim and memory.cached is not None:
            ngrams = CachedGenerating(memory.cached, len(memory.logits), verbatim)
            return ngrams.mixed(logits.flip(0).log_softmax(-1)), CachedDecoder(ngrams, *reversed(decoders))
        return memory.logits, decoders[0] if mix is None else MixedDecoder(mix, *decoders)


def with_text_counted(net: RecurrentLM, memory: SavedState, cache: int, texts: Iterable[np.ndarray]) -> SavedState:
    """Return ``memory`` with a new cache of n-grams, which has counted those of a text.

    The model reads the last :data:`WEIGHED` parts of the text with what was counted before: a few n-grams, or those
    of a text whose numbers go on, can be far from what the model expects, and how much they are to be believed is
    only known from a text that they have not counted.

    Args:
        net: the model.
        memory: what was read before, without a cache.
        cache: size of the table, in MiB.
        texts: pieces [T] of the text, one after the other.

    Raises:
        UserError: as :meth:`SavedState.caching` does.
    """
    counting, empty = memory.caching(cache), SavedState.empty(net).caching(cache)
    assert counting.cached is not None
    assert empty.cached is not None
    last = HeldBack(texts, WEIGHED)
    counted = with_counted(empty.cached, last, len(empty.logits))
    reader = Reader(net, replace(empty, cached=counted))
    for _ in reader.read(last.held):
        pass
    read = reader.memory.cached
    assert read is not None
    cached = replace(counting.cached, table=read.table, weights=read.weights, curvature=read.curvature)
    return replace(counting, cached=cached)


def iter_nll(net: RecurrentLM, tokens: np.ndarray, memory: SavedState) -> Iterator[tuple[Tensor, SavedState]]:
    """Read tokens [T] on from ``memory``; yield :attr:`ReadPart.nll` and the memory after it, part by part."""
    for part in Reader(net, memory).read(tokens):
        yield part.nll, part.memory

"""Generation, scoring and reading for a request, step by step. Nothing but the saved states outlives a request."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import SavedState
from mmrec.core.errors import UserError
from mmrec.inference.generate import generate_with_logits
from mmrec.inference.metrics import TextMetrics
from mmrec.inference.reading import CacheOptions, LearnOptions, Reader
from mmrec.inference.sampling import SamplingOptions
from mmrec.serve.limits import Limits
from mmrec.serve.logprobs import Logprobs, TokenLogprob, token_logprobs, token_names
from mmrec.serve.protocol import ApiError, CompletionRequest, ReadRequest, ScoreRequest
from mmrec.serve.state_store import StateStore
from mmrec.serve.transcript import Transcript
from mmrec.tokenizers import StreamDecoder, pending_bytes, token_lengths


@dataclass(frozen=True)
class Started:
    """The request is valid, and generation begins."""

    prompt_tokens: int


@dataclass(frozen=True)
class TextChunk:
    """Some whole characters of choice ``index``, and the log probabilities of the tokens that begin there."""

    index: int
    text: str
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Finished:
    """Choice ``index`` is written: why it ended ("stop" or "length"), its tokens, and the memory that was kept."""

    index: int
    reason: str
    tokens: int
    memory: dict[str, Any] | None


Event = Started | TextChunk | Finished


class Service:
    """The work of the server, in generators for :class:`mmrec.serve.workers.Workers`.

    Each yields now and then, None where there is nothing to say yet: between two yields is a moment's work, after
    which a request that nobody waits for any longer can be given up.

    Args:
        name: of the model.
        trained: the model.
        memories: where memories are kept.
        limits: of a request.
    """

    def __init__(self, name: str, trained: LoadedModel, memories: StateStore, limits: Limits) -> None:
        self.name, self.memories, self.limits = name, memories, limits
        self._net, self._tokenizer = trained.net, trained.tokenizer
        self._lengths = torch.from_numpy(token_lengths(trained.tokenizer))
        self._names = token_names(trained.tokenizer)

    def complete(self, request: CompletionRequest) -> Iterator[Event | None]:
        """Generate what was requested. Whatever is wrong with the request is raised before :class:`Started`."""
        prompts = [self._encode(prompt, "prompt") for prompt in request.prompts]
        count = sum(map(len, prompts))
        self._check_length(count, "prompt")
        if request.echo and count * request.n > self.limits.prompt_tokens:
            most = f"at most {self.limits.prompt_tokens:,} are, in all choices"
            raise ApiError(400, f"{count * request.n:,} tokens of prompts to give back; {most}", "echo")
        before = self.memories.load(request.memory)
        if self._sampling(request).verbatim and before.cached is None:
            raise ApiError(400, "verbatim is for a memory that was read with a cache of n-grams", "verbatim")
        if request.save_memory is not None:
            self.memories.path(request.save_memory, there=False)
        yield Started(count)
        first = secrets.randbits(62) if request.seed is None else request.seed
        for number, prompt in enumerate(prompts):
            read, echo = yield from self._read_prompt(request, prompt, before)
            begin = sum(len(text) for text, _ in echo)
            for index in range(number * request.n, (number + 1) * request.n):
                yield from (TextChunk(index, text, logprobs) for text, logprobs in echo)
                yield from self._generate(request, index, first + index, read, begin)

    def _read_prompt(
        self, request: CompletionRequest, prompt: np.ndarray, memory: SavedState
    ) -> Generator[None, None, tuple[SavedState, list[tuple[str, Logprobs | None]]]]:
        """Read a prompt; return the memory after it, and, where it is to be given back, that in pieces."""
        if not request.echo:
            return (yield from self._read_on(prompt, memory)), []
        transcript, reached = Transcript(self._tokenizer, []), memory
        echo = []
        for part in Reader(self._net, memory).read(prompt):
            found = self._rows(request, part.logits, part.tokens)
            if reached.position == 0 and found[0] is not None:
                found[0] = TokenLogprob(found[0].token, None, {})  # nothing could predict it
            text = "".join(map(transcript.push, part.tokens.tolist(), found))
            echo.append((text, self._logprobs(request, transcript)))
            reached = part.memory
            yield None
        echo.append((transcript.end(), self._logprobs(request, transcript)))
        return self._with_pending(reached, memory, prompt), [(text, logprobs) for text, logprobs in echo if text]

    def _generate(
        self, request: CompletionRequest, index: int, seed: int, before: SavedState, begin: int
    ) -> Iterator[Event | None]:
        # A prompt that is given back has ended its last character already.
        pending = b"" if request.echo else before.pending
        transcript = Transcript(self._tokenizer, request.stops, begin, pending)
        nothing = torch.zeros(0, dtype=torch.int64)
        tokens: list[int] = []
        passed_on = ""
        options = replace(self._sampling(request), seed=seed)
        for token, logits in generate_with_logits(self._net, nothing, options, before):
            tokens.append(token)
            (row,) = self._rows(request, logits[None], torch.tensor([token]))
            text = transcript.push(token, row)
            passed_on += text
            yield TextChunk(index, text, self._logprobs(request, transcript)) if text else None
            if transcript.stopped:
                break
        if rest := transcript.end(keep_pending=request.save_memory is not None):
            yield TextChunk(index, rest, self._logprobs(request, transcript))
        saved = None
        if request.save_memory is not None:
            # What was passed on is what is remembered: not the string that the text ended at.
            kept = self._encode_after(pending, passed_on) if transcript.stopped else np.array(tokens, dtype=np.int64)
            saved = self.memories.save(request.save_memory, (yield from self._read_on(kept, before)))
        yield Finished(index, "stop" if transcript.stopped else "length", len(tokens), saved)

    def _encode_after(self, pending: bytes, text: str) -> np.ndarray:
        """Return the tokens of ``text``, of whose first character the bytes ``pending`` were read already."""
        if not pending or not text:
            return self._tokenizer.encode(text)
        first = text[0].encode()
        if not first.startswith(pending):  # it was never completed: U+FFFD stands for it
            return self._tokenizer.encode(text[1:])
        byte_tokens = {self._tokenizer.token_bytes(token): token for token in range(self._tokenizer.vocab_size)}
        rest = [byte_tokens[bytes([byte])] for byte in first[len(pending) :]]
        return np.concatenate([np.array(rest, dtype=np.int64), self._tokenizer.encode(text[1:]).astype(np.int64)])

    def _rows(self, request: CompletionRequest, logits: Tensor, tokens: Tensor) -> list[TokenLogprob | None]:
        return (
            [None] * len(tokens) if request.logprobs is None else [*token_logprobs(logits, tokens, request.logprobs)]
        )

    def _logprobs(self, request: CompletionRequest, transcript: Transcript) -> Logprobs | None:
        if request.logprobs is None:
            return None
        return request.LOGPROBS.of(transcript.rows(), self._names, self._tokenizer, request.logprobs)

    def score(self, request: ScoreRequest) -> Iterator[dict[str, Any] | None]:
        """Yield, at last, what each piece of a text costs: a token, or those that make up a character."""
        tokens = self._encode(request.text, "text")
        self._check_length(len(tokens), "text")
        before = self.memories.load(request.memory)
        begun = before.position > 0
        decoder, total = StreamDecoder(self._tokenizer), TextMetrics()
        texts: list[str] = []
        costs: list[float | None] = []
        open_cost = 0.0
        for part in Reader(self._net, before).read(tokens):
            nats = part.nll
            total.update(nats[part.scored], self._lengths[part.tokens][part.scored])
            for token, cost in zip(part.tokens.tolist(), nats.tolist(), strict=True):
                open_cost += cost
                if text := decoder.push(token):
                    texts.append(text)
                    costs.append(round(open_cost, 5))
                    open_cost = 0.0
            yield None
        if costs and not begun and self._tokenizer.decode(tokens[:1]) == texts[0]:
            costs[0] = None  # a single token, which nothing could predict
        figures = {name: float(value) for name, value in total.compute().items()} if total.tokens else {}
        yield {
            "object": "score",
            "model": self.name,
            "tokens": int(total.tokens),
            "nats": float(total.nll),
            "nats_per_token": figures.get("loss"),
            "bits_per_byte": figures.get("bits_per_byte"),
            "pieces": {"text": texts, "nats": costs},
        }

    def read(self, request: ReadRequest) -> Iterator[dict[str, Any] | None]:
        """Read a text on from a memory and keep what was read; yield, at last, what is said of it."""
        self.memories.path(request.name, there=False)
        tokens = self._encode(request.text, "text")
        before = self.memories.load(request.memory)
        try:
            before = LearnOptions(request.learn, request.form).applied(self._net, before)
        except UserError as error:
            raise ApiError(400, str(error), "form") from None
        if request.cache is not None:
            self.memories.check_cache(request.cache)
        try:
            before = CacheOptions(request.cache).applied(before, self._tokenizer)
        except UserError as error:
            raise ApiError(400, str(error), "cache") from None
        yield self.memories.save(request.name, (yield from self._read_on(tokens, before)))

    def put(self, name: str, data: bytes) -> Iterator[dict[str, Any]]:
        """Keep an uploaded memory file; yield what is said of it."""
        yield self.memories.put(name, data)

    def _read_on(self, tokens: np.ndarray, memory: SavedState) -> Generator[None, None, SavedState]:
        """Read tokens [T] on from ``memory``, yield between its chunks, and return the memory after them."""
        reached = memory
        for part in Reader(self._net, memory).read(tokens):
            reached = part.memory
            yield None
        return self._with_pending(reached, memory, tokens)

    def _with_pending(self, reached: SavedState, before: SavedState, tokens: np.ndarray) -> SavedState:
        return replace(reached, pending=pending_bytes(self._tokenizer, before.pending, tokens.tolist()))

    def _encode(self, text: str | list[int], param: str) -> np.ndarray:
        if not isinstance(text, str):
            for token in text:
                if not 0 <= token < self._tokenizer.vocab_size:
                    known = f"the model's are 0 to {self._tokenizer.vocab_size - 1}"
                    raise ApiError(400, f"there is no token {token}; {known}", param, "unknown_token")
            return np.array(text, dtype=np.int64)
        try:
            return self._tokenizer.encode(text)
        except UserError as error:
            raise ApiError(400, str(error), param, "unknown_character") from None

    def _sampling(self, request: CompletionRequest) -> SamplingOptions:
        try:
            return SamplingOptions(
                length=request.max_tokens,
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                verbatim=request.verbatim,
            )
        except UserError as error:  # the protocol has checked the others
            raise ApiError(400, str(error), "verbatim") from None

    def _check_length(self, tokens: int, param: str) -> None:
        if tokens > self.limits.prompt_tokens:
            most = f"at most {self.limits.prompt_tokens:,} are read at once; read the first part into a memory"
            raise ApiError(400, f"{tokens:,} tokens; {most}", param, "context_length_exceeded")

"""Generation, scoring and reading for a request, step by step. Nothing but the saved states outlives a request."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import SavedState
from mmrec.core.errors import UserError
from mmrec.inference.batch import Batch, Row
from mmrec.inference.metrics import TextMetrics
from mmrec.inference.reading import CacheOptions, LearnOptions, Reader
from mmrec.inference.sampling import Sampler, SamplingOptions
from mmrec.serve.limits import Limits
from mmrec.serve.logprobs import Logprobs, Places, TokenLogprob, token_logprobs, token_names
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


@dataclass(frozen=True)
class Echo:
    """A prompt that is given back: its whole characters, in pieces, and the tokens of one that it ends inside of."""

    pieces: Sequence[tuple[str, Logprobs | None]] = ()
    unfinished: Places = ()


@dataclass(frozen=True)
class Tokens:
    """A token of each of some texts, for the batch to read; the logits of the next ones [B, N] are the answer."""

    rows: Sequence[Row]
    tokens: Sequence[int]


Completing = Generator[Event | Tokens | None, Tensor | None, None]
"""The work of a completion: what it asks for is sent to it."""
Reading = Generator[Tokens | None, Tensor | None, Tensor]


class Service:
    """The work of the server, in generators for :class:`mmrec.serve.workers.Workers`.

    Each yields now and then, None where there is nothing to say yet: between two yields is a moment's work, after
    which a request that nobody waits for any longer can be given up. :class:`Tokens` are asked for where a text is
    generated: there is a thread in which those of all requests are read together, until a None says that other work
    is next.

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

    def make_batch(self) -> Batch:
        """Return what reads the tokens of texts that are generated."""
        return Batch(self._net)

    def complete(self, request: CompletionRequest) -> Completing:
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
        choices: list[Completing] = []
        for number, prompt in enumerate(prompts):
            yield None
            read, echo = yield from self._read_prompt(request, prompt, before)
            for index in range(number * request.n, (number + 1) * request.n):
                choices.append(self._generate(request, index, first + index, read, echo))
                if len(choices) == self.limits.batch:
                    yield from _together(choices)
                    choices = []
        yield from _together(choices)

    def _read_prompt(
        self, request: CompletionRequest, prompt: np.ndarray, memory: SavedState
    ) -> Generator[None, Any, tuple[SavedState, Echo]]:
        """Read a prompt; return the memory after it, and, where it is to be given back, that in pieces."""
        if not request.echo:
            return (yield from self._read_on(prompt, memory)), Echo()
        transcript, reached = Transcript(self._tokenizer, [], pending=self._continued(memory.pending, prompt)), memory
        pieces = []
        for part in Reader(self._net, memory).read(prompt):
            found = self._rows(request, part.logits, part.tokens)
            if reached.position == 0 and found[0] is not None:
                found[0] = TokenLogprob(found[0].token, None, {})  # nothing could predict it
            if text := "".join(map(transcript.push, part.tokens.tolist(), found)):
                pieces.append((text, self._logprobs(request, transcript)))
            reached = part.memory
            yield None
        return self._with_pending(reached, memory, prompt), Echo(pieces, transcript.held())

    def _continued(self, pending: bytes, prompt: np.ndarray) -> bytes:
        """Return ``pending``, of a memory, where ``prompt`` goes on with that character; a text begins one anew."""
        if not len(prompt):
            return pending
        return pending if self._tokenizer.token_bytes(int(prompt[0]))[0] & 0xC0 == 0x80 else b""

    def _generate(
        self, request: CompletionRequest, index: int, seed: int, before: SavedState, echo: Echo
    ) -> Completing:
        yield from (TextChunk(index, text, logprobs) for text, logprobs in echo.pieces)
        begin = sum(len(text) for text, _ in echo.pieces)
        transcript = Transcript(self._tokenizer, request.stops, begin, before.pending, echo.unfinished)
        tokens: list[int] = []
        passed_on = ""
        options = replace(self._sampling(request), seed=seed)
        sampler = Sampler(options)
        logits, read_token = self._start(options, before)
        while len(tokens) < options.length:
            token = sampler.draw(logits)
            tokens.append(token)
            (row,) = self._rows(request, logits[None], torch.tensor([token]))
            text = transcript.push(token, row)
            passed_on += text
            if text:
                yield TextChunk(index, text, self._logprobs(request, transcript))
            if transcript.stopped or len(tokens) == options.length:
                break
            logits = yield from read_token(token)
        rest = transcript.end(keep_pending=request.save_memory is not None)
        if rest or (transcript.held() and not transcript.stopped):
            yield TextChunk(index, rest, self._logprobs(request, transcript))
        saved = None
        if request.save_memory is not None:
            yield None
            # What was passed on is what is remembered: not the string that the text ended at.
            kept = np.array(tokens, dtype=np.int64)
            if transcript.stopped:
                kept = self._encode_after(before.pending, passed_on)
            saved = self.memories.save(request.save_memory, (yield from self._read_on(kept, before)))
        yield Finished(index, "stop" if transcript.stopped else "length", len(tokens), saved)

    def _start(self, options: SamplingOptions, before: SavedState) -> tuple[Tensor, Callable[[int], Reading]]:
        """Return the logits [N] of the first token, and what reads one and gives those of the next, on the CPU."""
        if before.learned is None and not options.verbatim:
            row = Row(before.state)

            def read_in_batch(token: int) -> Reading:
                logits = yield Tokens([row], [token])
                assert logits is not None
                return logits[0]

            return before.logits.cpu(), read_in_batch
        # Weights of its own, or n-grams: nothing is shared with other texts.
        logits, decoder = Reader(self._net, before).generating(options.length, options.verbatim)

        def read_alone(token: int) -> Reading:
            yield None
            return decoder.step([token])[0].cpu()

        return logits.cpu(), read_alone

    def _encode_after(self, pending: bytes, text: str) -> np.ndarray:
        """Return the tokens of ``text``, of whose first character the bytes ``pending`` were read already."""
        if not pending or not text:
            return self._tokenizer.encode(text)
        first = text[0].encode()
        if not first.startswith(pending):  # it was never completed: U+FFFD stands for it
            return self._tokenizer.encode(text[1:] or text)  # which ends it
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

    def score(self, request: ScoreRequest) -> Generator[dict[str, Any] | None, Any, None]:
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

    def read(self, request: ReadRequest) -> Generator[dict[str, Any] | None, Any, None]:
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
            before = CacheOptions(request.cache).applied(self._net, before, self._tokenizer)
        except UserError as error:
            raise ApiError(400, str(error), "cache") from None
        yield self.memories.save(request.name, (yield from self._read_on(tokens, before)))

    def put(self, name: str, data: bytes) -> Generator[dict[str, Any], Any, None]:
        """Keep an uploaded memory file; yield what is said of it."""
        yield self.memories.put(name, data)

    def _read_on(self, tokens: np.ndarray, memory: SavedState) -> Generator[None, Any, SavedState]:
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


def _together(works: list[Completing]) -> Completing:
    """Do several works at once: the tokens for which they ask are asked for together."""
    answers: dict[Completing, Tensor] = {}
    while works:
        asked: dict[Completing, Tokens] = {}
        for work in works:
            with contextlib.suppress(StopIteration):
                item = work.send(answers.get(work))
                while not isinstance(item, Tokens):
                    yield item
                    item = next(work)
                asked[work] = item
        if asked:
            rows = [row for tokens in asked.values() for row in tokens.rows]
            logits = yield Tokens(rows, [token for tokens in asked.values() for token in tokens.tokens])
            assert logits is not None
            answers = dict(zip(asked, logits.split([len(tokens.rows) for tokens in asked.values()]), strict=True))
        works = [*asked]

"""Responses in OpenAI's shape: completions and chat completions, whole or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from mmrec.serve.logprobs import ChatLogprobs, CompletionLogprobs, Logprobs
from mmrec.serve.protocol import ApiError
from mmrec.serve.service import Event, Finished, Started, TextChunk
from mmrec.serve.workers import Job


class CompletionResponse:
    """One response to ``POST /v1/completions``.

    Args:
        model: its name.
        with_logprobs: whether log probabilities were requested.
    """

    PREFIX, WHOLE, CHUNK = "cmpl", "text_completion", "text_completion"
    LOGPROBS: type[Logprobs] = CompletionLogprobs

    def __init__(self, model: str, with_logprobs: bool = False) -> None:
        self._with_logprobs = with_logprobs
        self._head = {"id": f"{self.PREFIX}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    async def whole(self, started: Started, job: Job[Event]) -> str:
        """Return the response when all is generated."""
        chunks: dict[int, list[TextChunk]] = {}
        choices: dict[int, str] = {}
        generated = 0
        async for event in job:
            if isinstance(event, TextChunk):
                chunks.setdefault(event.index, []).append(event)
            elif isinstance(event, Finished):
                generated += event.tokens
                choices[event.index] = self._choice(event.index, chunks.pop(event.index, []), event)
        return self._body(self.WHOLE, [choices[index] for index in sorted(choices)], usage=_usage(started, generated))

    async def stream(self, started: Started, job: Job[Event], with_usage: bool) -> AsyncIterator[str]:
        """Yield the response as it is generated, as server-sent events."""
        generated = 0
        opened: set[int] = set()
        try:
            async for event in job:
                if isinstance(event, Started):
                    continue
                if event.index not in opened and (opening := self._opening(event.index)):
                    yield _sse(self._body(self.CHUNK, [opening]))
                opened.add(event.index)
                if isinstance(event, TextChunk):
                    yield _sse(self._body(self.CHUNK, [self._delta(event.index, event, None)]))
                else:
                    generated += event.tokens
                    yield _sse(self._body(self.CHUNK, [self._delta(event.index, None, event)]))
            if with_usage:
                yield _sse(self._body(self.CHUNK, [], usage=_usage(started, generated)))
        except ApiError as error:  # the status was sent already: no room for a memory, or the server ends
            yield _sse(json.dumps(error.body()))
        finally:
            job.close()
        yield _sse("[DONE]")

    def _body(self, kind: str, choices: list[str], **further: Any) -> str:
        return _with(self._head | {"object": kind} | further, "choices", f"[{', '.join(choices)}]")

    def _opening(self, index: int) -> str | None:
        """Return the first choice of a stream, before any text."""
        return None

    def _delta(self, index: int, chunk: TextChunk | None, finished: Finished | None) -> str:
        return self._choice(index, [chunk] if chunk else [], finished)

    def _choice(self, index: int, chunks: list[TextChunk], finished: Finished | None) -> str:
        choice = {"index": index, "text": "".join(chunk.text for chunk in chunks)} | _ending(finished)
        return _with(choice, "logprobs", self._logprobs(chunks))

    def _logprobs(self, chunks: list[TextChunk]) -> str:
        if not self._with_logprobs:
            return "null"
        return self.LOGPROBS.join(chunk.logprobs for chunk in chunks if chunk.logprobs)


class ChatResponse(CompletionResponse):
    """One response to ``POST /v1/chat/completions``."""

    PREFIX, WHOLE, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"
    LOGPROBS: type[Logprobs] = ChatLogprobs

    def _opening(self, index: int) -> str:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return json.dumps({"index": index, "delta": delta, "logprobs": None} | _ending(None))

    def _delta(self, index: int, chunk: TextChunk | None, finished: Finished | None) -> str:
        delta = {"content": chunk.text} if chunk else {}
        logprobs = self._logprobs([chunk]) if chunk else "null"
        return _with({"index": index, "delta": delta} | _ending(finished), "logprobs", logprobs)

    def _choice(self, index: int, chunks: list[TextChunk], finished: Finished | None) -> str:
        content = "".join(chunk.text for chunk in chunks)
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {"index": index, "message": message} | _ending(finished)
        return _with(choice, "logprobs", self._logprobs(chunks))


def _ending(finished: Finished | None) -> dict[str, Any]:
    ending: dict[str, Any] = {"finish_reason": finished.reason if finished else None}
    return ending | ({"memory": finished.memory} if finished and finished.memory else {})


def _with(fields: dict[str, Any], name: str, value: str) -> str:
    """Return ``fields`` as JSON, and one more, whose value is JSON already."""
    return f"{json.dumps(fields)[:-1]}, {json.dumps(name)}: {value}}}"


def _usage(started: Started, generated: int) -> dict[str, int]:
    read = started.prompt_tokens
    return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}


def _sse(data: str) -> str:
    return f"data: {data}\n\n"

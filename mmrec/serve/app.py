"""The endpoints: from requests to work, and from work to answers, at once or as it comes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mmrec.serve.guard import Authentication, error_response, read_body
from mmrec.serve.logprobs import joined
from mmrec.serve.protocol import ApiError, CompletionRequest, ReadRequest, ScoreRequest, parse
from mmrec.serve.service import Event, Finished, Piece, Service, Started
from mmrec.serve.workers import ClientGone, Work, Workers, cancel_on_disconnect

JSON, BINARY = "application/json", "application/octet-stream"
FILE_ROOM = 1 << 16
"""Bytes that a memory file may have beyond its numbers."""


def create_app(service: Service, workers: Workers, key: str | None, loopback: bool) -> FastAPI:
    """Return the web application.

    Args:
        service: what the model does.
        workers: who does it; they are closed when the application ends.
        key: that every request must carry; none if None.
        loopback: whether it can be reached from this machine alone.
    """
    started = int(time.time())
    page, policy = read_page()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        workers.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Authentication, key=key, loopback=loopback)

    @app.exception_handler(ApiError)
    async def _refused(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def _unknown(request: Request, error: HTTPException) -> Response:
        return error_response(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def _gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nginx's number for it; nobody reads it

    @app.exception_handler(Exception)
    async def _failed(_: Request, __: Exception) -> Response:
        return error_response(ApiError(500, "the server failed; its terminal says how"))

    async def only_answer(request: Request, work: Work[dict[str, Any]]) -> dict[str, Any]:
        try:
            return await cancel_on_disconnect(request, anext(work))
        finally:
            work.close()

    @app.get("/")
    async def index() -> Response:
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": service.name, "object": "model", "created": started, "owned_by": "mmrec"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(await read_body(request, JSON, service.limits.body_bytes), CompletionRequest)
        if asked.model not in (None, service.name):
            message = f"there is no model {asked.model!r}, but {service.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        asked.check(service.limits)
        work: Work[Event] = workers.start(service.complete(asked))
        answer = Answer(service.name, asked.logprobs is not None)
        with ExitStack() as stack:
            stack.callback(work.close)
            begun = await cancel_on_disconnect(request, anext(work))  # what is wrong is found before it
            assert isinstance(begun, Started)
            if not asked.stream:
                return Response(await cancel_on_disconnect(request, answer.whole(begun, work)), media_type=JSON)
            stack.pop_all()  # the stream ends the work itself
        return StreamingResponse(
            answer.stream(begun, work, asked.stream_options.include_usage), media_type="text/event-stream"
        )

    @app.post("/v1/score")
    async def score(request: Request) -> dict[str, Any]:
        asked = parse(await read_body(request, JSON, service.limits.body_bytes), ScoreRequest)
        return await only_answer(request, workers.start(service.score(asked)))

    @app.get("/v1/memories")
    def list_memories() -> dict[str, Any]:
        return {"object": "list", "data": service.memories.all()}

    @app.post("/v1/memories", status_code=201)
    async def read_memory(request: Request) -> dict[str, Any]:
        asked = parse(await read_body(request, JSON, service.limits.body_bytes), ReadRequest)
        return await only_answer(request, workers.start(service.read(asked)))

    @app.get("/v1/memories/{name}")
    def about_memory(name: str) -> dict[str, Any]:
        return service.memories.about(name)

    @app.get("/v1/memories/{name}/file")
    def download_memory(name: str) -> Response:
        data = service.memories.data(name)
        save_as = {"Content-Disposition": f'attachment; filename="{name}.mem"'}
        return Response(data, media_type=BINARY, headers=save_as)

    @app.put("/v1/memories/{name}/file", status_code=201)
    async def upload_memory(request: Request, name: str) -> dict[str, Any]:
        data = await read_body(request, BINARY, service.memories.bytes_of_one + FILE_ROOM)
        return await only_answer(request, workers.start(service.put(name, data)))

    @app.delete("/v1/memories/{name}")
    def delete_memory(name: str) -> dict[str, Any]:
        service.memories.delete(name)
        return {"id": name, "object": "memory", "deleted": True}

    return app


class Answer:
    """One completion in OpenAI's shape.

    Args:
        model: its name.
        scored: whether log probabilities were asked for.
    """

    def __init__(self, model: str, scored: bool) -> None:
        self._scored = scored
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, begun: Started, work: Work[Event]) -> str:
        """Return the answer when all is written."""
        pieces: dict[int, list[Piece]] = {}
        choices: list[str] = []
        written = 0
        async for event in work:
            if isinstance(event, Piece):
                pieces.setdefault(event.index, []).append(event)
            elif isinstance(event, Finished):
                written += event.tokens
                choices.append(self._choice(event.index, pieces.pop(event.index, []), event))
        return self._body(choices, usage=_usage(begun, written))

    async def stream(self, begun: Started, work: Work[Event], with_usage: bool) -> AsyncIterator[str]:
        """Yield the answer as it is written, as server-sent events."""
        written = 0
        try:
            async for event in work:
                if isinstance(event, Piece):
                    yield _sent(self._body([self._choice(event.index, [event])]))
                elif isinstance(event, Finished):
                    written += event.tokens
                    yield _sent(self._body([self._choice(event.index, [], event)]))
            if with_usage:
                yield _sent(self._body([], usage=_usage(begun, written)))
        except ApiError as error:  # the status was sent already: no room for a memory, or the server ends
            yield _sent(json.dumps(error.body()))
        finally:
            work.close()
        yield _sent("[DONE]")

    def _body(self, choices: list[str], **further: Any) -> str:
        return _with(self._head | further, "choices", f"[{', '.join(choices)}]")

    def _choice(self, index: int, pieces: list[Piece], ended: Finished | None = None) -> str:
        choice = {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "finish_reason": ended.reason if ended else None,
        }
        choice |= {"memory": ended.memory} if ended and ended.memory else {}
        logprobs = joined(piece.logprobs for piece in pieces if piece.logprobs) if self._scored else "null"
        return _with(choice, "logprobs", logprobs)


def _with(fields: dict[str, Any], name: str, value: str) -> str:
    """Return ``fields`` as JSON, and one more, whose value is JSON already."""
    return f"{json.dumps(fields)[:-1]}, {json.dumps(name)}: {value}}}"


def _usage(begun: Started, written: int) -> dict[str, int]:
    read = begun.prompt_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _sent(data: str) -> str:
    return f"data: {data}\n\n"


def read_page() -> tuple[str, str]:
    """Return the page and its Content-Security-Policy: what stands in the page may run, and nothing else."""
    page = files("mmrec.serve").joinpath("page.html").read_text(encoding="utf-8")

    def hashed(tag: str) -> str:
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    return page, (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

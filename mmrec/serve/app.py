"""The endpoints of the API: from requests to jobs, and from jobs to responses."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match

from mmrec.checkpoints.chat_template import ChatTemplate
from mmrec.serve.authentication import Access, Authentication, error_response
from mmrec.serve.body import read_body
from mmrec.serve.chat import ChatRequest
from mmrec.serve.protocol import ApiError, CompletionRequest, ReadRequest, ScoreRequest, parse
from mmrec.serve.responses import ChatResponse, CompletionResponse
from mmrec.serve.service import Event, Service, Started
from mmrec.serve.workers import ClientDisconnected, Job, Workers, cancel_on_disconnect

JSON, BINARY = "application/json", "application/octet-stream"
FILE_OVERHEAD = 1 << 16
"""Bytes that a memory file may have beyond its numbers."""
READ_METHODS = ["GET", "HEAD"]
STREAM_HEADERS = {"X-Accel-Buffering": "no"}
"""nginx passes a stream on as it comes, not a page at a time."""


def create_app(service: Service, workers: Workers, access: Access, template: ChatTemplate) -> FastAPI:
    """Return the web application.

    Args:
        service: what the model does.
        workers: who does it; they are closed when the application ends.
        access: who may send requests.
        template: of chats.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        workers.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Authentication, access=access)
    if access.allowed_origins:  # outermost: a browser's preflight request has no key
        origins = list(access.allowed_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    endpoints = Endpoints(service, workers, template)
    routers = [_page_routes(), _model_routes(service), _generation_routes(endpoints), _memory_routes(endpoints)]
    for router in routers:
        app.include_router(router)
    _add_error_handlers(app, [route for router in routers for route in router.routes])
    return app


def _add_error_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    @app.exception_handler(ApiError)
    async def _refused(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def _unknown(request: Request, error: HTTPException) -> Response:
        message, headers = f"{request.method} {request.url.path}: {error.detail}", {}
        if error.status_code == 405:
            headers["Allow"] = ", ".join(sorted(_methods(routes, request)))
        elif error.status_code == 404:
            message += "; docs/serve.md lists what there is, of OpenAI's API: models, completions, chat/completions"
        return error_response(ApiError(error.status_code, message), headers)

    @app.exception_handler(ClientDisconnected)
    @app.exception_handler(ClientDisconnect)
    async def _gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nginx's number for it; nobody reads it

    @app.exception_handler(Exception)
    async def _failed(_: Request, __: Exception) -> Response:
        return error_response(ApiError(500, "the server failed; its terminal says how"))


def _methods(routes: Sequence[BaseRoute], request: Request) -> set[str]:
    """Return the methods that exist for the path of ``request``."""
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in matching for method in getattr(route, "methods", None) or ()}


@dataclass(frozen=True)
class Endpoints:
    """What the endpoints share: parsing a request, and running its job.

    Args:
        service: what the model does.
        workers: who does it.
        template: of chats.
    """

    service: Service
    workers: Workers
    template: ChatTemplate

    async def body(self, request: Request, kind: str = JSON, most: int | None = None) -> bytes:
        """Return the body of a request, of ``most`` bytes, or as many as the limits say."""
        return await read_body(request, kind, self.service.limits.body_bytes if most is None else most)

    async def generate(
        self, request: Request, completion: CompletionRequest, response: CompletionResponse
    ) -> Response | StreamingResponse:
        """Return the completion ``completion`` as ``response``, whole or streamed."""
        job: Job[Event] = self.workers.start(self.service.complete(completion))
        with ExitStack() as stack:
            stack.callback(job.close)
            started = await cancel_on_disconnect(request, anext(job))  # errors of the request are raised before it
            assert isinstance(started, Started)
            if not completion.stream:
                return Response(await cancel_on_disconnect(request, response.whole(started, job)), media_type=JSON)
            stack.pop_all()  # the stream ends the job itself
        events = response.stream(started, job, completion.stream_options.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    async def run(self, request: Request, job: Job[dict[str, Any]]) -> dict[str, Any]:
        """Return the only result of ``job``."""
        try:
            return await cancel_on_disconnect(request, anext(job))
        finally:
            job.close()

    def check_model(self, name: str | None) -> None:
        """Raise :class:`ApiError` where ``name`` is given and is not the model's."""
        if name not in (None, self.service.name):
            message = f"there is no model {name!r}, but {self.service.name!r}"
            raise ApiError(404, message, "model", "model_not_found")


def _page_routes() -> APIRouter:
    router, (page, policy) = APIRouter(), read_page()

    @router.api_route("/", methods=READ_METHODS)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy})

    return router


def _model_routes(service: Service) -> APIRouter:
    router, created = APIRouter(), int(time.time())
    model = {"id": service.name, "object": "model", "created": created, "owned_by": "mmrec"}

    @router.api_route("/v1/models", methods=READ_METHODS)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.api_route("/v1/models/{name:path}", methods=READ_METHODS)
    async def get_model(name: str) -> dict[str, Any]:
        if name != service.name:
            message = f"there is no model {name!r}, but {service.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return model

    return router


def _generation_routes(endpoints: Endpoints) -> APIRouter:
    router, service = APIRouter(), endpoints.service

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        completion = parse(await endpoints.body(request), CompletionRequest)
        endpoints.check_model(completion.model)
        completion.check_stops()
        completion.check(service.limits)
        response = CompletionResponse(service.name, completion.logprobs is not None)
        return await endpoints.generate(request, completion, response)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        chat = parse(await endpoints.body(request), ChatRequest)
        endpoints.check_model(chat.model)
        completion = chat.completion(endpoints.template)
        completion.check(service.limits)
        return await endpoints.generate(request, completion, ChatResponse(service.name, chat.logprobs))

    @router.post("/v1/score")
    async def score(request: Request) -> dict[str, Any]:
        scored = parse(await endpoints.body(request), ScoreRequest)
        return await endpoints.run(request, endpoints.workers.start(service.score(scored)))

    return router


def _memory_routes(endpoints: Endpoints) -> APIRouter:
    router, service = APIRouter(), endpoints.service

    @router.api_route("/v1/memories", methods=READ_METHODS)
    def list_memories() -> dict[str, Any]:
        return {"object": "list", "data": service.memories.all()}

    @router.post("/v1/memories", status_code=201)
    async def read_memory(request: Request) -> dict[str, Any]:
        reading = parse(await endpoints.body(request), ReadRequest)
        return await endpoints.run(request, endpoints.workers.start(service.read(reading)))

    @router.api_route("/v1/memories/{name}", methods=READ_METHODS)
    def describe_memory(name: str) -> dict[str, Any]:
        return service.memories.about(name)

    @router.api_route("/v1/memories/{name}/file", methods=READ_METHODS)
    def download_memory(name: str) -> Response:
        data = service.memories.data(name)
        save_as = {"Content-Disposition": f'attachment; filename="{name}.mem"'}
        return Response(data, media_type=BINARY, headers=save_as)

    @router.put("/v1/memories/{name}/file", status_code=201)
    async def upload_memory(request: Request, name: str) -> dict[str, Any]:
        data = await endpoints.body(request, BINARY, service.memories.most_bytes + FILE_OVERHEAD)
        return await endpoints.run(request, endpoints.workers.start(service.put(name, data)))

    @router.delete("/v1/memories/{name}")
    def delete_memory(name: str) -> dict[str, Any]:
        service.memories.delete(name)
        return {"id": name, "object": "memory", "deleted": True}

    return router


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

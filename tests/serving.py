"""A server on loopback, and what asks it."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmrec.checkpoints.chat_template import PLAIN, ChatTemplate
from mmrec.checkpoints.loading import LoadedModel
from mmrec.serve.authentication import Access
from mmrec.serve.command import Server, listen
from mmrec.serve.limits import Limits
from mmrec.serve.protocol import CompletionRequest, ScoreRequest
from mmrec.serve.service import Event, Service, Tokens
from mmrec.serve.state_store import StateStore
from mmrec.serve.workers import Workers

LIMITS = Limits(body_bytes=30_000, prompt_tokens=5000, max_tokens=4000, choices=4, memories=20, cache=1)
KEY = "a-key-of-the-tests"
OPEN = Access()


class Client:
    """Asks a server on loopback."""

    def __init__(self, port: int, workers: Workers | None = None) -> None:
        self.port, self.workers = port, workers

    @contextmanager
    def open(self, method: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        given = {"content-type": "application/json"} if body is not None else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, given)
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        with self.open(method, path, body, **headers) as response:
            data = response.read()
            kind = response.getheader("content-type", "")
            return response.status, json.loads(data) if kind.startswith("application/json") else data

    def good(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        status, answer = self.ask(method, path, body, **headers)
        assert status in (200, 201), answer
        return answer

    def complete(self, **asked: Any) -> Any:
        return self.good("POST", "/v1/completions", asked)

    def text(self, **asked: Any) -> str:
        (choice,) = self.complete(**asked)["choices"]
        return str(choice["text"])

    def stream(self, **asked: Any) -> list[Any]:
        with self.open("POST", "/v1/completions", {"stream": True, **asked}) as response:
            assert response.getheader("content-type", "").startswith("text/event-stream")
            events = response.read().decode("utf-8").split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def idle(self) -> bool:
        """Whether all work ends within some seconds."""
        assert self.workers is not None
        for _ in range(500):
            if not self.workers.busy:
                return True
            time.sleep(0.02)
        return False


@contextmanager
def running(service: Service, access: Access = OPEN, template: ChatTemplate = PLAIN) -> Iterator[Client]:
    listening, _ = listen("127.0.0.1", 0)
    with listening:
        server = Server(service, access, template)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Client(listening.getsockname()[1], server.workers)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(20)
            assert not thread.is_alive()


def make_service(trained: LoadedModel, folder: Path, limits: Limits = LIMITS) -> Service:
    return Service("a", trained, StateStore(folder, trained, limits), limits)


def hold_scores(service: Service) -> threading.Event:
    """Make every score wait for the event that is returned."""
    go_on = threading.Event()

    def waits(_: ScoreRequest) -> Iterator[dict[str, Any]]:
        assert go_on.wait(30)
        yield {"done": True}

    service.score = waits  # type: ignore[method-assign, assignment]
    return go_on


def events(service: Service, request: CompletionRequest) -> Iterator[Event | None]:
    """Yield what a completion yields, with nobody else in the batch."""
    work, batch, answer = service.complete(request), service.make_batch(), None
    with suppress(StopIteration):
        while True:
            item = work.send(answer)
            answer = batch.step(item.rows, item.tokens) if isinstance(item, Tokens) else None
            if not isinstance(item, Tokens):
                yield item

"""``mmrec serve``: a socket, a model, and a server between them."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from mmrec.checkpoints.chat_template import PLAIN, ChatOptions, ChatTemplate
from mmrec.checkpoints.loading import load_chosen
from mmrec.checkpoints.runs import CHECKPOINTS, CheckpointOptions
from mmrec.core.errors import UserError
from mmrec.core.threads import use_threads
from mmrec.serve.app import create_app
from mmrec.serve.authentication import Access, as_sent
from mmrec.serve.connections import bounded_protocol
from mmrec.serve.limits import DEFAULT, Limits
from mmrec.serve.service import Service
from mmrec.serve.state_store import StateStore
from mmrec.serve.workers import Workers

KEY_VARIABLE, SHORTEST_KEY = "MMREC_API_KEY", 16
LAST_SECONDS = 2
"""Answers on their way may take so long after Ctrl-C."""


def listen(host: str, port: int) -> tuple[socket.socket, bool]:
    """Return a socket that listens, and whether it can be reached from this machine alone.

    Raises:
        UserError: there is no such address here, or something listens there already.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port is {port}; it must be from 0 (any free one) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: something else listens there; give another, or 0 for any") from None
        reason = error.strerror if isinstance(error, OSError) else "it is no name"
        raise UserError(f"--host {host!r}, --port {port}: cannot listen there: {reason}") from None
    return listening, ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def find_key(loopback: bool) -> str | None:
    """Return the key of the environment; UserError where one is needed, or it is no good one."""
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        if not loopback:
            raise UserError(f"a host that others can reach needs a key: set {KEY_VARIABLE} to a long random string")
        return None
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{KEY_VARIABLE} must have at least {SHORTEST_KEY} letters, digits or signs of ASCII")
    return key


class Server(uvicorn.Server):
    """Serves ``service``; the other arguments are those of :func:`mmrec.serve.app.create_app`."""

    def __init__(self, service: Service, access: Access, template: ChatTemplate = PLAIN) -> None:
        self.workers = Workers(service.limits, service.make_batch())
        config = uvicorn.Config(
            create_app(service, self.workers, access, template),
            http=bounded_protocol(service.limits.connections),
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=service.limits.connections + 1,  # uvicorn counts the connection that sends the request
            timeout_graceful_shutdown=LAST_SECONDS,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, on a signal: with what is being written, which uvicorn would wait for."""
        self.workers.stop()
        super().handle_exit(sig, frame)


@dataclass(frozen=True)
class ServeOptions:
    """Address of the server, and who may send requests.

    Args:
        host: address to listen at; one that others can reach needs a key in the environment: MMREC_API_KEY.
        port: to listen at; 0 takes any free one.
        memories: folder of the named memories.
        allowed_hosts: further names that the server is reached by, as example.org, where a proxy passes them on.
        allowed_origins: pages that may send requests from a browser, as https://example.org.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    memories: Path = Path("memories")
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()

    def access(self, loopback: bool) -> Access:
        """Return who may send requests; UserError where a key is needed and not given, or a name is none."""
        named = [] if _is_address(self.host) else [as_sent(self.host)]
        return Access(find_key(loopback), loopback, (*named, *self.allowed_hosts), tuple(self.allowed_origins))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


UNCHANGED = ChatOptions()
"""The template is that of the model."""


def serve(
    checkpoint: CheckpointOptions, options: ServeOptions, limits: Limits = DEFAULT, chat: ChatOptions = UNCHANGED
) -> None:
    """Answer requests of OpenAI's completions API, and show a page to type in, until Ctrl-C.

    Args:
        checkpoint: of the model.
        options: address and access.
        limits: of requests.
        chat: of chat completions; what is not given is that of the model.
    """
    listening, loopback = listen(options.host, options.port)
    with listening:
        access = options.access(loopback)
        path = checkpoint.path()
        trained = load_chosen(checkpoint)
        use_threads(trained.net.config.dim, processes=limits.running)
        template = chat.change(trained.chat) or PLAIN
        name = path.parent.parent.name if path.parent.name == CHECKPOINTS else path.stem
        service = Service(name, trained, StateStore(options.memories, trained, limits), limits)
        shown = f"[{options.host}]" if ":" in options.host else options.host
        locked = ", with a key" if access.key else ""
        print(f"{name}: http://{shown}:{listening.getsockname()[1]}{locked}; Ctrl-C stops", flush=True)
        try:
            Server(service, access, template).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn's, after all has ended
            print("stopped")

"""Connections: silent and slow ones are closed after some seconds, and give way to those with work."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""The head of a request that takes longer to arrive is given up."""


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with a bound on the time that the head of a request takes.

    uvicorn bounds neither that nor the silence before a first request, and counts such connections against its limit
    (``limit_concurrency``): a hundred of them would shut everyone out. Here, where as many connections are open as
    may be, a new one takes the place of the one that has been waiting longest for the rest of a request.
    """

    waiting: ClassVar[dict[BoundedProtocol, None]]
    """Connections without a whole request, the longest waiting first; of one server, see :func:`bounded_protocol`."""

    most: ClassVar[int]
    """Connections that may be open."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, in place of another connection where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most and self.waiting:
            longest = next(iter(self.waiting))
            longest.stop_waiting()
            longest.transport.abort()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self.stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
            if self.conn.their_state is not h11.SEND_BODY:
                self.waiting.pop(self, None)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._wait()

    def stop_waiting(self) -> None:
        """Give up the place among those that wait."""
        self.waiting.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _wait(self) -> None:
        self.stop_waiting()
        self.waiting[self] = None
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self.stop_waiting()
        self.transport.abort()


def bounded_protocol(connections: int) -> type[BoundedProtocol]:
    """Return the protocol of one server, for as many ``connections``."""

    class OfOneServer(BoundedProtocol):
        waiting: ClassVar[dict[BoundedProtocol, None]] = {}
        most: ClassVar[int] = connections

    return OfOneServer

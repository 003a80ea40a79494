"""Threads for the model's work, so that the event loop stays free to answer; a bounded number wait for one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from mmrec.serve.limits import Limits
from mmrec.serve.protocol import ApiError

T = TypeVar("T")


class ClientDisconnected(Exception):
    """Nobody waits for the answer any longer."""


class Workers:
    """Runs generators in threads. Used from one event loop.

    Args:
        limits: of the number at work and of those that wait.
    """

    def __init__(self, limits: Limits) -> None:
        self._pool = ThreadPoolExecutor(limits.running, thread_name_prefix="mmrec-work")
        self._places = limits.running + limits.waiting
        self._works: set[Job[Any]] = set()
        self._stopping = False

    @property
    def busy(self) -> int:
        """Return how many requests are at work or wait."""
        return len(self._works)

    def start(self, work: Iterator[T | None]) -> Job[T]:
        """Begin ``work`` in a thread as soon as one is free.

        Raises:
            ApiError: as many as may are at work or wait already, or the server ends.
        """
        if self._stopping:
            raise _stopping()
        if len(self._works) >= self._places:
            raise ApiError(429, "as many requests as may wait are waiting; try again soon", code="busy")
        return Job(work, self._pool, self._works)

    def stop(self) -> None:
        """Tell all work to end soon, and begin no more. May be called by the handler of a signal."""
        self._stopping = True
        for work in tuple(self._works):
            work.stopped = True

    def close(self) -> None:
        """End all work, and return when it has ended."""
        self.stop()
        self._pool.shutdown(cancel_futures=True)


def _stopping() -> ApiError:
    return ApiError(503, "the server is being stopped", code="stopping")


class Job(AsyncIterator[T]):
    """What a generator in a thread yields, or raises, as it comes.

    Args:
        work: the generator; None, which it may yield, is left out.
        pool: of the threads.
        works: this is in it until the work is over.

    Attributes:
        stopped: once true, the work ends at its next yield.
    """

    def __init__(self, work: Iterator[T | None], pool: ThreadPoolExecutor, works: set[Job[Any]]) -> None:
        self.stopped, self._works = False, works
        self._arrived: asyncio.Queue[tuple[T | None, BaseException | None]] = asyncio.Queue()
        works.add(self)
        self._future = pool.submit(self._run, work, asyncio.get_running_loop())

    def _run(self, work: Iterator[T | None], loop: asyncio.AbstractEventLoop) -> None:
        last: tuple[T | None, BaseException | None] = (None, None)
        try:
            for item in work:
                if self.stopped:
                    raise _stopping()
                if item is not None:
                    loop.call_soon_threadsafe(self._arrived.put_nowait, (item, None))
        except BaseException as error:
            last = (None, error)
        loop.call_soon_threadsafe(self._works.discard, self)
        loop.call_soon_threadsafe(self._arrived.put_nowait, last)

    async def __anext__(self) -> T:
        item, error = await self._arrived.get()
        if error is not None:
            raise error
        if item is None:
            raise StopAsyncIteration
        return item

    def close(self) -> None:
        """End the work at its next yield, or before it began."""
        self.stopped = True
        if self._future.cancel():
            self._works.discard(self)


async def cancel_on_disconnect(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """Return what ``answer`` does, but give it up where the client goes; its body must have been read before.

    Raises:
        ClientDisconnected: the client is no longer there.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnected
        return work.result()
    finally:
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)

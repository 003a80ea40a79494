"""Threads for the model's work, so that the event loop stays free to answer; a bounded number wait for one."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from starlette.requests import Request
from torch import Tensor

from mmrec.inference.batch import Batch
from mmrec.serve.limits import Limits
from mmrec.serve.protocol import ApiError
from mmrec.serve.service import Tokens

T = TypeVar("T")


class ClientDisconnected(Exception):
    """Nobody waits for the answer any longer."""


class Workers:
    """Runs generators in threads; where they ask for :class:`Tokens`, all in one. Used from one event loop.

    Args:
        limits: of the number at work and of those that wait.
        batch: what reads the tokens.
    """

    def __init__(self, limits: Limits, batch: Batch) -> None:
        self._pool = ThreadPoolExecutor(limits.running, thread_name_prefix="mmrec-work")
        self._places = limits.running + limits.waiting
        self._works: set[Job[Any]] = set()
        self._stopping = False
        self._batch, self._rows = batch, limits.batch
        self._arrivals: queue.SimpleQueue[tuple[Job[Any], Tokens] | None] = queue.SimpleQueue()
        self._generating = threading.Thread(target=self._generate, name="mmrec-generate", daemon=True)
        self._generating.start()

    @property
    def busy(self) -> int:
        """Return how many requests are at work or wait."""
        return len(self._works)

    def start(self, work: Generator[T | Tokens | None, Tensor | None, None]) -> Job[T]:
        """Begin ``work`` in a thread as soon as one is free.

        Raises:
            ApiError: as many as may are at work or wait already, or the server ends.
        """
        if self._stopping:
            raise _stopping()
        if len(self._works) >= self._places:
            raise ApiError(429, "as many requests as may wait are waiting; try again soon", code="busy")
        job: Job[T] = Job(work, self._works)
        self._submit(job)
        return job

    def stop(self) -> None:
        """Tell all work to end soon, and begin no more. May be called by the handler of a signal."""
        self._stopping = True
        for work in tuple(self._works):
            work.stopped = True

    def close(self) -> None:
        """End all work, and return when it has ended."""
        self.stop()
        self._arrivals.put(None)
        self._generating.join()
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, job: Job[Any]) -> None:
        job.future = self._pool.submit(self._read, job)

    def _read(self, job: Job[Any]) -> None:
        """Do the work of a job until it ends or asks for tokens."""
        while not job.is_over:
            if (tokens := job.advance(None)) is not None:
                self._arrivals.put((job, tokens))
                return

    @torch.inference_mode()
    def _generate(self) -> None:
        """Read a token of each text at a time, as long as there are some; then wait for more."""
        waiting: deque[tuple[Job[Any], Tokens]] = deque()
        asking: list[tuple[Job[Any], Tokens]] = []
        while True:
            while not self._arrivals.empty() or not (waiting or asking):
                if (arrived := self._arrivals.get()) is None:
                    return self._give_up([*waiting, *asking])
                waiting.append(arrived)
            rows = sum(len(tokens.rows) for _, tokens in asking)
            while waiting and (not asking or rows + len(waiting[0][1].rows) <= self._rows):
                asking.append(waiting.popleft())
                rows += len(asking[-1][1].rows)
            asking = self._step(asking)
            waiting = deque(entry for entry in waiting if not entry[0].end_if_stopped())

    def _step(self, asking: list[tuple[Job[Any], Tokens]]) -> list[tuple[Job[Any], Tokens]]:
        """Read the tokens for which jobs ask, and let them go on; return those that ask for more."""
        asking = [entry for entry in asking if not entry[0].end_if_stopped()]
        if not asking:
            return []
        rows = [row for _, tokens in asking for row in tokens.rows]
        try:
            logits = self._batch.step(rows, [token for _, tokens in asking for token in tokens.tokens])
        except Exception as error:
            for job, _ in asking:
                job.end(error)
            return []
        going_on = []
        for (job, _), some in zip(asking, logits.split([len(tokens.rows) for _, tokens in asking]), strict=True):
            if (tokens := job.advance(some)) is not None:
                going_on.append((job, tokens))
            elif not job.is_over:
                self._submit(job)  # what comes next takes longer, and is no business of the others
        return going_on

    def _give_up(self, asking: list[tuple[Job[Any], Tokens]]) -> None:
        for job, _ in asking:
            job.end(_stopping())


def _stopping() -> ApiError:
    return ApiError(503, "the server is being stopped", code="stopping")


class Job(AsyncIterator[T]):
    """What a generator yields, or raises, as it comes; whoever runs it calls :meth:`advance`.

    Args:
        work: the generator; None, which it may yield, is left out.
        works: this is in it until the work is over.

    Attributes:
        stopped: once true, the work ends at its next yield.
        is_over: whether the work has ended.
        future: of the thread in which the work goes on, or went on last.
    """

    future: Future[None]

    def __init__(self, work: Generator[T | Tokens | None, Tensor | None, None], works: set[Job[Any]]) -> None:
        self.stopped = self.is_over = False
        self._work, self._works, self._loop = work, works, asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[T | None, BaseException | None]] = asyncio.Queue()
        works.add(self)

    def advance(self, answer: Tensor | None) -> Tokens | None:
        """Go on with ``answer`` until the work asks for tokens, which are returned, or yields None, or is over."""
        try:
            item = self._work.send(answer)
            while True:
                if self.stopped:
                    raise _stopping()
                if item is None or isinstance(item, Tokens):
                    return item
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (item, None))
                item = next(self._work)
        except StopIteration:
            self.end(None)
        except BaseException as error:
            self.end(error)
        return None

    def end_if_stopped(self) -> bool:
        """End the work where it was stopped; return whether it was."""
        if self.stopped:
            self.end(_stopping())
        return self.stopped

    def end(self, error: BaseException | None) -> None:
        """End the work, and tell it to who waits for it."""
        self.is_over = True
        self._work.close()
        self._loop.call_soon_threadsafe(self._works.discard, self)
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, (None, error))

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
        if self.future.cancel():
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

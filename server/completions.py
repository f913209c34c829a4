"""Futures of the writer's thread, awaited on the event loop.

`asyncio.wrap_future` would cancel the future when a caller hangs up, and what the writer was asked to do is
done whoever listens. The writer also completes up to 64 futures at once, and waking the loop is a system
call: so it is woken for the first one and takes the others along a moment later.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

# Replies wait so long for those that are completed together with them.
_TOGETHER_SECONDS = 0.001


class Completions:
    """Awaits futures of other threads; made inside the event loop that awaits."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._done: deque[tuple[Future[Any], asyncio.Future[Any]]] = deque()
        self._announced = False

    async def of(self, future: Future[T]) -> T:
        """The result of `future`, or its exception; it goes on where this call is cancelled."""
        if future.done():
            return future.result()
        waiting: asyncio.Future[T] = self._loop.create_future()
        future.add_done_callback(lambda done: self._completed(done, waiting))
        return await waiting

    def _completed(self, future: Future[T], waiting: asyncio.Future[T]) -> None:
        self._done.append((future, waiting))
        if not self._announced:
            self._announced = True
            self._loop.call_soon_threadsafe(self._loop.call_later, _TOGETHER_SECONDS, self._take)

    def _take(self) -> None:
        # Before the queue is looked at: what comes from here on is announced anew.
        self._announced = False
        while self._done:
            future, waiting = self._done.popleft()
            if waiting.done():
                continue  # the caller is gone
            error = future.exception()
            if error is None:
                waiting.set_result(future.result())
            else:
                waiting.set_exception(error)

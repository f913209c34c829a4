"""Watchers of runs: each is sent the events behind its revision, as fast as it reads and no faster.

Nothing is queued for a watcher. It holds a revision, the events lie with the run, and a batch is read when
the batch before has left; so a thousand watchers that hang cost the rounds nothing. One that does not read
for half a minute is cut, is told the revision to go on from, and loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from grpc import StatusCode

from fedsim.pb import federation_pb2 as pb
from fedsim.server.calls import Refused

if TYPE_CHECKING:
    from fedsim.server.runs import Runs
    from fedsim.server.telemetry import Telemetry

OVER = ("ok", "target", "early_stop", "stopped", "failed")
"""States of a run after which no event comes."""
MOST_WATCHERS = 256
SLOW_SECONDS = 30.0
BATCH = 500
# Looked at without a call, so that a lost wake-up is late and not for ever.
_LOOK_SECONDS = 10.0

log = logging.getLogger(__name__)


class Watchers:
    """Everybody who watches a run; all but `wake_soon` belongs to the event loop's thread.

    Args:
        runs: where events lie.
        pool: threads that read them.
    """

    def __init__(
        self, runs: Runs, telemetry: Telemetry, pool: Executor, *, slow_seconds: float = SLOW_SECONDS
    ) -> None:
        self._runs = runs
        self._telemetry = telemetry
        self._pool = pool
        self._slow_seconds = slow_seconds
        self._loop = asyncio.get_running_loop()
        self._news: set[asyncio.Event] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._news)

    def wake_soon(self) -> None:
        """There may be events. Called from any thread, any number of times."""
        with suppress(RuntimeError):  # the loop is closed: nobody watches any more
            self._loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        """End every watch: the coordinator stops."""
        self._closed = True
        self._wake()

    async def watch(self, run_id: str, after: int, context: Any) -> None:
        """Send the events of a run behind revision `after`, until it is over and all are sent.

        Args:
            context: of grpc.aio, which has no types.

        Raises:
            Refused: RESOURCE_EXHAUSTED, too many watch or this one reads too slowly; UNAVAILABLE, the
                coordinator stops.
        """
        if len(self._news) >= MOST_WATCHERS:
            text = f"{MOST_WATCHERS} watchers are connected"
            raise Refused(StatusCode.RESOURCE_EXHAUSTED, text, retry_seconds=10.0)
        news = asyncio.Event()
        self._news.add(news)
        try:
            while not self._closed:
                news.clear()
                over, events = await self._loop.run_in_executor(self._pool, self._read, run_id, after)
                for event in events:
                    await self._send(context, event)
                    after = event.revision
                if over and not events:
                    return
                if not events:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK_SECONDS):
                            await news.wait()
            raise Refused(StatusCode.UNAVAILABLE, "the coordinator stops; watch again when it is back")
        finally:
            self._news.discard(news)

    def _read(self, run_id: str, after: int) -> tuple[bool, list[pb.Event]]:
        # The state first: an event that comes between the two reads is found by the second.
        over = self._runs.get(run_id).state in OVER
        return over, list(self._runs.events(run_id, after))[:BATCH]

    async def _send(self, context: Any, event: pb.Event) -> None:
        try:
            async with asyncio.timeout(self._slow_seconds):
                await context.write(event)
        except TimeoutError:
            self._telemetry.watcher_dropped()
            resume = f"watch again after revision {event.revision - 1}"
            text = f"nothing was read for {self._slow_seconds:g} s; {resume}"
            log.warning("a watcher reads too slowly and is cut")
            raise Refused(StatusCode.RESOURCE_EXHAUSTED, text, retry_seconds=1.0) from None

    def _wake(self) -> None:
        for news in self._news:
            news.set()

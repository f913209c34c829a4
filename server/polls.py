"""Nodes that wait for work: parked calls, woken in the order in which they came.

A parked call costs a dictionary entry and a timer, no thread and no task of its own. There is room for a
bounded number of them, apart from the cap on calls that do something: whoever finds the room full is
answered at once with a delay, so that heartbeats and submissions get through however many nodes wait.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsim.server.board import OpenTask

# A pass over the parked calls gives way to other work after this many of them.
_SLICE = 256
# Seconds between two passes: runs without rounds announce offers hundreds of times a second.
_PAUSE = 0.01


class Polls:
    """The parked calls of a coordinator; all but `wake_soon` belongs to the event loop's thread.

    Args:
        room: how many calls may be parked at a time.
        offer: the task of a node, or None; must not block.
        rng: spreads the delays of those who are sent away.
    """

    def __init__(
        self, room: int, offer: Callable[[str], OpenTask | None], *, rng: random.Random | None = None
    ) -> None:
        self._room = room
        self._offer = offer
        self._rng = rng or random.Random()
        self._loop = asyncio.get_running_loop()
        self._parked: dict[str, asyncio.Future[OpenTask | None]] = {}
        self._pass: asyncio.TimerHandle | asyncio.Handle | None = None
        self._queue: list[str] = []
        self._announced = False
        self._again = False
        self._ended = 0.0  # when the last pass did, on the loop's clock
        self._closed = False

    def __len__(self) -> int:
        return len(self._parked)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._parked

    @property
    def full(self) -> bool:
        """Whether a further call would have to be sent away."""
        return self._closed or len(self._parked) >= self._room

    def delay(self) -> float:
        """Seconds that a node without a parking place should stay away, spread by chance."""
        return self._rng.uniform(1.0, 3.0)

    async def park(self, node_id: str, seconds: float) -> OpenTask | None:
        """Wait for a task of `node_id`; None when the time is over or the place is lost.

        A second call of the same node takes the place of the first, which is answered with nothing.
        """
        place: asyncio.Future[OpenTask | None] = self._loop.create_future()
        before = self._parked.pop(node_id, None)
        if before is not None:
            _answer(before, None)
        self._parked[node_id] = place
        timer = self._loop.call_later(seconds, _answer, place, None)
        try:
            return await place
        finally:
            timer.cancel()
            if self._parked.get(node_id) is place:
                del self._parked[node_id]

    def wake_soon(self) -> None:
        """Tasks may be there: ask for every parked node soon. Called from any thread, any number of times."""
        if not self._announced:
            self._announced = True
            self._loop.call_soon_threadsafe(self._begin)

    def empty(self) -> None:
        """Answer every parked call with nothing and park no more: the coordinator drains."""
        self._closed = True
        for place in list(self._parked.values()):
            _answer(place, None)

    def _begin(self) -> None:
        # Before anybody is asked: what is announced from here on is announced anew.
        self._announced = False
        if self._pass is not None:
            self._again = True  # the pass under way may already be past a node
        elif self._parked:
            self._pass = self._loop.call_at(self._ended + _PAUSE, self._first)

    def _first(self) -> None:
        self._again = False
        self._queue = list(reversed(self._parked))
        self._step()

    def _step(self) -> None:
        """Ask for the next nodes in the order of their arrival."""
        for _ in range(min(_SLICE, len(self._queue))):
            node_id = self._queue.pop()
            place = self._parked.get(node_id)
            if place is not None and not place.done():
                self._ask(node_id, place)
        if self._queue:
            self._pass = self._loop.call_soon(self._step)
            return
        self._pass = None
        self._ended = self._loop.time()
        if self._again:
            self._begin()

    def _ask(self, node_id: str, place: asyncio.Future[OpenTask | None]) -> None:
        try:
            task = self._offer(node_id)
        except Exception as error:
            place.set_exception(error)  # the call of this node fails and says so, the pass goes on
            return
        if task is not None:
            place.set_result(task)


def _answer(place: asyncio.Future[OpenTask | None], task: OpenTask | None) -> None:
    if not place.done():
        place.set_result(task)

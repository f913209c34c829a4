"""Where the events of a run wait: those that the ledger announces, and the timers of its scheduler.

A timer that goes off takes its number in the journal like an answer does, so that both have one order.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence

from fedsim.journal import Entry
from fedsim.server.run_ledger import RunLedger


class Inbox:
    """Filled by the writer's thread, emptied by the run's.

    Args:
        ledger: of the run.
        clock: seconds of the run's clock at this moment.
    """

    def __init__(self, ledger: RunLedger, clock: float) -> None:
        self.ledger = ledger
        self.timers: dict[str, float] = {}  # name -> seconds of the run's clock
        self._started = time.monotonic() - clock
        self._events: queue.SimpleQueue[Sequence[Entry]] = queue.SimpleQueue()
        self._waiting: deque[Entry] = deque()  # out of the queue, not yet taken
        self._stop: BaseException | None = None

    @property
    def now(self) -> float:
        """Seconds of the run's clock."""
        return time.monotonic() - self._started

    def put(self, entries: Sequence[Entry]) -> None:
        """Events that are durable, in their order."""
        self._events.put(entries)  # at once: each put may wake the thread that waits

    def stop(self, reason: BaseException) -> None:
        """Whoever waits raises `reason`."""
        self._stop = reason
        self._events.put(())

    def waiting(self) -> deque[Entry]:
        """What is here already, at least one event of it where there is one; taken by ``popleft``."""
        while not self._waiting and not self._events.empty():
            self._waiting.extend(self._events.get())
        return self._waiting

    def emptied(self) -> list[Entry]:
        """All that is here already, taken out."""
        found: list[Entry] = []
        while self.waiting():
            found.append(self._waiting.popleft())
        return found

    def next(self, window: int, nothing_out: Callable[[], bool]) -> Entry | None:
        """Wait for the next event.

        Args:
            window: index of the open one, under which a timer is journalled.
            nothing_out: whether no client has a task.

        Returns:
            The event; None where none can come any more.

        Raises:
            BaseException: the reason that `stop` was given.
        """
        while True:
            if self._stop is not None:
                raise self._stop
            if self.waiting():
                return self._waiting.popleft()
            if not self.timers and nothing_out():
                self.ledger.database.writer.run(lambda connection: None)  # what is on its way arrives
                if not self.waiting():
                    return None
                continue
            until = min(self.timers.values()) - self.now if self.timers else None
            try:
                self._waiting.extend(self._events.get(timeout=None if until is None else max(0.0, until)))
            except queue.Empty:
                self._ring(window)

    def _ring(self, window: int) -> None:
        """The earliest timer, if it is due, takes its place among the events."""
        name = min(self.timers, key=lambda timer: self.timers[timer])
        at = self.timers[name]
        if at <= self.now:
            line = (window, "timer", at, {"name": name})
            writer = self.ledger.database.writer
            writer.submit(lambda connection: self.ledger.note(connection, [line]), self.put).result()
            del self.timers[name]

"""Slots for uploads: how many may run at a time, and who loses one.

An upload that brings no byte for a minute is cut. One that brings some, however few, goes on as long as
there is room; where another one needs the slot, the slowest below the least rate is cut and resumes from
its offset later.
"""

from __future__ import annotations

import asyncio
import contextlib

from grpc import StatusCode

from fedsim.server.calls import Refused

LEAST_RATE = 64_000.0  # bytes per second
WINDOW_SECONDS = 60.0


class Slot:
    """One upload under way.

    Args:
        idle_seconds: it may bring no byte for so long.
        window_seconds: over which its rate is measured.
    """

    def __init__(self, node_id: str, upload_id: bytes, idle_seconds: float, window_seconds: float) -> None:
        self.node_id = node_id
        self.upload_id = upload_id
        self._idle_seconds = idle_seconds
        self._window_seconds = window_seconds
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._bytes = 0
        self._deadline: asyncio.Timeout | None = None
        self._cut: Refused | None = None

    def waiting(self) -> asyncio.Timeout:
        """The deadline around the wait for one frame; `cut` ends it early."""
        self.check()
        self._deadline = asyncio.timeout(self._idle_seconds)
        return self._deadline

    def over(self) -> Refused:
        """Why the wait ended without a frame."""
        text = f"no data for {self._idle_seconds:g} s; resume the upload from its offset"
        return self._cut or Refused(StatusCode.DEADLINE_EXCEEDED, text)

    def check(self) -> None:
        """Raise what the upload was cut for, if it was."""
        if self._cut is not None:
            raise self._cut

    def cut(self, why: Refused) -> None:
        """End this upload: at once where it waits for a frame, else at its next wait."""
        self._cut = why
        if self._deadline is not None:
            # One that is over already cannot be moved; the next wait looks at `_cut`.
            with contextlib.suppress(RuntimeError):
                self._deadline.reschedule(self._loop.time())

    def count(self, size: int) -> None:
        """Bytes arrived."""
        now = self._loop.time()
        if now - self._since > self._window_seconds:
            self._since, self._bytes = now - self._window_seconds / 2, self._bytes // 2
        self._bytes += size

    def rate(self) -> float | None:
        """Bytes per second of late; None while it is too early to tell."""
        passed = self._loop.time() - self._since
        return self._bytes / passed if passed >= self._window_seconds / 4 else None


class Slots:
    """The uploads under way; used by the thread of the event loop alone.

    Args:
        per_node, total: uploads at a time.
        idle_seconds, window_seconds: see `Slot`.
    """

    def __init__(
        self,
        per_node: int,
        total: int,
        *,
        idle_seconds: float,
        window_seconds: float = WINDOW_SECONDS,
    ) -> None:
        self._per_node = per_node
        self._total = total
        self._idle_seconds = idle_seconds
        self._window_seconds = window_seconds
        self._taken: set[Slot] = set()

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, node_id: str, upload_id: bytes) -> Slot:
        """A slot for an upload; an older stream of the same upload loses its own.

        Raises:
            Refused: RESOURCE_EXHAUSTED, with the time after which to try again.
        """
        own = [slot for slot in self._taken if slot.node_id == node_id]
        for slot in own:
            if slot.upload_id == upload_id:
                self._cut(slot, Refused(StatusCode.ABORTED, "a newer stream goes on with this upload"))
        if sum(slot.upload_id != upload_id for slot in own) >= self._per_node:
            text = f"{self._per_node} uploads of this node are under way"
            raise Refused(StatusCode.RESOURCE_EXHAUSTED, text, retry_seconds=5.0)
        if len(self._taken) >= self._total and not self._free_slowest():
            text = f"{self._total} uploads are under way"
            raise Refused(StatusCode.RESOURCE_EXHAUSTED, text, retry_seconds=10.0)
        slot = Slot(node_id, upload_id, self._idle_seconds, self._window_seconds)
        self._taken.add(slot)
        return slot

    def give_back(self, slot: Slot) -> None:
        """The upload ended, whatever its end."""
        self._taken.discard(slot)

    def _free_slowest(self) -> bool:
        rated = [(rate, slot) for slot in self._taken if (rate := slot.rate()) is not None]
        rate, slowest = min(rated, key=lambda pair: pair[0], default=(LEAST_RATE, None))
        if slowest is None or rate >= LEAST_RATE:
            return False
        text = f"slower than {LEAST_RATE:.0f} bytes per second while others wait; resume the upload later"
        self._cut(slowest, Refused(StatusCode.RESOURCE_EXHAUSTED, text, retry_seconds=30.0))
        return True

    def _cut(self, slot: Slot, why: Refused) -> None:
        slot.cut(why)
        self._taken.discard(slot)

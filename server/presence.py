"""Which nodes are there: those that were heard of within two and a half heartbeats.

The runs are told of every change, and of many changes at once when a fleet connects: the telling is
delayed by a tenth of a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

HEARTBEATS = 2.5  # a node that was silent for so many of them is gone
_TOGETHER = 0.1


class Presence:
    """The nodes that are online; used by the thread of the event loop alone.

    Args:
        heartbeat_seconds: how often a node promises to be heard of.
        tell: takes the nodes that are online, after every change.
    """

    def __init__(self, heartbeat_seconds: float, tell: Callable[[frozenset[str]], None]) -> None:
        self._silence = HEARTBEATS * heartbeat_seconds
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._heard: dict[str, float] = {}
        self._told: frozenset[str] = frozenset()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._heard)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._heard

    @property
    def online(self) -> frozenset[str]:
        """The nodes that are online."""
        return frozenset(self._heard)

    @property
    def told(self) -> frozenset[str]:
        """Those of them of which the runs know: a run that begins now has them."""
        return frozenset(self._told & self._heard.keys())

    def heard(self, node_id: str) -> None:
        """A call of this node arrived."""
        if node_id not in self._heard:
            self._changed()
        self._heard[node_id] = self._loop.time()

    def gone(self, node_id: str) -> None:
        """The node said goodbye, or may not come back."""
        if self._heard.pop(node_id, None) is not None:
            self._changed()

    def sweep(self, *, parked: Callable[[str], bool]) -> None:
        """Drop the nodes that were silent for too long.

        Args:
            parked: whether a node waits in a call that is still open, which is a sign of life as well.
        """
        now = self._loop.time()
        before = now - self._silence
        silent = [node_id for node_id, heard in self._heard.items() if heard < before]
        for node_id in silent:
            if parked(node_id):
                self._heard[node_id] = now
            else:
                del self._heard[node_id]
                self._changed()

    def refresh(self) -> None:
        """Count everybody as heard of now: this process itself stood still."""
        now = self._loop.time()
        self._heard = dict.fromkeys(self._heard, now)

    def close(self) -> None:
        """Tell nobody anything any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _changed(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(_TOGETHER, self._flush)

    def _flush(self) -> None:
        self._timer = None
        online = self.online
        self._tell(online)
        self._told = online

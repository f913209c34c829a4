"""When each node asked for work last, and what it computes on, for the list of nodes.

Nodes ask again and again, and nobody needs it to the second. What is noted of a node is written when its
device is news, and else every few minutes; many nodes by one write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fedsim.printable import printable

EVERY_SECONDS = 300.0
LONGEST = 32
"""Characters of the name of a device; it comes from the node."""
_TOGETHER = 1_000  # the ledger's writer has other work to do


class _Noted(NamedTuple):
    device: str
    at: float  # on the clock


class Sightings:
    """What was noted of each node; used by the thread of the event loop alone.

    Args:
        note: takes node identifier -> device for the database, and waits for nothing.
        every_seconds: a node whose device is no news is noted so often.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        note: Callable[[Mapping[str, str]], None],
        *,
        every_seconds: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._note = note
        self._every_seconds = every_seconds
        self._clock = clock
        self._noted: dict[str, _Noted] = {}
        self._fresh: dict[str, str] = {}

    def seen(self, node_id: str, device: str) -> None:
        """A node asks for work.

        Args:
            device: empty where it does not say, as in most calls: it is told once in a session.
        """
        if device:
            device = printable(device[:LONGEST])[:LONGEST]
        now, before = self._clock(), self._noted.get(node_id)
        if before is not None:
            device = device or before.device
            if device == before.device and now - before.at < self._every_seconds:
                return
        self._noted[node_id] = _Noted(device, now)
        self._fresh[node_id] = device

    def write(self) -> None:
        """Hand over what is fresh, or a part of it where much is; called about once a second."""
        if not self._fresh:
            return
        some = list(self._fresh)[:_TOGETHER]
        self._note({node_id: self._fresh.pop(node_id) for node_id in some})

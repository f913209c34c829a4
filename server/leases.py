"""Who holds which task until when: a table in memory on a monotonic clock.

The assignment of a task to a node is durable, it lies with the run; a lease only says how long the node
may be silent. It ends 90 s after the last sign of progress, and at the latest `longest_seconds` after it
was granted. The run hears of its end only after a time of grace, in which an answer still counts and a
heartbeat brings the lease back. Because nothing of it is on disk, every lease is granted anew after a
restart, and also after the process itself was held up: a node must not lose its work because nobody here
listened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fedsim.server.presence import HEARTBEATS

if TYPE_CHECKING:
    from fedsim.pb.federation_pb2 import Progress
    from fedsim.server.board import OpenTask


STANDSTILL_SECONDS = 5.0


def standstill(seconds: float, heartbeat_seconds: float, *, look_seconds: float) -> float:
    """Seconds between two looks at leases and nodes, from which on this process could hear nobody.

    Args:
        seconds: of a lease; heartbeat_seconds: how often a node is heard of.
        look_seconds: between two looks as a rule.
    """
    # Half of what a node may be silent for: the other half is its own.
    most = min(seconds, HEARTBEATS * heartbeat_seconds) / 2
    return max(1.5 * look_seconds, min(STANDSTILL_SECONDS, most))


class Held(NamedTuple):
    """What a node is told about one lease."""

    task_id: bytes
    seconds: float  # until the lease ends; 0 where the node does not hold it


class Lease:
    """One task in the hands of one node."""

    __slots__ = ("ends", "node_id", "seen", "task_id", "wall")

    def __init__(self, task_id: bytes, node_id: str) -> None:
        self.task_id = task_id
        self.node_id = node_id
        self.ends = 0.0
        self.wall = 0.0
        self.seen = (0, 0, 0)  # phase, step, bytes: what the last heartbeat said


class Leases:
    """All leases of a coordinator; used by the thread of the event loop alone.

    Args:
        seconds: a lease lives this long after the last progress.
        longest_seconds: wall for one task, whatever its progress says.
        grace_seconds: between the end of a lease and the end of the task.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        seconds: float,
        longest_seconds: float,
        *,
        grace_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self.longest_seconds = longest_seconds
        self.grace_seconds = grace_seconds
        self._clock = clock
        self._held: dict[bytes, Lease] = {}
        self._of_node: dict[str, set[bytes]] = {}
        self._looked = clock()

    def __len__(self) -> int:
        return len(self._held)

    def grant(self, task: OpenTask) -> float:
        """Lease `task` to its node, or confirm the lease that the node already holds.

        Asking again is a sign of life and prolongs the lease, but not beyond its wall.

        Returns:
            Seconds until the lease ends.
        """
        now = self._clock()
        lease = self._held.get(task.task_id)
        if lease is None or lease.node_id != task.node_id:
            self.end(task.task_id)
            lease = Lease(task.task_id, task.node_id)
            lease.wall = now + self.longest_seconds
            self._held[task.task_id] = lease
            self._of_node.setdefault(task.node_id, set()).add(task.task_id)
        lease.ends = min(now + self.seconds, lease.wall)
        return max(lease.ends - now, 0.0)

    def holder(self, task_id: bytes) -> str | None:
        """The node that holds `task_id`."""
        lease = self._held.get(task_id)
        return lease.node_id if lease else None

    def beat(self, node_id: str, progress: Progress) -> Held:
        """Prolong one lease where its task went on since the last heartbeat.

        A phase without a counter (no number of steps, no bytes) is taken at its word: the node lives.

        Args:
            node_id: who sends the heartbeat.
            progress: what it says about one task.
        """
        lease = self._held.get(progress.task_id)
        if lease is None or lease.node_id != node_id:
            return Held(progress.task_id, 0.0)
        now = self._clock()
        seen = (progress.phase, progress.step, progress.bytes)
        counted = progress.steps > 0 or progress.bytes > 0
        if not counted or seen != lease.seen:
            lease.ends = min(now + self.seconds, lease.wall)
        lease.seen = seen
        return Held(progress.task_id, max(lease.ends - now, 0.0))

    def end(self, task_id: bytes) -> bool:
        """Forget the lease of `task_id`; False where nobody held it."""
        lease = self._held.pop(task_id, None)
        if lease is None:
            return False
        tasks = self._of_node[lease.node_id]
        tasks.discard(task_id)
        if not tasks:
            del self._of_node[lease.node_id]
        return True

    def end_all(self, node_id: str) -> list[bytes]:
        """Forget every lease of a node that says goodbye: its tasks."""
        tasks = list(self._of_node.get(node_id, ()))
        for task_id in tasks:
            self.end(task_id)
        return tasks

    def gap(self) -> float:
        """Seconds since `overdue` was called last."""
        return self._clock() - self._looked

    def overdue(self, gap_seconds: float) -> list[bytes]:
        """Forget the leases whose time, grace included, is over.

        Args:
            gap_seconds: where more time than this has passed since the last call, this process stood
                still and could hear nobody: every lease is granted anew instead, wall included.

        Returns:
            Their tasks.
        """
        now = self._clock()
        passed, self._looked = now - self._looked, now
        if passed > gap_seconds:
            for lease in self._held.values():
                lease.wall += passed
                lease.ends = min(now + self.seconds, lease.wall)
            return []
        late = now - self.grace_seconds
        over = [lease.task_id for lease in self._held.values() if lease.ends <= late]
        for task_id in over:
            self.end(task_id)
        return over

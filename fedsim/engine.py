"""What carries tasks to clients and brings answers back: the only part that differs between uses.

An arrival is announced by its metadata; its vectors are asked for when the window closes, in the
order in which they are to be folded. In simulation that is when they are computed, in blocks, so
that a device in flight costs nothing but the training that counts; on a coordinator they lie in
files by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from fedsim.types import Floats, Ids, Task, UpdateBlock

Weigh = Callable[[UpdateBlock], Floats | None]
"""Answers of which all but what training finds out is there -> their weights, None where rows are needed."""


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A window opened: its tasks may be dispatched."""


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """Clients answered, [b] ids and the versions they started from; the two together name a task."""

    ids: Ids
    base_version: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Failed:
    """Clients will not answer: dropped out, crashed, or their training raised.

    `base_version` as in `Arrived`; None stands for the latest task of each client.
    """

    ids: Ids
    reason: str
    base_version: Ids | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """The server looked at these answers and refused them (not finite, no weight)."""

    ids: Ids
    reason: str
    base_version: Ids | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Left:
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Timer:
    """A timer that the scheduler had set went off."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Drained:
    """Nothing is in flight and no timer runs: no further event can come."""


Event = Opened | Arrived | Failed | Refused | Joined | Left | Timer | Drained


class Engine(Protocol):
    """Carries tasks; owns devices, processes and the clock, never mathematics."""

    @property
    def now(self) -> float:
        """Seconds of the run's clock: virtual in simulation."""
        ...

    def submit(self, task: Task) -> None:
        """Send a task to its clients."""
        ...

    def set_timer(self, name: str, at: float) -> None:
        """Emit ``Timer(name)`` when the clock reaches `at`; replaces a timer of the same name."""
        ...

    def next_event(self) -> Event:
        """The next event in time; `Drained` when none can come."""
        ...

    def settle(self) -> list[Event]:
        """A round is about to close without everybody: what was acknowledged and not yet announced.

        Until the next `next_event`, or the next round, no answer is taken.
        """
        ...

    def collect(
        self, ids: Ids, base_version: Ids, weigh: Weigh | None = None
    ) -> Iterator[UpdateBlock | Failed]:
        """The answers of these tasks in the order of the engine's plan for them; asked for once.

        Args:
            weigh: where sums are enough; an engine may answer with rows all the same.
        """
        ...

    def commit(self, ids: Ids, base_version: Ids) -> None:
        """These answers were folded into a committed model: their client states become current."""
        ...

    def cancel(self) -> None:
        """Forget everything in flight and every timer."""
        ...

    def close(self) -> None: ...

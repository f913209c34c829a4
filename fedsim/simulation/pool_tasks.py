"""What a pool keeps in mind: who waits for which blocks, and which worker has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedsim.errors import RunFailed
from fedsim.simulation.crew import Order
from fedsim.simulation.pool_arena import Page, Slot
from fedsim.simulation.pool_messages import Words
from fedsim.simulation.pool_process import Process
from fedsim.training.answer import Answer
from fedsim.training.work import ClientFailed

DEATHS = 3
"""Workers that one block may take with it before the run fails."""

Outcome = Answer | ClientFailed | Exception


@dataclass(slots=True, eq=False)
class Call:
    """One call of `Pool.answers`.

    Args:
        spec: local training, as words; costs: of the blocks; order: number of a block -> the block.
        begun: blocks before this are on their way, done, or in `waiting`.
        waiting: blocks that may be begun, (-cost, number), a heap.
        done: by number, those not yet given out.
        slots: that it has used.
        over: nobody waits for its blocks any more.
    """

    spec: Words
    costs: Sequence[float]
    order: Callable[[int], Order]
    begun: int = 0
    waiting: list[tuple[float, int]] = field(default_factory=list)
    done: dict[int, Outcome] = field(default_factory=dict)
    slots: set[int] = field(default_factory=set)
    over: bool = False


@dataclass(slots=True, eq=False)
class Task:
    """A block that a worker has.

    Args:
        call: that it belongs to; number: of the block in it.
        ticket: that the worker's reply names.
        deaths: workers that died over it.
    """

    call: Call
    number: int
    ticket: int
    order: Order
    slot: Slot
    page: Page | None
    deaths: int = 0

    @property
    def named(self) -> str:
        """Its clients, the first of them by their ids."""
        ids = self.order.work.ids.tolist()
        return ",".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


@dataclass(slots=True, eq=False)
class Seat:
    """A place in the pool, and the process that fills it.

    Args:
        process: None until it gets something to do.
        tasks: what it has, in its order.
        since: when it last got or did something; warned: how often it was said that it takes long.
    """

    number: int
    process: Process | None = None
    tasks: deque[Task] = field(default_factory=deque)
    since: float = 0.0
    warned: int = 0

    @property
    def load(self) -> tuple[float, int]:
        return sum(task.call.costs[task.number] for task in self.tasks), len(self.tasks)


def deadly(task: Task, how: str) -> RunFailed:
    """The error of a block that ended `DEATHS` workers, the last of them in the way that `how` says."""
    return RunFailed(
        f"{DEATHS} worker processes died over the same clients",
        code="FS-RUN-030",
        where=f"clients {task.named}",
        why=f"the last one ended {how}",
        hint="where memory ran out, use fewer workers or a smaller engine.block; "
        "workers = 1 trains in this process and shows what happens",
    )

"""When clients work and when a window closes: policies of the round machine.

A scheduler is a pure function of what the server can see and of the event that came. Synchronous
rounds are here; windows by timer, buffers and immediate updates answer the same events with the same
commands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fedsim.engine import Arrived, Drained, Event, Failed, Left, Opened, Refused, Timer
from fedsim.errors import ConfigError
from fedsim.types import Ids


class View(NamedTuple):
    """What a scheduler sees of the server.

    Args:
        window, version, attempt: of the open window.
        now: seconds of the run's clock.
        population: N.
        in_flight, received: numbers of tasks of the open window.
        sample: count -> ids of clients that have no task in flight.
    """

    window: int
    version: int
    attempt: int
    now: float
    population: int
    in_flight: int
    received: int
    sample: Callable[[int], Ids]


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    ids: Ids


@dataclass(frozen=True, slots=True, eq=False)
class SetTimer:
    name: str
    at: float


@dataclass(frozen=True, slots=True, eq=False)
class CloseWindow:
    pass


Command = Dispatch | SetTimer | CloseWindow


class Scheduler(NamedTuple):
    """A policy.

    Args:
        mode: ``sync`` cancels what is in flight when a window closes; ``async`` lets it go on.
        on_event: (view, event) -> commands, in order.
        quorum: answers without which a window fails.
    """

    mode: Literal["sync", "async"]
    on_event: Callable[[View, Event], list[Command]]
    quorum: int


def sync(
    *, cohort: int, quorum: int = 1, deadline: float | None = None, overcommit: float = 1.0
) -> Scheduler:
    """Rounds: a cohort is asked, and the round closes when all of it has answered.

    With `overcommit` more are asked, and the round closes as soon as `cohort` have answered (those that
    answer at the same moment all count). Without it everybody who was drawn is waited for, also where
    a sampler draws more than `cohort`: dropping the slowest of a Poisson draw would bias it.

    Args:
        cohort: answers wanted.
        quorum: answers without which the round fails; 0 lets an empty round pass.
        deadline: seconds after which the round closes with what there is, None for never.
        overcommit: factor >= 1 by which more clients are asked; the slowest are cancelled.

    Raises:
        ConfigError: a quorum above the cohort, a deadline or a factor out of range.
    """
    if not 0 <= quorum <= cohort:
        raise ConfigError(
            "the quorum cannot be reached",
            code="FS-CFG-063",
            where=f"[round] quorum = {quorum}",
            why=f"a round has {cohort} clients",
            hint=f"set quorum between 0 and {cohort}",
        )
    if not 1.0 <= overcommit < math.inf or (deadline is not None and not deadline > 0.0):
        raise ConfigError(
            "overcommit must be at least 1 and the deadline positive",
            code="FS-CFG-064",
            where=f"[round] overcommit = {overcommit}, deadline = {deadline}",
            hint="leave the keys out for neither",
        )

    def on_event(view: View, event: Event) -> list[Command]:
        if isinstance(event, Opened):
            ids = view.sample(math.ceil(cohort * overcommit))
            commands: list[Command] = [Dispatch(ids)]
            if deadline is not None:
                commands.append(SetTimer("deadline", view.now + deadline))
            return commands if len(ids) else [CloseWindow()]
        if isinstance(event, Timer | Drained):
            return [CloseWindow()]
        enough = overcommit > 1.0 and view.received >= cohort
        if isinstance(event, Arrived | Failed | Left | Refused) and (enough or view.in_flight == 0):
            return [CloseWindow()]
        return []

    return Scheduler("sync", on_event, quorum)

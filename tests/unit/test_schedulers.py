"""The synchronous scheduler: whom it asks, when it closes, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.engine import Arrived, Drained, Event, Failed, Joined, Opened, Refused, Timer
from fedsim.errors import ConfigError
from fedsim.schedulers import CloseWindow, Command, Dispatch, Scheduler, View, sync

ONE = np.array([0])
ARRIVED, FAILED, REFUSED = Arrived(ONE, ONE), Failed(ONE, "lost"), Refused(ONE, "not finite")


def after(
    scheduler: Scheduler, event: Event, *, in_flight: int = 0, received: int = 0, there: int = 100
) -> list[Command]:
    view = View(0, 0, 0, 0.0, 100, in_flight, received, lambda count: np.arange(min(count, there)))
    return scheduler.on_event(view, event)


def closes(commands: list[Command]) -> bool:
    return any(isinstance(command, CloseWindow) for command in commands)


@pytest.mark.parametrize(("overcommit", "asked"), [(1.0, 10), (1.25, 13), (1.3, 13)])
def test_it_asks_the_cohort_times_the_factor_rounded_up(overcommit: float, asked: int) -> None:
    commands = after(sync(cohort=10, overcommit=overcommit), Opened())
    assert [len(c.ids) for c in commands if isinstance(c, Dispatch)] == [asked]
    assert not closes(commands)


def test_it_closes_at_once_when_nobody_is_there() -> None:
    assert closes(after(sync(cohort=10), Opened(), there=0))


def test_it_closes_when_enough_have_answered_whoever_is_still_working() -> None:
    scheduler = sync(cohort=10, overcommit=1.5)
    assert not closes(after(scheduler, ARRIVED, in_flight=6, received=9))
    assert closes(after(scheduler, ARRIVED, in_flight=5, received=10))


@pytest.mark.parametrize("event", [ARRIVED, FAILED, REFUSED])
def test_it_closes_when_nobody_works_any_more(event: Event) -> None:
    assert closes(after(sync(cohort=10), event, in_flight=0, received=3))
    assert not closes(after(sync(cohort=10), event, in_flight=1, received=3))


@pytest.mark.parametrize("event", [Timer("deadline"), Drained()])
def test_it_closes_at_the_deadline_and_when_nothing_can_come(event: Event) -> None:
    assert closes(after(sync(cohort=10, deadline=1.0), event, in_flight=4, received=2))


def test_a_client_that_joins_changes_nothing_in_an_open_round() -> None:
    assert after(sync(cohort=10), Joined(ONE), in_flight=3) == []


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"quorum": 11}, "FS-CFG-063"),
        ({"quorum": -1}, "FS-CFG-063"),
        ({"overcommit": 0.5}, "FS-CFG-064"),
        ({"deadline": 0.0}, "FS-CFG-064"),
        ({"deadline": float("nan")}, "FS-CFG-064"),
        ({"overcommit": float("nan")}, "FS-CFG-064"),
    ],
)
def test_impossible_parameters_are_refused(parameters: dict[str, float], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sync(cohort=10, **parameters)  # type: ignore[arg-type]
    assert caught.value.code == code
    assert caught.value.hint


def test_it_is_synchronous_and_keeps_its_quorum() -> None:
    scheduler = sync(cohort=10, quorum=4)
    assert (scheduler.mode, scheduler.quorum) == ("sync", 4)

"""Leases on a clock that the test moves, and parked calls on a loop of their own."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from fedsim.pb import federation_pb2 as pb
from fedsim.server.completions import Completions
from fedsim.server.leases import Leases, standstill
from fedsim.server.polls import Polls
from fedsim.server.presence import Presence

SECONDS, WALL, GRACE = 90.0, 1_000.0, 60.0
GAP = 5.0


class Clock:
    """Monotonic seconds that stand still unless they are moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def task(number: int, node: str = "a") -> Any:
    """As much of a task as leases look at."""
    return SimpleNamespace(task_id=bytes([number]), node_id=node)


def progress(number: int, *, step: int = 0, steps: int = 0, sent: int = 0, phase: Any = pb.TRAINING) -> Any:
    return pb.Progress(task_id=bytes([number]), phase=phase, step=step, steps=steps, bytes=sent)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(clock: Clock) -> Leases:
    return Leases(SECONDS, WALL, grace_seconds=GRACE, clock=clock)


def pass_time(leases: Leases, clock: Clock, seconds: float) -> list[bytes]:
    """Let time pass as it does for a loop that looks every second: the tasks whose lease ended."""
    over = []
    for _ in range(round(seconds)):
        clock.now += 1.0
        over += leases.overdue(GAP)
    return over


def test_a_lease_without_a_sign_of_life_ends_after_its_grace(leases: Leases, clock: Clock) -> None:
    assert leases.grant(task(1)) == SECONDS
    assert pass_time(leases, clock, SECONDS + GRACE - 1) == []
    assert leases.holder(b"\1") == "a"
    assert pass_time(leases, clock, 1) == [b"\1"]
    assert leases.holder(b"\1") is None
    assert len(leases) == 0


def test_a_heartbeat_within_the_grace_brings_the_lease_back(leases: Leases, clock: Clock) -> None:
    leases.grant(task(1))
    pass_time(leases, clock, SECONDS + 10)
    assert leases.beat("a", progress(1, step=7, steps=9)).seconds == SECONDS
    assert pass_time(leases, clock, SECONDS + GRACE - 1) == []


def test_heartbeats_prolong_a_lease_only_while_the_counter_moves(leases: Leases, clock: Clock) -> None:
    leases.grant(task(1))
    for step in (1, 2):
        pass_time(leases, clock, 50)
        assert leases.beat("a", progress(1, step=step, steps=9)).seconds == SECONDS
    pass_time(leases, clock, 50)
    assert leases.beat("a", progress(1, step=2, steps=9)).seconds == SECONDS - 50
    assert pass_time(leases, clock, SECONDS - 50 + GRACE) == [b"\1"]


def test_bytes_are_a_counter_and_a_new_phase_is_progress(leases: Leases, clock: Clock) -> None:
    leases.grant(task(1))
    leases.beat("a", progress(1, step=9, steps=9))
    pass_time(leases, clock, 50)
    assert leases.beat("a", progress(1, sent=10, phase=pb.UPLOADING)).seconds == SECONDS
    pass_time(leases, clock, 50)
    assert leases.beat("a", progress(1, sent=10, phase=pb.UPLOADING)).seconds == SECONDS - 50
    assert leases.beat("a", progress(1, sent=11, phase=pb.UPLOADING)).seconds == SECONDS


def test_a_phase_without_a_counter_is_taken_at_its_word(leases: Leases, clock: Clock) -> None:
    leases.grant(task(1))
    for _ in range(5):
        pass_time(leases, clock, 50)
        assert leases.beat("a", progress(1)).seconds == SECONDS


def test_no_heartbeat_carries_a_lease_over_its_wall(leases: Leases, clock: Clock) -> None:
    leases.grant(task(1))
    over: list[bytes] = []
    for step in range(1, 60):
        over = pass_time(leases, clock, 20)
        if over:
            break
        leases.beat("a", progress(1, step=step, steps=100))
        leases.grant(task(1))
    assert over == [b"\1"]
    assert clock.now - 100.0 == WALL + GRACE


def test_the_same_task_is_leased_again_to_its_node(leases: Leases, clock: Clock) -> None:
    leases.grant(task(1))
    pass_time(leases, clock, 40)
    assert leases.grant(task(1)) == SECONDS
    assert len(leases) == 1


def test_a_task_that_moves_to_another_node_leaves_the_first(leases: Leases) -> None:
    leases.grant(task(1, "a"))
    leases.grant(task(1, "b"))
    assert leases.holder(b"\1") == "b"
    assert leases.end_all("a") == []
    assert leases.beat("a", progress(1)).seconds == 0


def test_what_a_node_does_not_hold_it_cannot_prolong(leases: Leases) -> None:
    leases.grant(task(1, "a"))
    assert leases.beat("b", progress(1, step=1, steps=2)).seconds == 0
    assert leases.beat("a", progress(2)).seconds == 0


def test_a_goodbye_ends_every_lease_of_the_node_and_no_other(leases: Leases) -> None:
    for number, node in ((1, "a"), (2, "a"), (3, "b")):
        leases.grant(task(number, node))
    assert sorted(leases.end_all("a")) == [b"\1", b"\2"]
    assert leases.end_all("a") == []
    assert leases.holder(b"\3") == "b"
    assert not leases.end(b"\1")


def test_after_a_standstill_every_lease_is_granted_anew(leases: Leases, clock: Clock) -> None:
    leases.grant(task(1))
    pass_time(leases, clock, 30)
    clock.now += 10_000.0  # the process was stopped; nobody could be heard
    assert leases.overdue(GAP) == []
    assert leases.beat("a", progress(1, step=0, steps=5)).seconds == SECONDS
    assert pass_time(leases, clock, SECONDS + GRACE - 1) == []
    assert pass_time(leases, clock, 1) == [b"\1"]


# Parked calls.


class Work:
    """Tasks by node, as the runs offer them; counts how often it was asked."""

    def __init__(self) -> None:
        self.tasks: dict[str, Any] = {}
        self.asked: list[str] = []

    def __call__(self, node_id: str) -> Any:
        self.asked.append(node_id)
        return self.tasks.get(node_id)


def test_a_parked_call_gets_its_task_when_it_is_woken_from_another_thread() -> None:
    async def scenario() -> Any:
        work = Work()
        polls = Polls(10, work)
        parked = asyncio.create_task(polls.park("a", 30.0))
        await asyncio.sleep(0)
        work.tasks["a"] = task(1)
        await asyncio.to_thread(polls.wake_soon)
        found = await asyncio.wait_for(parked, 60)
        return found, len(polls)

    found, left = asyncio.run(scenario())
    assert found.task_id == b"\1"
    assert left == 0


def test_a_parked_call_without_work_ends_when_its_time_is_over() -> None:
    async def scenario() -> Any:
        polls = Polls(10, Work())
        return await polls.park("a", 0.01), len(polls)

    assert asyncio.run(scenario()) == (None, 0)


def test_nodes_are_asked_in_the_order_in_which_they_came_and_none_is_left_out() -> None:
    nodes = [f"node{i}" for i in range(600)]

    async def scenario() -> tuple[list[str], list[Any]]:
        work = Work()
        polls = Polls(1_000, work)
        order: list[str] = []

        async def wait(node: str) -> Any:
            found = await polls.park(node, 30.0)
            order.append(node)
            return found

        parked = [asyncio.create_task(wait(node)) for node in nodes]
        await asyncio.sleep(0)
        work.tasks = {node: task(1, node) for node in nodes}
        for _ in range(50):  # more announcements than passes
            polls.wake_soon()
        return order, await asyncio.wait_for(asyncio.gather(*parked), 60)

    order, found = asyncio.run(scenario())
    assert order == nodes
    assert [task.node_id for task in found] == nodes


def test_an_announcement_during_a_pass_makes_another_pass() -> None:
    async def scenario() -> Any:
        work = Work()
        polls = Polls(10, work)
        late: Any = None

        def ask(node_id: str) -> Any:
            work.asked.append(node_id)
            if len(work.asked) == 2:  # the pass is past the first node already
                work.tasks["a"] = task(1)
                polls.wake_soon()
            return work.tasks.get(node_id)

        polls._offer = ask
        parked = [asyncio.create_task(polls.park(node, 30.0)) for node in ("a", "b")]
        await asyncio.sleep(0)
        polls.wake_soon()
        late = await asyncio.wait_for(parked[0], 60)
        parked[1].cancel()
        return late

    assert asyncio.run(scenario()).task_id == b"\1"


def test_a_second_call_of_a_node_takes_the_place_of_the_first() -> None:
    async def scenario() -> tuple[Any, int, Any]:
        work = Work()
        polls = Polls(1, work)
        first = asyncio.create_task(polls.park("a", 30.0))
        await asyncio.sleep(0)
        second = asyncio.create_task(polls.park("a", 30.0))
        nothing = await asyncio.wait_for(first, 60)
        parked = len(polls)
        work.tasks["a"] = task(1)
        polls.wake_soon()
        return nothing, parked, await asyncio.wait_for(second, 60)

    nothing, parked, found = asyncio.run(scenario())
    assert (nothing, parked, found.task_id) == (None, 1, b"\1")


def test_the_room_for_parked_calls_is_bounded_and_gone_calls_give_it_back() -> None:
    async def scenario() -> tuple[bool, bool, bool]:
        polls = Polls(1, Work())
        parked = asyncio.create_task(polls.park("a", 30.0))
        before = polls.full
        await asyncio.sleep(0)
        during = polls.full
        parked.cancel()
        await asyncio.gather(parked, return_exceptions=True)
        return before, during, polls.full

    assert asyncio.run(scenario()) == (False, True, False)


def test_a_drain_answers_everybody_and_parks_nobody() -> None:
    async def scenario() -> tuple[Any, bool]:
        polls = Polls(10, Work())
        parked = [asyncio.create_task(polls.park(node, 30.0)) for node in "abc"]
        await asyncio.sleep(0)
        polls.empty()
        return await asyncio.wait_for(asyncio.gather(*parked), 60), polls.full

    assert asyncio.run(scenario()) == ([None, None, None], True)


def test_a_mistake_in_offering_reaches_one_call_and_the_others_are_served() -> None:
    async def scenario() -> Any:
        def offer(node_id: str) -> Any:
            if node_id == "a":
                raise KeyError("a run is broken")
            return task(2, node_id)

        polls = Polls(10, offer)
        parked = [asyncio.create_task(polls.park(node, 30.0)) for node in "ab"]
        await asyncio.sleep(0)
        polls.wake_soon()
        return await asyncio.wait_for(asyncio.gather(*parked, return_exceptions=True), 60)

    broken, served = asyncio.run(scenario())
    assert isinstance(broken, KeyError)
    assert served.task_id == b"\2"


# What the writer completes.


def test_futures_of_another_thread_are_awaited_and_a_caller_that_hangs_up_cancels_nothing() -> None:
    async def scenario() -> tuple[list[Any], bool]:
        completions = Completions()
        futures: list[Future[int]] = [Future() for _ in range(5)]
        calls = [asyncio.create_task(completions.of(future)) for future in futures]
        await asyncio.sleep(0)
        calls[4].cancel()
        await asyncio.sleep(0)

        def complete() -> None:
            for number, future in enumerate(futures):
                if number == 3:
                    future.set_exception(KeyError("lost"))
                else:
                    future.set_result(number)

        await asyncio.to_thread(complete)
        found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        return [*found, await completions.of(futures[0])], futures[4].cancelled()

    found, cancelled = asyncio.run(scenario())
    assert found[:3] == [0, 1, 2]
    assert isinstance(found[3], KeyError)
    assert isinstance(found[4], asyncio.CancelledError)
    assert found[5] == 0
    assert not cancelled


# Presence.


def test_who_comes_and_goes_is_told_together() -> None:
    async def scenario() -> list[frozenset[str]]:
        told: list[frozenset[str]] = []
        presence = Presence(10.0, told.append)
        for node in "abc":
            presence.heard(node)
        presence.heard("a")
        await asyncio.sleep(0.15)
        presence.gone("b")
        presence.gone("nobody")
        await asyncio.sleep(0.15)
        return told

    assert asyncio.run(scenario()) == [frozenset("abc"), frozenset("ac")]


def test_a_silent_node_is_gone_unless_it_waits_in_an_open_call() -> None:
    async def scenario() -> tuple[frozenset[str], frozenset[str]]:
        presence = Presence(0.01, lambda online: None)
        presence.heard("a")
        presence.heard("b")
        at_once = presence.online
        await asyncio.sleep(0.05)
        presence.sweep(parked="b".__eq__)
        return at_once, presence.online

    assert asyncio.run(scenario()) == (frozenset("ab"), frozenset("b"))


def test_after_a_standstill_nobody_counts_as_silent() -> None:
    async def scenario() -> frozenset[str]:
        presence = Presence(10.0, lambda online: None)
        presence.heard("a")
        presence._heard["a"] -= 60  # so long it stood still
        presence.refresh()
        presence.sweep(parked=lambda node: False)
        return presence.online

    assert asyncio.run(scenario()) == frozenset("a")


def test_who_is_online_and_who_the_runs_know_of_are_told_apart() -> None:
    """An operator who sees a node and starts a run at once finds the node in it."""

    async def scenario() -> list[frozenset[str]]:
        told: list[frozenset[str]] = []
        presence = Presence(10.0, told.append)
        presence.heard("a")
        before = [presence.online, presence.told]
        while not told:
            await asyncio.sleep(0.01)
        before.append(presence.told)
        presence.gone("a")
        return [*before, presence.told, *told]

    a, nobody = frozenset("a"), frozenset[str]()
    assert asyncio.run(scenario()) == [a, nobody, a, nobody, a]


@pytest.mark.parametrize(
    ("lease", "beat", "found"), [(90, 20, 5.0), (6, 2.5, 3.0), (90, 1, 1.5), (1, 0.2, 1.5)]
)
def test_a_standstill_is_shorter_than_what_a_node_may_be_silent_for(
    lease: float, beat: float, found: float
) -> None:
    assert standstill(lease, beat, look_seconds=1.0) == found

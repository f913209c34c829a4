"""Clients that die, stand still or fail, and networks that do what networks do; each test names its rows."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.deployed import Deployment, Member, Run, held, stopped, unsent, until
from tests.deployed_values import large, values_of

pytestmark = pytest.mark.slow

# Short, and yet several heartbeats: whoever is well must not lose a task because the machine is busy.
SHORT_LEASES = {"FEDSIM_SERVER__LEASES__SECONDS": "10"}


def outcomes(run: Run) -> list[str]:
    """Of the rounds after the start."""
    return [record["outcome"] for record in run.records[1:]]


def worker_of(member: Member) -> int:
    """The warm process that trains for a client."""
    (pid,) = until(lambda: member.children, "a warm worker")
    return int(pid)


def assert_replayed(run: Run) -> None:
    """It ended well, and its journal makes the same model again, with what was lost and what came late."""
    run.ok()
    assert run.digest == run.replayed()


def test_the_task_of_a_killed_client_is_lost_and_the_round_ends_without_it(fleet: Deployment) -> None:
    """R10: SIGKILL in mid-training; its lease ends, the round closes, the next ones do without it."""
    fleet.ready(3)
    fleet.restart_coordinator(**SHORT_LEASES)
    fleet.await_online("client-1", "client-2", "client-3")
    victim = fleet.members["client-3"]
    with stopped(worker_of(victim)):
        run = fleet.submit(values_of("scaffold", rounds=3, deployment={"min_clients": 2}))
        until(lambda: held(fleet, "client-3"), "a task in hand")
        victim.kill()
    assert_replayed(run)
    assert outcomes(run)[0] == "partial"
    assert [record["received"] for record in run.records[1:]] == [2, 2, 2]
    assert run.records[1]["lost"] == 1


def test_a_client_that_comes_back_has_its_name_its_task_and_its_state(fleet: Deployment) -> None:
    """R11: SIGKILL in mid-training and a new process on the same folder; nothing is different."""
    fleet.ready(3)
    values = values_of("scaffold", rounds=6)
    before = {node.name: node.node_id for node in fleet.operator.nodes()}
    run = fleet.submit(values)
    run.await_round(2)
    victim = fleet.members["client-2"]
    with stopped(worker_of(victim)):
        until(lambda: held(fleet, "client-2") and not unsent(fleet, "client-2"), "a task in hand")
        victim.kill()
    fleet.start_client("client-2")
    run.assert_as_simulated(values)
    assert {node.name: node.node_id for node in fleet.operator.nodes()} == before


def test_the_newer_of_two_processes_with_one_key_goes_on(fleet: Deployment) -> None:
    """R12: the older one is told that it was superseded and ends with a code of its own."""
    fleet.ready(3)
    values = values_of("fedavg", rounds=3)
    older, home = fleet.members["client-3"], fleet.home("client-3")
    twin = fleet.home("twin")
    twin.mkdir()
    for name in ("bundle.toml", "policy.toml", "node.key", "node.json"):
        shutil.copy2(home / name, twin / name)
    # The run cannot end before the two have met.
    with stopped(worker_of(fleet.members["client-2"])):
        run = fleet.submit(values)
        newer = fleet.start_client("twin")
        fleet.extra.append(fleet.members.pop("twin"))
        assert older.ended() == 7, older.said
    assert "FS-CLI-003" in older.said
    run.assert_as_simulated(values)
    assert newer.alive
    assert newer.said.count("verdict=ACCEPTED") > 0
    newer.stop()
    shutil.rmtree(twin)


def test_a_partition_that_is_shorter_than_the_lease_loses_nothing(fleet: Deployment) -> None:
    """R13: a client cannot be heard for longer than two heartbeats, in both directions."""
    fleet.ready(3)
    values = values_of("scaffold", rounds=12)
    run = fleet.submit(values)
    run.await_round(2)
    fleet.proxy.up.held = fleet.proxy.down.held = True
    until(lambda: "client-1" not in fleet.online(), "client 1 offline")
    fleet.proxy.heal()
    run.assert_as_simulated(values)


def test_an_answer_that_comes_after_a_long_partition_is_kept_out(fleet: Deployment) -> None:
    """R13: longer than the lease: the round goes on without the client, and its answer is LATE."""
    fleet.ready(3)
    fleet.restart_coordinator(**SHORT_LEASES)
    fleet.await_online("client-1", "client-2", "client-3")
    late = fleet.members["client-1"]
    with stopped(worker_of(late)):
        run = fleet.submit(values_of("scaffold", rounds=2, deployment={"min_clients": 2}))
        until(lambda: held(fleet, "client-1"), "a task in hand")
        fleet.proxy.up.held = True
    until(lambda: unsent(fleet, "client-1"), "an answer that cannot be handed in")
    assert_replayed(run)
    fleet.proxy.heal()
    until(lambda: "verdict=LATE" in late.said, "a verdict")
    assert not unsent(fleet, "client-1")
    assert outcomes(run) == ["partial", "partial"] or outcomes(run) == ["partial", "ok"]
    assert run.records[1]["received"] == 2
    assert fleet.metric("fedsim_lease_expired_total") >= 1


def test_delays_cuts_and_repeated_connections_change_nothing(fleet: Deployment) -> None:
    """R14: everything from client 1 comes late, in pieces, twice, over connections that break."""
    fleet.ready(3)
    values = large(values_of("scaffold", rounds=3), 0.4)
    fleet.proxy.repeats = True
    fleet.proxy.up.longest_delay = fleet.proxy.down.longest_delay = 0.02
    fleet.proxy.cut()  # what is repeated is a new connection, from its first byte
    run = fleet.submit(values)
    for number in range(3):
        run.await_round(number)
        fleet.proxy.cut()
    run.assert_as_simulated(values)
    assert fleet.proxy.repeated > 0


def test_a_client_that_did_not_get_the_reply_is_given_the_same_task(fleet: Deployment) -> None:
    """R15: the coordinator leases a task, and the link breaks under the answer."""
    fleet.ready(3)
    # Who hears nothing says nothing either; it must count as online until it was asked.
    fleet.restart_coordinator(FEDSIM_SERVER__LEASES__HEARTBEAT_SECONDS="20")
    fleet.await_online("client-1", "client-2", "client-3")
    values = values_of("fedavg", rounds=1)
    fleet.proxy.down.held = True
    run = fleet.submit(values)
    until(lambda: fleet.proxy.down.waiting, "an answer on its way")
    until(lambda: run.get().bytes_down >= 0 and _offered(run, fleet), "the others' answers")
    assert not held(fleet, "client-1")
    fleet.proxy.cut()
    fleet.proxy.heal()
    run.assert_as_simulated(values)
    (dispatch,) = [line for line in run.journal if line["kind"] == "dispatch"]
    arrived = {line["payload"]["task"] for line in run.journal if line["kind"] == "arrived"}
    assert arrived == set(dispatch["payload"]["tasks"])


def _offered(run: Run, fleet: Deployment) -> bool:
    """Whether the two clients with a whole link have had their verdicts."""
    said = [fleet.members[name].said for name in ("client-2", "client-3")]
    return all(f"run={run.run_id} round=0 verdict=ACCEPTED" in text for text in said)


def test_a_slow_link_takes_its_time(fleet: Deployment) -> None:
    """R16: 64 kB/s in both directions, a model of several chunks: no deadline while bytes move."""
    fleet.ready(2)
    values = large(values_of("fedavg", clients=2, rounds=1), 0.2)
    fleet.proxy.up.rate = fleet.proxy.down.rate = 64_000
    fleet.submit(values).assert_as_simulated(values)


def test_a_straggler_is_left_behind_and_told_so(fleet: Deployment) -> None:
    """R17: the round closes at its deadline with its quorum; the client's next heartbeat cancels its task."""
    fleet.ready(3)
    slow = fleet.members["client-3"]
    with stopped(worker_of(slow)):
        run = fleet.submit(
            values_of(
                "fedavg", rounds=2, round={"sample": 3, "quorum": 2, "deadline": 10},
                deployment={"min_clients": 2},
            )
        )  # fmt: skip
        run.await_round(1)
        until(lambda: "cancelled by the coordinator" in slow.said, "told that its task is cancelled")
    assert_replayed(run)
    assert run.records[1]["outcome"] == "partial"
    assert run.records[1]["received"] == 2


def test_a_run_in_which_every_client_fails_fails(fleet: Deployment) -> None:
    """R18: no answer is no success; after `max_failed` rounds the run has failed, and the command says so."""
    fleet.ready(2)
    for name in ("client-1", "client-2"):
        fleet.allow(name, strategies=["fedavg", "scaffold"])
    try:
        run = fleet.submit(values_of("fedprox", clients=2, round={"sample": 2, "max_failed": 2}))
        found = run.end()
    finally:
        for name in ("client-1", "client-2"):
            fleet.allow(name, strategies=["*"])
    assert found.state == "failed", found
    assert outcomes(run) == ["failed", "failed"]
    assert "policy_refused" in str(run.clients)
    ended = fleet.command("watch", run.run_id)
    assert ended.code not in (0, None)


def test_a_run_with_too_few_clients_fails_at_its_deadline(fleet: Deployment) -> None:
    """R19: it says who is missing, and that it waits."""
    fleet.ready(2)
    values = values_of("fedavg", clients=9, deployment={"min_clients": 9, "wait": 1})
    run = fleet.submit(values)
    found = run.end()
    assert found.state == "failed"
    assert "not_enough_clients" in found.detail
    events = [event.data.get("detail", "") for event in fleet.operator.watch(run.run_id, seconds=30)]
    assert any("waiting for clients" in str(text) for text in events)


def test_a_killed_worker_is_a_failure_with_a_code_and_nothing_more(fleet: Deployment) -> None:
    """R26: SIGKILL of the training process; the client goes on with a new one."""
    fleet.ready(3)
    victim = fleet.members["client-3"]
    worker = worker_of(victim)
    with stopped(worker):
        run = fleet.submit(values_of("fedavg", rounds=4))
        until(lambda: held(fleet, "client-3"), "a task in hand")
        os.kill(worker, signal.SIGKILL)
    assert_replayed(run)
    assert victim.alive
    assert outcomes(run) == ["partial", "ok", "ok", "ok"]
    (lost,) = [line for line in run.journal if line["kind"] == "failed"]
    assert lost["payload"]["reason"].split(":")[0] in ("exception", "oom")


def test_a_worker_that_raises_tells_its_code_and_keeps_the_traceback(
    fleet: Deployment, tmp_path: Path
) -> None:
    """R26: the client's own data function fails; nothing of its words leaves the machine."""
    fleet.ready(3)
    (tmp_path / "broken_data.py").write_text(
        'def examples(*args, **more):\n    raise RuntimeError("patient 4711 has no label")\n'
    )
    fleet.members["client-3"].stop()
    broken = fleet.start_client(
        "client-3", "--data-function", "broken_data:examples", PYTHONPATH=str(tmp_path)
    )
    fleet.await_online("client-3")
    run = fleet.submit(values_of("fedavg", rounds=2))
    assert_replayed(run)
    assert broken.alive
    assert outcomes(run) == ["partial", "partial"]
    reasons = [line["payload"]["reason"] for line in run.journal if line["kind"] == "failed"]
    assert len(reasons) == 2
    assert not any("4711" in reason for reason in reasons)
    assert "4711" in (fleet.home("client-3") / "worker.log").read_text()
    assert "4711" not in fleet.coordinator.said

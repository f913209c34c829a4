"""Greeting, enrolment, login, repeated calls and transfers, against a coordinator on a loopback port."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from grpc import StatusCode

from fedsim import wire
from fedsim.client import connection as module
from fedsim.client.problems import CoordinatorProblem, SupersededError
from fedsim.client.statuses import Refused
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from tests.fake_fleet import FakeFleet
from tests.faults import Abort, LoseReply
from tests.small_clients import connected, on_loopback


def test_the_protocol_version_is_the_one_of_the_wire() -> None:
    assert (module.MAJOR, module.MINOR) == (wire.MAJOR, wire.MINOR)


def test_the_first_start_enrols_and_the_next_one_only_logs_in(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        fleet.token = "once"
        async with connected(fleet, tmp_path / "c", token="once") as link:
            await link.start()
            assert link.online
            assert link.server_id == fleet.key.public
        assert fleet.calls.count("Enrol") == 1
        fleet.token = "another"
        async with connected(fleet, tmp_path / "c") as link:
            await link.start()
        assert fleet.calls.count("Enrol") == 1
        assert fleet.calls[-2:] == ["Hello", "Login"]

    on_loopback(test)


def test_a_wrong_token_is_final_and_says_why(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        fleet.token = "once"
        async with connected(fleet, tmp_path / "c", token="guess") as link:
            with pytest.raises(CoordinatorProblem) as raised:
                await link.start()
        assert raised.value.code == "FS-CLI-001"
        assert raised.value.exit_code == 3
        assert "the token is not valid" in str(raised.value)
        assert "guess" not in str(raised.value)

    on_loopback(test)


def test_a_key_that_is_known_already_logs_in_without_a_token(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        key = Key.new()
        fleet.nodes[key.public] = pb.APPROVED
        fleet.token = "once"
        fleet.faults["Enrol"].append(Abort(StatusCode.PERMISSION_DENIED, "no token"))
        async with connected(fleet, tmp_path / "c", key=key) as link:
            await link.start()
            assert link.online

    on_loopback(test)


def test_a_client_waits_for_approval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_APPROVAL_SECONDS", (0.01, 0.01))

    async def test(fleet: FakeFleet) -> None:
        async with connected(fleet, tmp_path / "c") as link:
            start = asyncio.create_task(link.start())
            await fleet.until(lambda: fleet.calls.count("Enrol") >= 3)
            assert not start.done()
            assert "Login" not in fleet.calls
            fleet.nodes[link.key.public] = pb.APPROVED
            await start
            assert link.online

    on_loopback(test, approve=False)


def test_a_revoked_key_is_told_so_at_once(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        async with connected(fleet, tmp_path / "c") as link:
            await link.start()
            fleet.nodes[link.key.public] = pb.REVOKED
            fleet.forget_tickets()
            with pytest.raises(CoordinatorProblem, match="does not let this client in"):
                await link.lease(pb.LeaseRequest(wait_seconds=0))

    on_loopback(test)


@pytest.mark.parametrize("code", [StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.INTERNAL])
def test_a_call_is_repeated_until_it_is_answered(tmp_path: Path, code: StatusCode) -> None:
    async def test(fleet: FakeFleet) -> None:
        async with connected(fleet, tmp_path / "c") as link:
            await link.start()
            fleet.faults["Lease"].extend([Abort(code)] * 3)
            task = fleet.offer()
            reply = await link.lease(pb.LeaseRequest(wait_seconds=0))
            assert pb.Task.FromString(reply.offer.body) == task
            assert fleet.calls.count("Lease") == 4
            assert fleet.calls.count("Login") == 1  # the ticket was still good

    on_loopback(test)


def test_a_coordinator_that_restarts_is_found_again_and_must_introduce_itself(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        async with connected(fleet, tmp_path / "c") as link:
            await link.start()
            await fleet.down()
            lease = asyncio.create_task(link.lease(pb.LeaseRequest(wait_seconds=0)))
            while link.online:
                await asyncio.sleep(0.005)
            assert not lease.done()
            fleet.offer()
            await fleet.up()
            assert (await lease).HasField("offer")
            assert link.online
            assert fleet.calls.count("Hello") >= 2
            assert fleet.calls.count("Login") == 1

    on_loopback(test)


def test_an_expired_ticket_is_replaced_by_a_new_login(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        async with connected(fleet, tmp_path / "c") as link:
            await link.start()
            fleet.forget_tickets()
            await link.heartbeat(pb.HeartbeatRequest())
            assert fleet.calls.count("Login") == 2

    on_loopback(test)


def test_a_call_that_is_never_accepted_is_given_up_after_new_logins(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        async with connected(fleet, tmp_path / "c") as link:
            await link.start()
            fleet.faults["Submit"].extend([Abort(StatusCode.UNAUTHENTICATED, "no")] * 9)
            with pytest.raises(Refused) as raised:
                await link.submit(pb.SubmitRequest(), 0)
            assert raised.value.code == StatusCode.UNAUTHENTICATED
            assert fleet.calls.count("Submit") == 3

    on_loopback(test)


def test_the_delay_that_a_busy_coordinator_asks_for_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    async def test(fleet: FakeFleet) -> None:
        async with connected(fleet, tmp_path / "c") as link:
            await link.start()
            fleet.poll_seconds = 0
            hellos = fleet.calls.count("Hello")
            fleet.faults["Lease"].append(Abort(StatusCode.RESOURCE_EXHAUSTED, "full", retry_after=17.0))
            monkeypatch.setattr(asyncio, "sleep", noted)
            await link.lease(pb.LeaseRequest(wait_seconds=0))
            monkeypatch.undo()
            assert fleet.calls.count("Hello") == hellos  # the link was never in doubt

    on_loopback(test)
    assert 17.0 <= max(waits) < 18.7


def test_retries_end_where_they_are_limited(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        async with connected(fleet, tmp_path / "c", max_retries=2) as link:
            await fleet.down()
            with pytest.raises(CoordinatorProblem) as raised:
                await link.start()
            assert raised.value.code == "FS-CLI-006"
            assert "3 tries failed" in str(raised.value)

    on_loopback(test)


def test_the_older_of_two_processes_with_one_key_is_superseded(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        key = Key.new()
        async with (
            connected(fleet, tmp_path / "a", key=key) as older,
            connected(fleet, tmp_path / "b", key=key) as newer,
        ):
            await older.start()
            await newer.start()
            await newer.heartbeat(pb.HeartbeatRequest())
            with pytest.raises(SupersededError) as raised:
                await older.heartbeat(pb.HeartbeatRequest())
            assert raised.value.exit_code == 7
            await newer.heartbeat(pb.HeartbeatRequest())

    on_loopback(test)


def test_another_major_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        fleet.major = 2
        async with connected(fleet, tmp_path / "c") as link:
            with pytest.raises(CoordinatorProblem) as raised:
                await link.start()
        assert raised.value.code == "FS-CLI-002"
        assert "speaks 2.0, the client 1.0" in str(raised.value)

    on_loopback(test)


def test_another_coordinator_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        async with connected(fleet, tmp_path / "a", server_id=Key.new().public) as link:
            with pytest.raises(CoordinatorProblem) as raised:
                await link.start()
        assert raised.value.code == "FS-CLI-004"
        async with connected(fleet, tmp_path / "b") as link:
            await link.start()
            fleet.key = Key.new()
            fleet.faults["Lease"].append(Abort())  # after a break everybody introduces himself
            with pytest.raises(CoordinatorProblem) as raised:
                await link.lease(pb.LeaseRequest(wait_seconds=0))
        assert raised.value.code == "FS-CLI-004"
        async with connected(fleet, tmp_path / "b") as link:  # remembered over a restart
            with pytest.raises(CoordinatorProblem):
                await link.start()

    on_loopback(test)


def test_a_coordinator_may_be_restored_but_not_go_back(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        for incarnation in (1, 3):
            fleet.incarnation = incarnation
            async with connected(fleet, tmp_path / "c") as link:
                await link.start()
        fleet.incarnation = 2
        async with connected(fleet, tmp_path / "c") as link:
            with pytest.raises(CoordinatorProblem) as raised:
                await link.start()
        assert raised.value.code == "FS-CLI-005"

    on_loopback(test)


def test_a_clock_that_is_ten_minutes_off_is_only_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(fleet: FakeFleet) -> None:
        true = fleet.server_time
        fleet.server_time = lambda: true() - 600
        async with connected(fleet, tmp_path / "c") as link:
            await link.start()
            assert link.online

    on_loopback(test)
    assert "clock_seconds=-600" in caplog.text


def test_a_lost_lease_reply_brings_the_same_task_again(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer()
        fleet.offer()
        fleet.faults["Lease"].append(LoseReply())
        async with connected(fleet, tmp_path / "c") as link:
            reply = await link.lease(pb.LeaseRequest(wait_seconds=0))
        assert pb.Task.FromString(reply.offer.body) == task

    on_loopback(test)

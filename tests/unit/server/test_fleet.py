"""The service for nodes over real gRPC on loopback: who is let in, and who holds which task."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from fedsim.pb import federation_pb2 as pb
from fedsim.wire import MAJOR, MINOR
from tests.fake_runs import update_bundle
from tests.fleet_server import Node, Service, refused, retry_after, run

# Being let in.


def test_another_major_protocol_is_refused_with_both_versions(tmp_path: Path) -> None:
    async def scenario(service: Service) -> grpc.aio.AioRpcError:
        return await refused(service.node().stub.Hello(pb.HelloRequest(major=MAJOR + 1, minor=4)))

    error = run(tmp_path, scenario)
    assert error.code() is StatusCode.FAILED_PRECONDITION
    assert f"{MAJOR}.{MINOR}" in error.details()
    assert f"{MAJOR + 1}.4" in error.details()


@pytest.mark.parametrize(("minor", "spoken"), [(0, 0), (MINOR, MINOR), (MINOR + 7, MINOR)])
def test_the_smaller_minor_protocol_is_spoken(tmp_path: Path, minor: int, spoken: int) -> None:
    async def scenario(service: Service) -> tuple[pb.HelloReply, bytes]:
        reply = await service.node().stub.Hello(pb.HelloRequest(major=MAJOR, minor=minor))
        return reply, service.key.public

    reply, server_id = run(tmp_path, scenario, inline_bytes=1000)
    assert (reply.major, reply.minor) == (MAJOR, spoken)
    assert reply.server_id == server_id
    assert reply.incarnation == 3
    assert reply.limits.inline_bytes == 1000
    assert len(reply.nonce) == 32


def test_nothing_but_being_let_in_works_without_a_ticket(tmp_path: Path) -> None:
    async def scenario(service: Service) -> list[StatusCode]:
        stub = service.node().stub
        unary = {
            "Heartbeat": pb.HeartbeatRequest(),
            "Lease": pb.LeaseRequest(),
            "UploadStatus": pb.UploadStatusRequest(),
            "Submit": pb.SubmitRequest(),
            "Fail": pb.FailRequest(),
            "Bye": pb.ByeRequest(),
        }
        codes = []
        for metadata in ((), (("fedsim-ticket-bin", b"guessed"),)):
            for name, request in unary.items():
                codes.append((await refused(getattr(stub, name)(request, metadata=metadata))).code())
            codes.append((await refused(stub.Fetch(pb.FetchRequest(), metadata=metadata).read())).code())
            codes.append((await refused(stub.Upload(iter([]), metadata=metadata))).code())
        return codes

    assert set(run(tmp_path, scenario)) == {StatusCode.UNAUTHENTICATED}


@pytest.mark.parametrize("role", ["viewer", "operator", "admin"])
def test_an_operator_may_renew_and_leave_but_has_no_work_here(tmp_path: Path, role: str) -> None:
    async def scenario(service: Service) -> tuple[Any, StatusCode, int]:
        operator = service.node(role=role)
        service.runs.put(operator.node_id)
        service.auth.renewal = (b"new", 900.0)
        beat = await operator.call("Heartbeat", pb.HeartbeatRequest())
        error = await refused(operator.call("Lease", pb.LeaseRequest()))
        await operator.call("Bye", pb.ByeRequest())
        return beat, error.code(), len(service.fleet.presence)

    beat, code, online = run(tmp_path, scenario)
    assert (beat.ticket, beat.ticket_seconds) == (b"new", 900.0)
    assert code is StatusCode.PERMISSION_DENIED
    assert online == 0


# Work.


def test_a_lost_reply_to_lease_costs_nothing_the_same_task_comes_again(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[list[Any], int, bytes]:
        node = service.node()
        task = service.runs.put(node.node_id)
        service.runs.put(node.node_id)
        replies = [await node.call("Lease", pb.LeaseRequest()) for _ in range(2)]
        return replies, len(service.fleet.leases), task.task_id

    (first, second), held, task_id = run(tmp_path, scenario)
    assert first == second
    assert pb.Task.FromString(first.offer.body).task_id == task_id
    assert first.offer.message == b"the model"
    assert held == 1


def test_a_waiting_node_gets_its_task_as_soon_as_there_is_one(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[bytes, bytes]:
        node, other = service.node(), service.node()
        waiting = [
            asyncio.create_task(n.call("Lease", pb.LeaseRequest(wait_seconds=20))) for n in (node, other)
        ]
        while len(service.fleet.polls) < 2:
            await asyncio.sleep(0.01)
        task = await asyncio.to_thread(service.runs.put, node.node_id)
        reply = await waiting[0]
        waiting[1].cancel()
        return pb.Task.FromString(reply.offer.body).task_id, task.task_id

    found, expected = run(tmp_path, scenario)
    assert found == expected


def test_without_room_for_parked_calls_a_node_is_sent_away_and_heartbeats_get_through(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[Any, Any]:
        first, second = service.node(), service.node()
        waiting = asyncio.create_task(first.call("Lease", pb.LeaseRequest(wait_seconds=20)))
        while not len(service.fleet.polls):
            await asyncio.sleep(0.01)
        away = await second.call("Lease", pb.LeaseRequest(wait_seconds=20))
        beat = await second.call("Heartbeat", pb.HeartbeatRequest())
        waiting.cancel()
        return away, beat

    away, beat = run(tmp_path, scenario, parked_polls=1)
    assert away.reason == "busy"
    assert away.delay_seconds > 0
    assert not away.HasField("offer")
    assert beat == pb.HeartbeatReply()


def test_calls_beyond_the_cap_are_refused_with_a_delay_and_parked_ones_do_not_count(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[Any, Any]:
        waiters = [service.node() for _ in range(9)]
        waiting = [asyncio.create_task(n.call("Lease", pb.LeaseRequest(wait_seconds=20))) for n in waiters]
        while len(service.fleet.polls) < 9:
            await asyncio.sleep(0.01)
        through = await waiters[0].call("Heartbeat", pb.HeartbeatRequest())
        service.fleet.running += 8  # as many calls that do something
        error = await refused(waiters[0].call("Heartbeat", pb.HeartbeatRequest()))
        for call in waiting:
            call.cancel()
        return through, error

    through, error = run(tmp_path, scenario, concurrent_rpcs=8)
    assert through == pb.HeartbeatReply()
    assert error.code() is StatusCode.RESOURCE_EXHAUSTED
    assert retry_after(error) > 0


def test_a_drain_ends_waiting_and_gives_no_work_but_takes_answers(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[Any, Any, Any, Any]:
        node, idle = service.node(), service.node()
        task = service.runs.put(node.node_id)
        await node.call("Lease", pb.LeaseRequest())
        waiting = asyncio.create_task(idle.call("Lease", pb.LeaseRequest(wait_seconds=20)))
        while not len(service.fleet.polls):
            await asyncio.sleep(0.01)
        service.fleet.drain()
        parked = await waiting
        asked = await node.call("Lease", pb.LeaseRequest(wait_seconds=20))
        beat = await node.call("Heartbeat", pb.HeartbeatRequest())
        return parked, asked, beat, await node.submit(task, update_bundle())

    parked, asked, beat, reply = run(tmp_path, scenario)
    for lease in (parked, asked):
        assert (lease.reason, lease.HasField("offer")) == ("draining", False)
        assert lease.delay_seconds > 0
    assert beat.draining
    assert reply.verdict == pb.ACCEPTED


def test_a_heartbeat_says_which_leases_live_and_which_tasks_do_not_count_any_more(tmp_path: Path) -> None:
    async def scenario(service: Service) -> dict[bytes, pb.HeldLease]:
        node, other = service.node(), service.node()
        live, over = (service.runs.put(node.node_id) for _ in range(2))
        foreign = service.runs.put(other.node_id)
        await node.call("Lease", pb.LeaseRequest())
        over.status = "closed"
        names = {
            b"live": live.task_id,
            b"over": over.task_id,
            b"foreign": foreign.task_id,
            b"none": b"x" * 16,
        }
        reply = await node.call(
            "Heartbeat", pb.HeartbeatRequest(held=[pb.Progress(task_id=i) for i in names.values()])
        )
        return dict(zip(names, reply.held, strict=True))

    held = run(tmp_path, scenario)
    assert {name: lease.cancelled for name, lease in held.items()} == {
        b"live": False,
        b"over": True,
        b"foreign": True,
        b"none": True,
    }
    assert held[b"live"].seconds > 80
    assert held[b"foreign"].seconds == 0


def test_after_a_restart_a_heartbeat_brings_back_the_lease_of_an_open_task(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[Any, str | None, str]:
        node = service.node()
        task = service.runs.put(node.node_id)  # it was leased by the process before this one
        held = pb.Progress(task_id=task.task_id, step=3, steps=9)
        reply = await node.call("Heartbeat", pb.HeartbeatRequest(held=[held]))
        return reply.held[0], service.fleet.leases.holder(task.task_id), node.node_id

    held, holder, node_id = run(tmp_path, scenario)
    assert not held.cancelled
    assert held.seconds > 80
    assert holder == node_id


def test_a_lease_that_ends_is_told_to_the_run_once(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[list[bytes], bytes]:
        node = service.node()
        task = service.runs.put(node.node_id)
        await node.call("Lease", pb.LeaseRequest())
        service.fleet.leases._held[task.task_id].ends -= 1_000
        service.fleet.look_after(60.0)
        service.fleet.look_after(60.0)
        return service.runs.expirations, task.task_id

    expirations, task_id = run(tmp_path, scenario)
    assert expirations == [task_id]


def test_goodbye_returns_the_leases_and_the_ticket_at_once(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[list[bytes], bytes, StatusCode, int]:
        node = service.node()
        task = service.runs.put(node.node_id)
        await node.call("Lease", pb.LeaseRequest())
        await node.call("Bye", pb.ByeRequest(reason="done"))
        error = await refused(node.call("Heartbeat", pb.HeartbeatRequest()))
        return service.runs.expirations, task.task_id, error.code(), len(service.fleet.presence)

    expirations, task_id, code, online = run(tmp_path, scenario)
    assert expirations == [task_id]
    assert code is StatusCode.UNAUTHENTICATED
    assert online == 0


def test_whoever_is_superseded_while_it_waits_gets_no_task(tmp_path: Path) -> None:
    async def scenario(service: Service) -> StatusCode:
        node = service.node()
        waiting = asyncio.create_task(node.call("Lease", pb.LeaseRequest(wait_seconds=20)))
        while not len(service.fleet.polls):
            await asyncio.sleep(0.01)
        service.auth.peers.clear()
        service.runs.put(node.node_id)
        code = (await refused(waiting)).code()
        assert len(service.fleet.leases) == 0
        return code

    assert run(tmp_path, scenario) is StatusCode.UNAUTHENTICATED


def test_a_failure_is_reported_to_the_run_and_ends_the_lease(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[dict[bytes, Any], bytes, int]:
        node = service.node()
        task = service.runs.put(node.node_id)
        await node.call("Lease", pb.LeaseRequest())
        late = pb.FailRequest(
            task_id=task.task_id, attempt=task.attempt + 1, code="oom", text="other attempt"
        )
        await node.call("Fail", late)
        assert service.runs.failures == {}
        await node.call("Fail", pb.FailRequest(task_id=task.task_id, code="oom", text="x" * 10_000))
        return service.runs.failures, task.task_id, len(service.fleet.leases)

    failures, task_id, held = run(tmp_path, scenario)
    ((code, text),) = failures.values()
    assert (list(failures), code) == ([task_id], "oom")
    assert text.startswith("x" * 1_000)
    assert len(text) <= 2_000
    assert held == 0


def test_an_unexpected_error_has_a_number_and_no_details_and_the_service_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(service: Service) -> grpc.aio.AioRpcError:
        node = service.node()
        task = service.runs.put(node.node_id)
        service.runs.fails_with = KeyError("password=hunter2")
        error = await refused(node.submit(task, update_bundle()))
        service.runs.fails_with = None
        assert (await node.submit(task, update_bundle())).verdict == pb.ACCEPTED
        return error

    error = run(tmp_path, scenario)
    assert error.code() is StatusCode.INTERNAL
    assert "hunter2" not in error.details()
    incident = error.details().rpartition(" ")[2]
    assert len(incident) == 8
    (record,) = [r for r in caplog.records if incident in r.getMessage()]
    assert record.exc_info is not None


def test_the_runs_hear_who_is_there(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[frozenset[str], frozenset[str], Node, Node]:
        stays, leaves = service.node(), service.node()
        for node in (stays, leaves):
            await node.call("Heartbeat", pb.HeartbeatRequest())
        while len(service.runs.online) < 2:
            await asyncio.sleep(0.01)
        both = service.runs.online
        await leaves.call("Bye", pb.ByeRequest())
        while len(service.runs.online) > 1:
            await asyncio.sleep(0.01)
        return both, service.runs.online, stays, leaves

    both, one, stays, leaves = run(tmp_path, scenario)
    assert both == {stays.node_id, leaves.node_id}
    assert one == {stays.node_id}

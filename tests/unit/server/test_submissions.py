"""Submissions over real gRPC on loopback: what an answer must be, and that it counts once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc import StatusCode

from fedsim.bundle import encode
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server.ledger_errors import full, unavailable
from fedsim.server.submissions import SMALL_BYTES
from tests.fake_runs import UPDATE, sent, update_bundle
from tests.fleet_server import Node, Service, refused, retry_after, run


def test_an_answer_is_accepted_once_and_its_repetition_is_told_the_first_verdict(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[Any, Any, Any, int]:
        node = service.node()
        task = service.runs.put(node.node_id)
        await node.call("Lease", pb.LeaseRequest())
        request = node.signed(node.body(task, update_bundle()), update_bundle())
        first = await node.call("Submit", request)
        again = await node.call("Submit", request)
        return first, again, service.runs.places[task.task_id], len(service.fleet.leases)

    first, again, place, held = run(tmp_path, scenario)
    assert first == pb.SubmitReply(verdict=pb.ACCEPTED)
    assert (again.verdict, again.first) == (pb.DUPLICATE, pb.ACCEPTED)
    assert place == (*sent(update_bundle()).object, update_bundle())
    assert held == 0


def test_an_answer_that_is_validated_in_a_thread_arrives_as_well(tmp_path: Path) -> None:
    size = SMALL_BYTES // 4 + 1

    async def scenario(service: Service) -> tuple[Any, Any]:
        node = service.node()
        good, bad = (service.runs.put(node.node_id, size=size) for _ in range(2))
        accepted = await node.submit(good, update_bundle(size))
        return accepted, await node.submit(bad, update_bundle(size, float("nan")))

    accepted, rejected = run(tmp_path, scenario)
    assert accepted.verdict == pb.ACCEPTED
    assert (rejected.verdict, rejected.reason) == (pb.REJECTED, "non_finite")


@pytest.mark.parametrize(
    ("content", "reason", "text"),
    [
        (update_bundle(value=float("nan")), "non_finite", UPDATE),
        (update_bundle(value=float("inf")), "non_finite", UPDATE),
        (update_bundle(5), "schema", UPDATE),
        (encode({"vectors/other": torch.zeros(4)}), "schema", UPDATE),
        (encode({UPDATE: torch.zeros(4, dtype=torch.float64)}), "schema", UPDATE),
        (b"PK\x03\x04 a zip of pickles", "schema", ""),
        (b"", "schema", ""),
    ],
)
def test_a_bad_update_is_rejected_with_a_reason_and_uses_the_task_up(
    tmp_path: Path, content: bytes, reason: str, text: str
) -> None:
    async def scenario(service: Service) -> tuple[Any, Any]:
        node = service.node()
        task = service.runs.put(node.node_id)
        return await node.submit(task, content), await node.submit(task, update_bundle())

    rejected, again = run(tmp_path, scenario)
    assert (rejected.verdict, rejected.reason) == (pb.REJECTED, reason)
    assert text in rejected.text
    assert (again.verdict, again.first) == (pb.DUPLICATE, pb.REJECTED)


@pytest.mark.parametrize("examples", [0, -3, 2**62])
def test_an_absurd_weight_is_rejected(tmp_path: Path, examples: int) -> None:
    async def scenario(service: Service) -> Any:
        node = service.node()
        task = service.runs.put(node.node_id)
        body = node.body(task, update_bundle())
        body.examples = examples
        return await node.call("Submit", node.signed(body, update_bundle()))

    reply = run(tmp_path, scenario)
    assert (reply.verdict, reply.reason) == (pb.REJECTED, "weight")


def test_a_too_long_update_is_clipped_and_stored_under_its_new_digest(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[Any, Any]:
        service.runs.max_norm, service.runs.over_norm = 0.5, "clip"
        node = service.node()
        task = service.runs.put(node.node_id)
        reply = await node.submit(task, update_bundle(value=1.0))  # its length is 2
        return reply, service.runs.places[task.task_id]

    reply, place = run(tmp_path, scenario)
    assert reply.verdict == pb.ACCEPTED
    assert place.content == update_bundle(value=0.25)
    assert (place.digest, place.size) == sent(update_bundle(value=0.25)).object


def test_bytes_other_than_the_signed_ones_are_rejected(tmp_path: Path) -> None:
    async def scenario(service: Service) -> Any:
        node = service.node()
        task = service.runs.put(node.node_id)
        return await node.call(
            "Submit", node.signed(node.body(task, update_bundle()), update_bundle(value=9))
        )

    reply = run(tmp_path, scenario)
    assert (reply.verdict, reply.reason) == (pb.REJECTED, "digest")


def changed_body(node: Node, task: Any) -> pb.SubmitRequest:
    request = node.signed(node.body(task, update_bundle()), update_bundle())
    body = pb.SubmitBody.FromString(request.body)
    body.examples += 1
    request.body = body.SerializeToString()
    return request


def other_signature(node: Node, task: Any) -> pb.SubmitRequest:
    request = node.signed(node.body(task, update_bundle()), update_bundle())
    request.signature = Key.new().sign(b"fedsim.v1 submit", request.body)
    return request


def other_context(node: Node, task: Any) -> pb.SubmitRequest:
    request = node.signed(node.body(task, update_bundle()), update_bundle())
    request.signature = node.key.sign(b"fedsim.v1 login", request.body)
    return request


def other_server(node: Node, task: Any) -> pb.SubmitRequest:
    body = node.body(task, update_bundle())
    body.server_id = bytes(32)
    return node.signed(body, update_bundle())


def no_signature(node: Node, task: Any) -> pb.SubmitRequest:
    request = node.signed(node.body(task, update_bundle()), update_bundle())
    request.signature = b""
    return request


@pytest.mark.parametrize("forge", [changed_body, other_signature, other_context, other_server, no_signature])
def test_what_this_node_did_not_sign_for_this_server_does_not_count(tmp_path: Path, forge: Any) -> None:
    async def scenario(service: Service) -> tuple[StatusCode, dict[bytes, Any], Any]:
        node = service.node()
        task = service.runs.put(node.node_id)
        error = await refused(node.call("Submit", forge(node, task)))
        before = dict(service.runs.verdicts)
        return error.code(), before, await node.submit(task, update_bundle())

    code, verdicts, reply = run(tmp_path, scenario)
    assert code is StatusCode.UNAUTHENTICATED
    assert verdicts == {}
    assert reply.verdict == pb.ACCEPTED


def test_the_task_of_another_node_and_a_guessed_one_are_refused_in_the_same_words(tmp_path: Path) -> None:
    async def scenario(service: Service) -> list[grpc.aio.AioRpcError]:
        thief, owner = service.node(), service.node()
        task = service.runs.put(owner.node_id)
        await owner.call("Lease", pb.LeaseRequest())
        guessed = thief.body(task, update_bundle())
        guessed.task_id = os.urandom(16)
        start = pb.UploadStart(upload_id=bytes(16), task_id=task.task_id)
        start.object.digest, start.object.size = bytes(32), 10
        errors = [
            await refused(thief.submit(task, update_bundle())),
            await refused(thief.call("Submit", thief.signed(guessed, update_bundle()))),
            await refused(thief.call("Fail", pb.FailRequest(task_id=task.task_id, code="oom"))),
            await refused(thief.call("Upload", iter([pb.UploadFrame(start=start)]))),
        ]
        assert service.runs.verdicts == service.runs.failures == {}
        assert service.fleet.leases.holder(task.task_id) == owner.node_id
        return errors

    errors = run(tmp_path, scenario)
    assert {error.code() for error in errors} == {StatusCode.PERMISSION_DENIED}
    assert len({error.details() for error in errors}) == 1


@pytest.mark.parametrize("field", ["task_id", "key", "upload_id"])
def test_a_field_of_the_wrong_size_is_named(tmp_path: Path, field: str) -> None:
    async def scenario(service: Service) -> grpc.aio.AioRpcError:
        node = service.node()
        body = node.body(service.runs.put(node.node_id), update_bundle())
        setattr(body, field, b"short")
        return await refused(node.call("Submit", node.signed(body, update_bundle())))

    error = run(tmp_path, scenario)
    assert error.code() is StatusCode.INVALID_ARGUMENT
    assert field in error.details()


def test_a_full_disk_asks_for_patience_and_a_lost_database_for_another_try(tmp_path: Path) -> None:
    secret = "/var/lib/secret.db"

    async def scenario(service: Service) -> list[grpc.aio.AioRpcError]:
        node = service.node()
        task = service.runs.put(node.node_id)
        errors = []
        for problem in (full("no space", secret), unavailable("it restarts", secret)):
            service.runs.fails_with = problem
            errors.append(await refused(node.submit(task, update_bundle())))
        service.runs.fails_with = None
        assert (await node.submit(task, update_bundle())).verdict == pb.ACCEPTED
        return errors

    full_disk, lost = run(tmp_path, scenario)
    assert full_disk.code() is StatusCode.RESOURCE_EXHAUSTED
    assert lost.code() is StatusCode.UNAVAILABLE
    for error in (full_disk, lost):
        assert retry_after(error) > 0
        assert secret not in error.details()

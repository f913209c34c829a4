"""Streams and connections that are meant to harm: uploads that lie, downloads of others, floods, silence."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from fedsim.pb import federation_pb2 as pb
from fedsim.transport import METADATA_BYTES
from tests.hostile import (
    CHUNK,
    RawNode,
    Run,
    Site,
    begin,
    child,
    denied,
    few,
    frames,
    honest_update,
    object_of,
    piece,
    site,
    until,
    values,
)
from tests.hostile_bundles import DELTA, framed
from tests.raw_http2 import CALL, CONTINUATION, HEADERS, PING, RawConnection, frame, header

LARGE = 6_000  # width of a model whose update takes four chunks
MEGABYTE = 1 << 20

Frames = Callable[[pb.Task, bytes, bytes], Iterable[pb.UploadFrame]]
"""(task, honest update, upload id) -> what is sent."""


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site")) as found:
        yield found


def trio(coordinator: Site, group: str, **more: Any) -> tuple[Run, list[RawNode]]:
    """A run of one round with three nodes of its own."""
    nodes = coordinator.fleet(f"v-{group}", f"a-{group}", f"b-{group}", group=group)
    return coordinator.submit(values(hidden=LARGE, **more), group=group), nodes


def finish(run: Run, nodes: Iterable[RawNode], received: int) -> None:
    """Let the honest ones answer; the run ends as if nothing had happened."""
    for node in nodes:
        node.answer()
    run.end()
    assert run.lines("metrics.jsonl")[-1]["received"] == received


def damaged(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    return [begin(task, content, upload_id=name), piece(0, content[:CHUNK], crc32=1)]


def other_digest(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    start = begin(task, content, upload_id=name, object=pb.Object(digest=bytes(32), size=len(content)))
    return [start, *list(frames(task, content, upload_id=name))[1:]]


def out_of_order(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    return [begin(task, content, upload_id=name), piece(CHUNK, content[CHUNK : 2 * CHUNK])]


def overlapping(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    first, second = piece(0, content[:CHUNK]), piece(CHUNK // 2, content[CHUNK // 2 : 2 * CHUNK])
    return [begin(task, content, upload_id=name), first, second]


def behind_the_end(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    start = begin(task, content, upload_id=name, object=pb.Object(digest=bytes(32), size=10))
    return [start, piece(0, content[:CHUNK])]


def huge_offset(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    return [begin(task, content, upload_id=name), piece(2**64 - 1, b"x")]


def nothing_often(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    yield begin(task, content, upload_id=name)
    for _ in range(100_000):
        yield pb.UploadFrame(chunk=pb.Chunk())


def same_often(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    yield begin(task, content, upload_id=name)
    for _ in range(1_000):
        yield piece(0, content[:CHUNK])


def no_beginning(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    return [piece(0, content[:CHUNK])]


def two_beginnings(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    return [begin(task, content, upload_id=name)] * 2


def too_large(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    return [begin(task, content, upload_id=name, object=pb.Object(digest=bytes(32), size=2**63))]


def short_name(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    return [begin(task, content, upload_id=b"../../../x")]


def big_chunk(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    return [begin(task, content, upload_id=name), piece(0, bytes(3 * MEGABYTE + 1))]


def beyond_grpc(task: pb.Task, content: bytes, name: bytes) -> Iterable[pb.UploadFrame]:
    return [begin(task, content, upload_id=name), piece(0, bytes(5 * MEGABYTE))]


WRONG = StatusCode.INVALID_ARGUMENT
STREAMS: dict[Frames, StatusCode] = {
    damaged: StatusCode.DATA_LOSS,
    other_digest: StatusCode.DATA_LOSS,
    out_of_order: StatusCode.FAILED_PRECONDITION,
    overlapping: WRONG,
    behind_the_end: WRONG,
    huge_offset: WRONG,
    nothing_often: WRONG,
    same_often: WRONG,
    no_beginning: WRONG,
    two_beginnings: WRONG,
    too_large: WRONG,
    short_name: WRONG,
    big_chunk: WRONG,
    beyond_grpc: StatusCode.RESOURCE_EXHAUSTED,
}


FEW = (damaged, other_digest, out_of_order, overlapping, nothing_often)


@pytest.mark.parametrize("which", few(["few", "many"], "few"))
def test_a_stream_that_lies_is_refused_and_the_run_is_unharmed(coordinator: Site, which: str) -> None:
    """S6: each with its status, on a task of its own; what honest nodes upload at the same time arrives."""
    streams = {name: code for name, code in STREAMS.items() if (name in FEW) == (which == "few")}
    rounds = len(streams)
    villain, *honest = coordinator.fleet(f"v-{which}", f"a-{which}", f"b-{which}", group=which)
    run = coordinator.submit(values(rounds, hidden=LARGE), group=which)
    got = {}
    for stream in streams:
        task, _ = villain.lease()
        content = honest_update(task, "v")
        refused = denied(villain.upload, stream(task, content, os.urandom(16)))
        got[stream.__name__] = refused.code
        assert refused.text.isprintable()
        if stream is out_of_order:
            assert refused.metadata["fedsim-offset"] == "0"
        villain.call("Fail", pb.FailRequest(task_id=task.task_id, attempt=task.attempt, code="exception"))
        for node in honest:
            node.answer()
    run.end()
    assert got == {stream.__name__: code for stream, code in streams.items()}
    assert [line["received"] for line in run.lines("metrics.jsonl")[1:]] == [2] * rounds
    others = coordinator.fleet(f"a-{which}2", f"b-{which}2", group=f"{which}2")
    for node, other in zip(honest, others, strict=True):
        other.name = node.name
    alone = coordinator.submit(values(rounds, clients=2, hidden=LARGE), group=f"{which}2")
    for _ in range(rounds):
        for node in others:
            node.answer()
    alone.end()
    assert run.digest == alone.digest


def test_broken_chunks_use_up_the_uploads_of_a_task(coordinator: Site) -> None:
    """S6: three strikes, and a new upload id does not wash them off; nothing of it stays on the disk."""
    run, (villain, *honest) = trio(coordinator, "strikes")
    task, _ = villain.lease()
    content = honest_update(task, "v")
    codes = [denied(villain.upload, damaged(task, content, os.urandom(16))).code for _ in range(5)]
    assert codes == [StatusCode.DATA_LOSS] * 3 + [StatusCode.PERMISSION_DENIED] * 2
    folder = coordinator.state / "uploads" / villain.node_id
    assert not folder.exists() or list(folder.iterdir()) == []
    villain.give_up()
    finish(run, honest, 2)


def test_nobody_goes_on_with_the_upload_of_another_node(coordinator: Site) -> None:
    """S12, S13: its status, its bytes, its completion and its task are its own."""
    run, (villain, *honest) = trio(coordinator, "foreign")
    task, _ = villain.lease()
    theirs, _ = honest[0].lease()
    content = honest_update(theirs, honest[0].name)
    name = os.urandom(16)
    honest[0].upload(frames(theirs, content, upload_id=name))
    asked = denied(villain.call, "UploadStatus", pb.UploadStatusRequest(upload_id=name))
    assert asked.code is StatusCode.NOT_FOUND
    sent = denied(villain.upload, frames(theirs, content, upload_id=name))
    guessed = denied(villain.upload, [begin(task, content, upload_id=name, task_id=os.urandom(16))])
    assert sent.code is guessed.code is StatusCode.PERMISSION_DENIED
    assert sent.text == guessed.text
    # The same digest under the same id, for the villain's own task: the other's bytes are no help.
    body = villain.body(task, content, upload_id=name)
    claimed = denied(villain.call, "Submit", villain.request(body))
    assert claimed.code is StatusCode.FAILED_PRECONDITION
    assert honest[0].call("UploadStatus", pb.UploadStatusRequest(upload_id=name)).complete
    body = honest[0].body(theirs, content, upload_id=name)
    assert honest[0].call("Submit", honest[0].request(body)).verdict == pb.ACCEPTED
    villain.give_up()
    finish(run, honest[1:], 2)


def test_a_node_reads_what_its_own_task_needs_and_nothing_else(coordinator: Site) -> None:
    """S13: neither the model of another run, nor another client's update, nor its own after the task."""
    run, (villain, *honest) = trio(coordinator, "reads")
    other, (stranger, *rest) = trio(coordinator, "reads-other", run={"seed": 9})
    task, _ = villain.lease()
    foreign, _ = stranger.lease()
    assert villain.fetch(task.message.digest)
    theirs, _ = honest[0].lease()
    update = honest_update(theirs, honest[0].name)
    assert honest[0].submit(theirs, update).verdict == pb.ACCEPTED
    wanted = [foreign.message.digest, object_of(update).digest, os.urandom(32), b"", b"../../fedsim.db"]
    refused = [denied(villain.fetch, digest) for digest in wanted]
    assert {(one.code, one.text) for one in refused} == {
        (StatusCode.PERMISSION_DENIED, "no task of this node needs this object")
    }
    beyond = denied(villain.fetch, task.message.digest, offset=2**64 - 1)
    assert beyond.code is StatusCode.OUT_OF_RANGE
    mine = honest_update(task, villain.name)
    assert villain.submit(task, mine).verdict == pb.ACCEPTED
    finish(run, honest[1:], 3)
    for digest in (task.message.digest, object_of(mine).digest):
        assert denied(villain.fetch, digest).code is StatusCode.PERMISSION_DENIED
    finish(other, [stranger, *rest], 3)


def held_open(node: RawNode, start: pb.UploadFrame) -> tuple[Any, threading.Event]:
    """An upload that begins and then brings nothing; the event ends it."""
    release = threading.Event()

    def slow() -> Iterator[pb.UploadFrame]:
        yield start
        release.wait(60)

    return node.stub.Upload.future(slow(), metadata=node.metadata, timeout=60), release


def test_uploads_that_bring_nothing_do_not_take_the_room_of_others(coordinator: Site) -> None:
    """S14: a node has two slots; an upload beyond them is sent away, one of another node goes through."""
    run, (villain, *honest) = trio(coordinator, "slots")
    task, _ = villain.lease()
    content = honest_update(task, "v")
    held = []
    for number in range(2):
        name = bytes([number]) * 16
        held.append(held_open(villain, begin(task, content, upload_id=name)))
        status = pb.UploadStatusRequest(upload_id=name)
        until(partial(_answers, villain, status), "an upload that has begun")
    third = denied(villain.upload, frames(task, content, upload_id=bytes([9]) * 16))
    assert third.code is StatusCode.RESOURCE_EXHAUSTED
    assert float(third.metadata["fedsim-retry-after"]) > 0
    for node in honest:
        node.answer()
    for call, release in held:
        call.cancel()
        release.set()
    villain.give_up()
    run.end()


def _answers(node: RawNode, request: pb.UploadStatusRequest) -> bool:
    try:
        node.call("UploadStatus", request)
    except grpc.RpcError:
        return False
    return True


def test_connections_that_say_nothing_keep_nobody_out(coordinator: Site) -> None:
    """S14: hundreds of them, some in the middle of their first word; a round goes on beside them."""
    run, nodes = trio(coordinator, "idle")
    with ExitStack() as stack:
        for number in range(300):
            connection = stack.enter_context(RawConnection(coordinator.address))
            assert connection.send((b"", b"P", b"PRI * HTTP/2.0\r\n", b"\x16\x03\x01")[number % 4])
        finish(run, nodes, 3)


def test_metadata_beyond_the_limit_ends_the_call_and_not_the_connection(coordinator: Site) -> None:
    """S14: in a call of a library, and in headers that never end."""
    node = coordinator.node("chatty")
    large = (*node.metadata, ("x-much", "y" * 10 * METADATA_BYTES))
    refused = denied(node.stub.Heartbeat, pb.HeartbeatRequest(), metadata=large, timeout=30)
    assert refused.code is StatusCode.RESOURCE_EXHAUSTED
    assert node.call("Heartbeat", pb.HeartbeatRequest()) == pb.HeartbeatReply()


def test_a_flood_of_pings_is_cut(coordinator: Site) -> None:
    """S14: the connection is closed; others do not notice."""
    with RawConnection(coordinator.address) as connection:
        connection.begin()
        connection.send(frame(PING, payload=bytes(8)) * 100)
        assert b"too_many_pings" in connection.last_words()
    assert coordinator.node("beside").call("Heartbeat", pb.HeartbeatRequest()) == pb.HeartbeatReply()


@pytest.mark.slow
def test_more_work_at_a_time_than_is_allowed_is_sent_away(tmp_path: Path) -> None:
    """S14: calls beyond the cap get a delay; parked ones and those of others get through."""
    with site(tmp_path, {"limits.parked_polls": 2}) as small:
        villain, other = small.node("v"), small.node("w")
        calls = [
            villain.stub.Lease.future(pb.LeaseRequest(wait_seconds=20), metadata=villain.metadata)
            for _ in range(50)
        ]
        # One place for a node, however often it asks.
        until(lambda: sum(call.done() for call in calls) == 49, "49 answers")
        assert {call.result().reason for call in calls if call.done()} == {"idle"}
        parked = other.stub.Lease.future(pb.LeaseRequest(wait_seconds=20), metadata=other.metadata)
        third = small.node("x")

        def full() -> bool:
            reply = third.call("Lease", pb.LeaseRequest(wait_seconds=0.01))
            return bool(reply.reason == "busy" and reply.delay_seconds > 0)

        until(full, "a coordinator that has no room for a third")
        assert other.call("Heartbeat", pb.HeartbeatRequest()) == pb.HeartbeatReply()
        for call in [*calls, parked]:
            call.cancel()


@pytest.mark.slow
def test_gigabytes_of_anything_are_not_kept_in_memory(tmp_path: Path) -> None:
    """S5, S6, S7, S14: a process whose data may grow by 512 MB outlives 5 GB and uses 384 MB more at most."""
    with child(tmp_path) as server:
        villain, *honest = server.fleet("v", "a", "b", group="one")
        limits = {"max_strikes": 99, "min_clients": 3}
        run = server.submit(values(3, hidden=LARGE, deployment=limits), group="one")
        task, _ = villain.lease()
        before = server.memory("VmHWM")
        limit = server.memory("VmData") + 512 * MEGABYTE
        resource.prlimit(server.process.pid, resource.RLIMIT_DATA, (limit, limit))

        request = pb.SubmitRequest(update=bytes(400 * MEGABYTE))
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):  # S7: 400 kB on the wire
            how = {"metadata": villain.metadata, "timeout": 120, "compression": compression}
            refused = denied(villain.stub.Submit, request, **how)
            assert refused.code is StatusCode.RESOURCE_EXHAUSTED
        del request
        flood_with_headers(server.address)

        content = honest_update(task, "v")

        def endless() -> Iterator[pb.UploadFrame]:
            yield begin(task, content, upload_id=bytes(16))
            for at in range(0, 1024 * MEGABYTE, MEGABYTE):
                yield piece(at, bytes(MEGABYTE))

        assert denied(villain.upload, endless()).code is StatusCode.INVALID_ARGUMENT
        claim = framed({DELTA: {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}})
        for bomb in (claim + bytes(CHUNK), (1 << 30).to_bytes(8, "little") + bytes(CHUNK + 1)):
            task, _ = villain.lease()
            assert villain.submit(task, bomb).reason == "schema"
            for node in honest:
                node.answer()

        assert server.process.poll() is None, server.log.read_text()
        assert server.memory("VmHWM") - before < 384 * MEGABYTE
        # And it still works.
        task, _ = villain.lease()
        assert villain.submit(task, honest_update(task, "v")).verdict == pb.ACCEPTED
        finish(run, honest, 3)


def flood_with_headers(address: str) -> None:
    """Headers without an end, a header that is repeated in one byte, pings."""
    with RawConnection(address) as connection:
        connection.begin()
        connection.send(frame(HEADERS, 1, CALL))
        connection.flood(frame(CONTINUATION, 1, header(b"x-a", b"a" * 16_000)), 1024 * MEGABYTE)
    with RawConnection(address) as connection:
        connection.begin()
        connection.send(frame(HEADERS, 1, CALL + header(b"x-b", b"b" * 3_000, indexed=True)))
        connection.flood(frame(CONTINUATION, 1, b"\xbe" * 16_000), MEGABYTE // 4)  # 750 MB of headers
    for _ in range(100):
        with RawConnection(address) as connection:
            connection.begin()
            connection.send(frame(PING, payload=bytes(8)) * 1_000)


def open_files(pid: int) -> int:
    """Files and sockets that a process has open, without its database: readers keep their connections."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            found += not Path(os.readlink(link)).name.startswith("fedsim.db")
    return found


@pytest.mark.slow
def test_hundreds_of_uploads_and_polls_at_a_time_leave_nothing_behind(tmp_path: Path) -> None:
    """S14: after the last of them is gone the process has no more open files than before."""
    with child(tmp_path) as server:
        nodes = server.fleet(*(f"n{number}" for number in range(20)), group="many")
        run = server.submit(values(clients=20, hidden=LARGE), group="many")
        tasks = [node.lease()[0] for node in nodes]
        before = open_files(server.process.pid)
        held = []
        for node, task in zip(nodes, tasks, strict=True):
            content = honest_update(task, node.name)
            held += [held_open(node, begin(task, content, upload_id=os.urandom(16))) for _ in range(10)]
            for _ in range(10):
                asked = pb.LeaseRequest(wait_seconds=20)
                held.append((node.stub.Lease.future(asked, metadata=node.metadata), threading.Event()))
        for call, release in held:
            call.cancel()
            release.set()
        until(lambda: open_files(server.process.pid) <= before, "every file closed")
        for node in nodes:
            node.answer()
        run.end()
        assert run.lines("metrics.jsonl")[-1]["received"] == 20

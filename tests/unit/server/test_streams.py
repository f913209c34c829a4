"""Downloads and uploads over real gRPC on loopback, with real files and a real table of uploads."""

from __future__ import annotations

import asyncio
import hashlib
import os
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from fedsim.pb import federation_pb2 as pb
from fedsim.server.calls import OFFSET, Refused
from fedsim.server.desk import Place
from fedsim.server.objects import Objects
from fedsim.server.slots import Slots
from fedsim.server.streams import MOST_FETCHES
from tests.fake_runs import sent, update_bundle
from tests.fleet_server import Node, Service, refused, retry_after, run

CHUNK = 64 * 1024
SIZE = 100_000  # float32 values: seven chunks
CONTENT = update_bundle(SIZE)


async def fetched(node: Node, **request: Any) -> tuple[list[pb.Chunk], bytes]:
    """The chunks of a download, and their content."""
    chunks = [c async for c in node.stub.Fetch(pb.FetchRequest(**request), metadata=node.metadata)]
    for chunk in chunks:
        assert zlib.crc32(chunk.data) == chunk.crc32
    return chunks, b"".join(chunk.data for chunk in chunks)


def start(task_id: bytes, content: bytes = CONTENT, *, generation: int = 1, name: int = 1) -> pb.UploadFrame:
    """The first frame of an upload."""
    digest, size = sent(content).object
    return pb.UploadFrame(
        start=pb.UploadStart(
            upload_id=bytes([name]) * 16,
            generation=generation,
            task_id=task_id,
            object=pb.Object(digest=digest, size=size),
        )
    )


def chunk(offset: int, content: bytes = CONTENT, size: int = CHUNK) -> pb.UploadFrame:
    """The chunk of `content` at an offset."""
    data = content[offset : offset + size]
    return pb.UploadFrame(chunk=pb.Chunk(offset=offset, data=data, crc32=zlib.crc32(data)))


def chunks(first: int = 0, content: bytes = CONTENT) -> Iterator[pb.UploadFrame]:
    return (chunk(offset, content) for offset in range(first, len(content), CHUNK))


async def upload(node: Node, *frames: pb.UploadFrame) -> pb.UploadStatusReply:
    reply: pb.UploadStatusReply = await node.stub.Upload(iter(frames), metadata=node.metadata, timeout=60)
    return reply


async def status(node: Node, name: int = 1) -> pb.UploadStatusReply:
    reply: pb.UploadStatusReply = await node.call(
        "UploadStatus", pb.UploadStatusRequest(upload_id=bytes([name]) * 16)
    )
    return reply


async def arrived(service: Service, offset: int) -> None:
    """Wait until so much of an upload is with its stream."""
    while all(upload.offset != offset for upload in list(service.uploads._live.values())):
        await asyncio.sleep(0.02)


async def closed(service: Service) -> None:
    """Wait until all streams of uploads have ended, and what they brought is kept."""
    while service.fleet.running or service.uploads._live:
        await asyncio.sleep(0.02)


# Down.


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_object_arrives_whole_in_chunks_of_the_agreed_size(tmp_path: Path, on_disk: bool) -> None:
    content = os.urandom(3 * CHUNK + 7)
    (tmp_path / "model").write_bytes(content)

    async def scenario(service: Service) -> Any:
        node = service.node()
        service.runs.put(node.node_id, message=tmp_path / "model" if on_disk else content)
        return await fetched(node, digest=sent(content).object.digest)

    found, data = run(tmp_path, scenario, chunk_bytes=CHUNK)
    assert data == content
    assert [len(c.data) for c in found] == [CHUNK] * 3 + [7]
    assert [c.offset for c in found] == [0, CHUNK, 2 * CHUNK, 3 * CHUNK]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_download_goes_on_at_an_offset_and_ends_where_it_is_asked_to(tmp_path: Path, on_disk: bool) -> None:
    content = os.urandom(2 * CHUNK)
    (tmp_path / "model").write_bytes(content)

    async def scenario(service: Service) -> Any:
        node = service.node()
        service.runs.put(node.node_id, message=tmp_path / "model" if on_disk else content)
        digest = sent(content).object.digest
        parts = [
            (await fetched(node, digest=digest, offset=offset, length=length))[1]
            for offset, length in ((100, 0), (100, 50), (100, 10**9), (len(content), 0))
        ]
        behind = await refused(fetched(node, digest=digest, offset=len(content) + 1))
        return parts, behind.code()

    parts, code = run(tmp_path, scenario, chunk_bytes=CHUNK)
    assert parts == [content[100:], content[100:150], content[100:], b""]
    assert code is StatusCode.OUT_OF_RANGE


def test_a_node_fetches_what_its_live_task_needs_and_nothing_else(tmp_path: Path) -> None:
    async def scenario(service: Service) -> tuple[list[StatusCode], int]:
        node, other = service.node(), service.node()
        task = service.runs.put(node.node_id, message=b"a model")
        secret = service.objects.put(b"the update of another client")
        foreign = service.runs.put(other.node_id, message=b"another model")
        asked = [secret.digest, foreign.message.object.digest, bytes(32), b"", b"../../etc/passwd"]
        codes = [(await refused(fetched(node, digest=digest))).code() for digest in asked]
        task.status = "answered"
        codes.append((await refused(fetched(node, digest=task.message.object.digest))).code())
        return codes, len(asked)

    codes, asked = run(tmp_path, scenario)
    assert codes == [StatusCode.PERMISSION_DENIED] * (asked + 1)


def test_a_download_that_nobody_reads_is_cut_and_until_it_ends_it_counts(tmp_path: Path) -> None:
    content = bytes(16 * 1024 * 1024)  # more than buffers on the way take

    async def scenario(service: Service) -> Any:
        # Without the probe the window of HTTP/2 does not grow with what the link could carry.
        node = service.node(options=[("grpc.http2.bdp_probe", 0)])
        service.runs.put(node.node_id, message=content)
        request = pb.FetchRequest(digest=sent(content).object.digest)
        streams = service.fleet.streams
        send, go = streams._send, asyncio.Event()
        begun: set[Any] = set()
        given_up: list[Refused] = []

        async def counted(context: Any, message: bytes, count: int) -> None:
            if context in begun:
                await go.wait()
            begun.add(context)
            try:
                await send(context, message, count)
            except Refused as cut:
                given_up.append(cut)
                raise

        streams._send = counted  # type: ignore[method-assign]
        calls = [node.stub.Fetch(request, metadata=node.metadata) for _ in range(MOST_FETCHES)]
        for call in calls:
            await call.read()
        # The patience is short from here, where nobody reads, until all are cut: a busy machine has time.
        streams._idle_seconds = 0.3
        go.set()
        while len(given_up) < MOST_FETCHES:
            await asyncio.sleep(0.02)
        too_many = await refused(fetched(node, digest=request.digest))
        streams._idle_seconds = 60.0

        async def rest(call: Any) -> int:
            count = 1
            while await call.read() is not grpc.aio.EOF:
                count += 1
            return count

        cut = [await refused(rest(call)) for call in calls]
        while service.fleet.running:
            await asyncio.sleep(0.02)
        _, data = await fetched(node, digest=request.digest)
        return too_many, {error.code() for error in cut}, data == content

    too_many, cut, whole = run(tmp_path, scenario)
    assert too_many.code() is StatusCode.RESOURCE_EXHAUSTED
    assert cut == {StatusCode.DEADLINE_EXCEEDED}
    assert whole


# Up.


def test_an_uploaded_update_is_accepted_and_lies_among_the_objects(tmp_path: Path) -> None:
    async def scenario(service: Service) -> Any:
        node = service.node()
        task = service.runs.put(node.node_id, size=SIZE)
        done = await upload(node, start(task.task_id), *chunks())
        body = node.body(task, CONTENT, upload_id=b"\1" * 16)
        reply = await node.call("Submit", node.signed(body))
        place = service.runs.places[task.task_id]
        return done, await status(node), reply, place, service.objects.read(place.digest)

    done, known, reply, place, stored = run(tmp_path, scenario, stored=True, chunk_bytes=CHUNK)
    assert done == known
    assert (done.offset, done.complete, done.generation) == (len(CONTENT), True, 1)
    assert reply.verdict == pb.ACCEPTED
    assert place == (*sent(CONTENT).object, None)
    assert stored == CONTENT


def test_a_shortened_upload_is_held_until_its_verdict_and_then_left_to_the_rows(tmp_path: Path) -> None:
    """Where the answer comes too late no row will ever name it."""

    async def scenario(service: Service) -> tuple[Place, list[bytes], Objects]:
        service.runs.max_norm, service.runs.over_norm = 0.5, "clip"
        node = service.node()
        task = service.runs.put(node.node_id, size=SIZE)
        await upload(node, start(task.task_id), *chunks())
        body = node.body(task, CONTENT, upload_id=b"\1" * 16)
        reply = await node.call("Submit", node.signed(body))
        assert reply.verdict == pb.ACCEPTED
        while not service.runs.forgotten:
            await asyncio.sleep(0.01)
        return service.runs.places[task.task_id], service.runs.forgotten, service.objects

    place, forgotten, objects = run(tmp_path, scenario, stored=True, chunk_bytes=CHUNK)
    assert place.digest != hashlib.sha256(CONTENT).digest()
    assert forgotten == [place.digest]
    assert objects.has(place.digest)
    objects.remove([place.digest])
    assert not objects.has(place.digest), "nobody holds it any more"


def test_an_upload_that_was_cut_goes_on_where_the_server_says(tmp_path: Path) -> None:
    async def scenario(service: Service) -> Any:
        node = service.node()
        task = service.runs.put(node.node_id, size=SIZE)

        async def stalled() -> AsyncIterator[pb.UploadFrame]:
            yield start(task.task_id)
            for offset in (0, CHUNK, 2 * CHUNK):
                yield chunk(offset)
            await asyncio.sleep(60)

        call = node.stub.Upload(stalled(), metadata=node.metadata)
        await arrived(service, 3 * CHUNK)
        call.cancel()  # as when the process is killed
        await closed(service)
        cut = await status(node)
        done = await upload(node, start(task.task_id, generation=2), *chunks(cut.offset))
        body = node.body(task, CONTENT, upload_id=b"\1" * 16)
        return cut, done, await node.call("Submit", node.signed(body))

    cut, done, reply = run(tmp_path, scenario, stored=True, chunk_bytes=CHUNK)
    assert (cut.offset, cut.complete) == (3 * CHUNK, False)
    assert (done.offset, done.complete, done.generation) == (len(CONTENT), True, 2)
    assert reply.verdict == pb.ACCEPTED


async def status_or_none(node: Node) -> pb.UploadStatusReply | None:
    try:
        return await status(node)
    except Exception:
        return None


def test_a_newer_stream_of_an_upload_takes_the_place_of_the_older(tmp_path: Path) -> None:
    async def scenario(service: Service) -> Any:
        node = service.node()
        task = service.runs.put(node.node_id, size=SIZE)

        async def stalled() -> AsyncIterator[pb.UploadFrame]:
            yield start(task.task_id)
            yield chunk(0)
            await asyncio.sleep(60)

        older = node.stub.Upload(stalled(), metadata=node.metadata)
        while (await status_or_none(node)) is None:
            await asyncio.sleep(0.02)
        done = await upload(node, start(task.task_id, generation=2), *chunks())
        return done, await refused(older)

    done, error = run(tmp_path, scenario, stored=True, chunk_bytes=CHUNK)
    assert done.complete
    assert error.code() in (StatusCode.ABORTED, StatusCode.FAILED_PRECONDITION)


def damaged(task_id: bytes) -> list[pb.UploadFrame]:
    frame = chunk(0)
    frame.chunk.crc32 ^= 1
    return [start(task_id), frame]


def with_gap(task_id: bytes) -> list[pb.UploadFrame]:
    return [start(task_id), chunk(0), chunk(2 * CHUNK)]


def empty_chunk(task_id: bytes) -> list[pb.UploadFrame]:
    # One alone: gRPC gives its sender INTERNAL where a refusal meets a frame that is on its way.
    return [start(task_id), pb.UploadFrame(chunk=pb.Chunk())]


def behind_its_end(task_id: bytes) -> list[pb.UploadFrame]:
    return [start(task_id, b"short"), chunk(0)]


def without_start(task_id: bytes) -> list[pb.UploadFrame]:
    return [chunk(0)]


def two_starts(task_id: bytes) -> list[pb.UploadFrame]:
    return [start(task_id), start(task_id)]


def empty_frame(task_id: bytes) -> list[pb.UploadFrame]:
    return [start(task_id), pb.UploadFrame()]


def nothing(task_id: bytes) -> list[pb.UploadFrame]:
    return []


def too_large(task_id: bytes) -> list[pb.UploadFrame]:
    return [start(task_id, bytes(SIZE * 8))]


def short_names(task_id: bytes) -> list[pb.UploadFrame]:
    frame = start(task_id)
    frame.start.upload_id = b"short"
    return [frame]


def other_digest(task_id: bytes) -> list[pb.UploadFrame]:
    frame = start(task_id)
    frame.start.object.digest = bytes(32)
    return [frame, *chunks()]


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (damaged, StatusCode.DATA_LOSS),
        (other_digest, StatusCode.DATA_LOSS),
        (with_gap, StatusCode.FAILED_PRECONDITION),
        (empty_chunk, StatusCode.INVALID_ARGUMENT),
        (behind_its_end, StatusCode.INVALID_ARGUMENT),
        (without_start, StatusCode.INVALID_ARGUMENT),
        (two_starts, StatusCode.INVALID_ARGUMENT),
        (empty_frame, StatusCode.INVALID_ARGUMENT),
        (nothing, StatusCode.INVALID_ARGUMENT),
        (too_large, StatusCode.INVALID_ARGUMENT),
        (short_names, StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_malformed_upload_is_refused_and_the_next_one_is_taken(
    tmp_path: Path, frames: Any, code: StatusCode
) -> None:
    async def scenario(service: Service) -> Any:
        node = service.node()
        task = service.runs.put(node.node_id, size=SIZE)
        error = await refused(upload(node, *frames(task.task_id)))
        return error, await upload(node, start(task.task_id, name=2), *chunks())

    error, done = run(tmp_path, scenario, stored=True, chunk_bytes=CHUNK)
    assert error.code() is code
    assert done.complete
    if frames is with_gap:
        assert dict(error.trailing_metadata())[OFFSET] == str(CHUNK)


def test_what_was_not_uploaded_completely_cannot_be_submitted(tmp_path: Path) -> None:
    async def scenario(service: Service) -> Any:
        node, other = service.node(), service.node()
        task = service.runs.put(node.node_id, size=SIZE)
        partial = await upload(node, start(task.task_id), chunk(0))
        body = node.body(task, CONTENT, upload_id=b"\1" * 16)
        early = await refused(node.call("Submit", node.signed(body)))
        # Another client sends the same bytes: that helps this one to nothing.
        twin = service.runs.put(other.node_id, size=SIZE)
        await upload(other, start(twin.task_id), *chunks())
        still = await refused(node.call("Submit", node.signed(body)))
        return partial, early.code(), still.code(), dict(service.runs.verdicts)

    partial, early, still, verdicts = run(tmp_path, scenario, stored=True, chunk_bytes=CHUNK)
    assert not partial.complete
    assert early is still is StatusCode.FAILED_PRECONDITION
    assert verdicts == {}


def test_an_upload_without_progress_is_cut_and_keeps_what_arrived(tmp_path: Path) -> None:
    async def scenario(service: Service) -> Any:
        node = service.node()
        task = service.runs.put(node.node_id, size=SIZE)

        async def stalled() -> AsyncIterator[pb.UploadFrame]:
            yield start(task.task_id)
            yield chunk(0)
            await arrived(service, CHUNK)
            # From the next frame on: up to here a busy machine may take its time.
            (slot,) = service.fleet.streams._slots._taken
            slot._idle_seconds = 0.3
            yield chunk(CHUNK)
            await asyncio.sleep(60)

        error = await refused(node.stub.Upload(stalled(), metadata=node.metadata))
        await closed(service)
        return error, (await status(node)).offset

    error, offset = run(tmp_path, scenario, stored=True, chunk_bytes=CHUNK)
    assert error.code() is StatusCode.DEADLINE_EXCEEDED
    assert offset == 2 * CHUNK


def test_a_node_has_a_bounded_number_of_uploads_at_a_time(tmp_path: Path) -> None:
    async def scenario(service: Service) -> Any:
        node = service.node()
        tasks = [service.runs.put(node.node_id, size=SIZE) for _ in range(2)]

        async def stalled() -> AsyncIterator[pb.UploadFrame]:
            yield start(tasks[0].task_id)
            await asyncio.sleep(60)

        first = node.stub.Upload(stalled(), metadata=node.metadata)
        while (await status_or_none(node)) is None:
            await asyncio.sleep(0.02)
        error = await refused(upload(node, start(tasks[1].task_id, name=2), *chunks()))
        first.cancel()
        while service.fleet.running:
            await asyncio.sleep(0.02)
        return error, await upload(node, start(tasks[1].task_id, name=2), *chunks())

    error, done = run(tmp_path, scenario, stored=True, uploads_per_node=1, chunk_bytes=CHUNK)
    assert error.code() is StatusCode.RESOURCE_EXHAUSTED
    assert retry_after(error) > 0
    assert done.complete


# Slots alone.


def test_a_slow_upload_loses_its_slot_only_where_another_one_needs_it() -> None:
    async def scenario() -> list[str]:
        slots = Slots(2, 2, idle_seconds=60.0, window_seconds=0.04)
        slow, fast = slots.take("a", b"1"), slots.take("b", b"2")
        slow.count(10)
        fast.count(10**9)
        await asyncio.sleep(0.02)
        slow.check()  # nobody waits: it goes on
        slots.take("c", b"3")
        said = []
        for slot in (slow, fast):
            try:
                slot.check()
                said.append("goes on")
            except Refused as error:
                said.append(error.code.name)
        assert len(slots) == 2
        return said

    assert asyncio.run(scenario()) == ["RESOURCE_EXHAUSTED", "goes on"]


def test_slots_that_are_taken_by_fast_or_new_uploads_stay_taken() -> None:
    async def scenario() -> None:
        slots = Slots(2, 1, idle_seconds=60.0, window_seconds=60.0)
        slots.take("a", b"1")
        with pytest.raises(Refused) as found:
            slots.take("b", b"2")
        assert found.value.code is StatusCode.RESOURCE_EXHAUSTED
        assert found.value.retry_seconds

    asyncio.run(scenario())


def test_a_cut_ends_a_wait_at_once() -> None:
    async def scenario() -> str:
        slots = Slots(1, 1, idle_seconds=60.0)
        slot = slots.take("a", b"1")

        async def wait() -> str:
            try:
                async with slot.waiting():
                    await asyncio.sleep(60)
            except TimeoutError:
                return slot.over().code.name
            return "a frame"

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        slots.take("a", b"1")
        return await asyncio.wait_for(waiting, 60)

    assert asyncio.run(scenario()) == "ABORTED"

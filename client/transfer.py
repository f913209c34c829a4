"""Objects that are too large for one message: models down, updates up, in chunks that can be resumed.

Each chunk has a CRC-32, which finds damage early; the whole has the SHA-256 that the signed task or answer
names, which decides. A stream may take for ever as long as it moves; one that stands still for a minute is
given up and taken up again at the offset that was reached. While one chunk is on the network, the next (or
the one before) is read, hashed and written in a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import grpc
from grpc import StatusCode

from fedsim.client.connection import Connection, Metadata
from fedsim.client.statuses import Lost, Refused
from fedsim.pb import federation_pb2 as pb
from fedsim.storage import problem, sha256

IDLE_SECONDS = 60.0
_CHUNK_BYTES = 1 << 20
_LEAST_CHUNK, _MOST_CHUNK = 64 << 10, 3 << 20
_FINISH_BYTES_PER_SECOND = 20e6  # time for the coordinator to bring what it has onto its disk
_STRIKES = 5  # damaged chunks, or tries that the coordinator refuses, without any progress between

log = logging.getLogger(__name__)

OnBytes = Callable[[int], None]


class BadObject(Exception):
    """What the coordinator sent is not what its signed task names."""


class Unwanted(Exception):
    """The task was cancelled while its object was on the way."""


async def fetch(
    connection: Connection,
    wanted: pb.Object,
    path: Path,
    *,
    on_bytes: OnBytes = lambda count: None,
    cancelled: Callable[[], bool] = lambda: False,
    idle_seconds: float = IDLE_SECONDS,
) -> Path:
    """Fetch an object into `path`; goes on where an earlier try, also of an earlier process, has stopped.

    Args:
        wanted: digest and size, from a signed task.
        on_bytes: told how many bytes are here.

    Raises:
        BadObject: it is another one than asked for, or its chunks do not fit together.
        Refused: the coordinator does not give it out.
        Unwanted: `cancelled` said so.
        EnvironmentProblem: it cannot be written.
    """
    if await asyncio.to_thread(_whole, path, wanted):
        return path
    part = await asyncio.to_thread(_Part, path.with_name(f"{path.name}.part"), wanted.size)
    strikes = 0

    async def attempt(metadata: Metadata) -> None:
        nonlocal strikes
        request = pb.FetchRequest(digest=wanted.digest, offset=part.offset)
        call = connection.stub.Fetch(request, metadata=metadata)
        reached, writing = part.offset, None
        try:
            while reached < wanted.size:
                try:
                    async with asyncio.timeout(idle_seconds):
                        chunk = await call.read()
                except TimeoutError:
                    raise Lost(f"no byte for {idle_seconds:g} s") from None
                if chunk is grpc.aio.EOF:
                    status = await call.code()
                    if status != StatusCode.OK:
                        await call  # raises what it failed with
                    raise Lost("the stream ended before the object did", link=False)
                if cancelled():
                    raise Unwanted
                data = chunk.data  # a copy, each time
                size = len(data)
                if chunk.offset != reached or not 0 < size <= wanted.size - reached:
                    raise BadObject(f"a chunk of {size} bytes at {chunk.offset}, expected one at {reached}")
                if zlib.crc32(data) != chunk.crc32:
                    strikes += 1
                    if strikes >= _STRIKES:
                        raise BadObject(f"{strikes} chunks came damaged")
                    raise Lost(f"the chunk at {reached} came damaged", link=False)
                if writing is not None:
                    await writing
                reached += size
                writing = asyncio.ensure_future(asyncio.to_thread(part.add, data))
                on_bytes(reached)
        finally:
            call.cancel()
            if writing is not None:
                await asyncio.shield(writing)

    try:
        if part.offset < wanted.size:
            await connection.persist(attempt, mark=lambda: part.offset)
        if part.digest() != wanted.digest:
            part.discard()
            raise BadObject("its SHA-256 is not the one that the signed task names")
        await asyncio.to_thread(part.finish, path)
    except BadObject:
        part.discard()
        raise
    finally:
        part.close()
    return path


async def upload(
    connection: Connection,
    start: pb.UploadStart,
    content: Path,
    *,
    resumed: bool,
    on_bytes: OnBytes = lambda count: None,
    cancelled: Callable[[], bool] = lambda: False,
    idle_seconds: float = IDLE_SECONDS,
) -> None:
    """Bring a file to the coordinator's disk; returns when the coordinator has checked its digest.

    Args:
        start: which upload; its generation is set here.
        resumed: the coordinator may have a part of it already.

    Raises:
        BadObject: the file changed since its digest was taken.
        Refused: the coordinator does not take it.
        Unwanted: `cancelled` said so.
    """
    known = not resumed  # whether `offset` and `generation` are what the coordinator has
    offset, generation, strikes = 0, 0, 0

    async def attempt(metadata: Metadata) -> bool:
        """One stream; False where the coordinator wants another offset or the whole again."""
        nonlocal known, offset, generation
        if not known:
            status = await connection.upload_status(start.upload_id)
            offset, generation, known = status.offset, status.generation, True
            if status.complete:
                return True
        known = False
        chunk_bytes = max(_LEAST_CHUNK, min(connection.limits.chunk_bytes or _CHUNK_BYTES, _MOST_CHUNK))
        first = pb.UploadStart()
        first.CopyFrom(start)
        first.generation = generation + 1
        call = connection.stub.Upload(metadata=metadata)
        try:
            frames = _frames(first, content, offset, chunk_bytes)
            reply = await _send(call, frames, start.object.size, on_bytes, cancelled, idle_seconds)
        finally:
            call.cancel()
        return bool(reply.complete)

    while True:
        before = offset
        try:
            if await connection.persist(attempt, mark=lambda: offset):
                return
            trouble = "the coordinator has less than was sent"
        except Refused as refused:
            # A gap, another stream of the same upload, a damaged chunk: what it has now says how to go on.
            if refused.code not in (StatusCode.FAILED_PRECONDITION, StatusCode.DATA_LOSS):
                raise
            trouble = refused.text
            if await asyncio.to_thread(sha256, content) != start.object.digest.hex():
                raise BadObject(f"{content.name} changed since it was written") from refused
        strikes = strikes + 1 if offset == before else 1
        if strikes >= _STRIKES:
            raise Refused(StatusCode.DATA_LOSS, trouble)
        log.warning("upload=%s again after: %s", start.upload_id.hex(), trouble)


async def _send(
    call: Any,  # of grpc.aio
    frames: AsyncIterator[tuple[pb.UploadFrame, int]],
    size: int,
    on_bytes: OnBytes,
    cancelled: Callable[[], bool],
    idle_seconds: float,
) -> pb.UploadStatusReply:
    try:
        async for frame, sent in frames:
            if cancelled():
                raise Unwanted
            async with asyncio.timeout(idle_seconds):
                await call.write(frame)
            on_bytes(sent)
        async with asyncio.timeout(idle_seconds + size / _FINISH_BYTES_PER_SECOND):
            await call.done_writing()
            reply: pb.UploadStatusReply = await call
    except TimeoutError:
        raise Lost(f"nothing moved for {idle_seconds:g} s") from None
    except (asyncio.InvalidStateError, grpc.aio.UsageError):
        # The coordinator has ended the call before the last frame: its answer says why.
        reply = await call
    return reply


async def _frames(
    start: pb.UploadStart, content: Path, offset: int, chunk_bytes: int
) -> AsyncIterator[tuple[pb.UploadFrame, int]]:
    """The frames of a stream, each with the bytes that are sent after it; one is read ahead."""
    yield pb.UploadFrame(start=start), offset
    size = start.object.size
    handle = await asyncio.to_thread(content.open, "rb", buffering=0)
    ahead: asyncio.Task[tuple[pb.UploadFrame, int]] | None = None
    try:
        ahead = asyncio.ensure_future(asyncio.to_thread(_read_chunk, handle, offset, chunk_bytes, size))
        while offset < size:
            frame, count = await ahead
            offset += count
            ahead = asyncio.ensure_future(asyncio.to_thread(_read_chunk, handle, offset, chunk_bytes, size))
            yield frame, offset
    finally:
        if ahead is not None:
            with suppress(Exception):
                await asyncio.shield(ahead)
        handle.close()


def _read_chunk(handle: Any, offset: int, chunk_bytes: int, size: int) -> tuple[pb.UploadFrame, int]:
    """A frame with a chunk, and the bytes of the chunk."""
    handle.seek(offset)
    data = handle.read(min(chunk_bytes, size - offset))
    if not data and offset < size:
        raise BadObject("the file is shorter than it was")
    frame = pb.UploadFrame()
    # Filled in place: a message that is put into another one is copied.
    frame.chunk.offset, frame.chunk.data, frame.chunk.crc32 = offset, data, zlib.crc32(data)
    return frame, len(data)


def _whole(path: Path, wanted: pb.Object) -> bool:
    """Whether an object is here already, as after a restart."""
    try:
        return path.stat().st_size == wanted.size and sha256(path) == wanted.digest.hex()
    except OSError:
        return False


class _Part:
    """A file that grows by chunks, and the digest of what it has."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self.offset = 0
        try:
            self._file: BinaryIO = path.open("ab+", buffering=0)
            self._file.seek(0)
            if os.fstat(self._file.fileno()).st_size > size:
                self._file.truncate(0)
            while block := self._file.read(_CHUNK_BYTES):
                self._hash.update(block)
                self.offset += len(block)
        except OSError as error:
            raise problem(error, path) from error

    def add(self, data: bytes) -> None:
        """Append a chunk; the file never holds a part of one that is not in the digest."""
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self.offset)
            raise problem(error, self._path) from error
        self._hash.update(data)
        self.offset += len(data)

    def digest(self) -> bytes:
        return self._hash.digest()

    def finish(self, path: Path) -> None:
        """Give the file its name. It is not synced: what is damaged later is fetched again."""
        try:
            os.replace(self._path, path)
        except OSError as error:
            raise problem(error, path) from error

    def discard(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()

"""Objects on their way: down to a node by `Fetch`, up from it by `Upload`, in chunks with a CRC-32.

Neither has a total deadline, both have an idle one: a slow link may take hours, a dead one is cut after a
minute. While one chunk is read, or hashed and given to its file, the next one is on the network, and no more
than these two are in memory, beside the blocks of the file: HTTP/2 slows a sender that is faster. What a
node may fetch is decided by its live task alone.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import grpc
from grpc import StatusCode

from fedsim.pb import federation_pb2 as pb
from fedsim.server.calls import Refused
from fedsim.server.frames import Piece, chunk_message
from fedsim.server.slots import Slot, Slots
from fedsim.server.upload_stream import SYNC_SECONDS

if TYPE_CHECKING:
    from fedsim.server.runs import Runs
    from fedsim.server.telemetry import Telemetry
    from fedsim.server.uploads import Upload, Uploads

P = ParamSpec("P")
T = TypeVar("T")

NOT_LEASED = "this task is not leased to this node"
"""One text for a task of another node and for one that does not exist: guessing tells nothing."""
MOST_CHUNK_BYTES = 3 * 1024 * 1024
_NO_CHUNK = f"a frame after the first must be a chunk of at most {MOST_CHUNK_BYTES} bytes"
MOST_FETCHES = 4  # of one node at a time


class Streams:
    """The two streaming calls.

    Args:
        runs: says what a node may fetch and upload.
        uploads: unfinished uploads on disk.
        disk: threads for reading and writing.
        slots: for uploads.
        chunk_bytes: payload of a chunk.
        idle_seconds: a download of which nothing is read for so long is cut.
    """

    def __init__(
        self,
        runs: Runs,
        uploads: Uploads,
        disk: Executor,
        *,
        slots: Slots,
        telemetry: Telemetry,
        chunk_bytes: int,
        idle_seconds: float,
    ) -> None:
        self._runs = runs
        self._uploads = uploads
        self._disk = disk
        self._chunk_bytes = chunk_bytes
        self._idle_seconds = idle_seconds
        self._slots = slots
        self._telemetry = telemetry
        self._fetches: Counter[str] = Counter()

    async def fetch(self, node_id: str, request: pb.FetchRequest, context: Any) -> None:
        """Send an object of the node's live task, or a part of it.

        Args:
            context: of grpc.aio, which has no types.
        """
        self._admit(node_id, context)
        source = self._runs.fetchable(node_id, request.digest)
        if source is None:
            raise Refused(StatusCode.PERMISSION_DENIED, "no task of this node needs this object")
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if request.offset > size:
            text = f"offset {request.offset} is behind the end of {size} bytes"
            raise Refused(StatusCode.OUT_OF_RANGE, text)
        end = min(size, request.offset + request.length) if request.length else size
        if isinstance(source, bytes):
            for at in range(request.offset, end, self._chunk_bytes):
                part = source[at : min(at + self._chunk_bytes, end)]
                await self._send(context, chunk_message(at, part), len(part))
            return
        await self._send_file(context, source, request.offset, end)

    def _admit(self, node_id: str, context: Any) -> None:
        """Bound the downloads of a node.

        gRPC for Python cannot reset a stream: the status of a download that was cut waits behind the data
        that nobody reads, and so long the download counts.
        """
        if self._fetches[node_id] >= MOST_FETCHES:
            text = f"{MOST_FETCHES} downloads of this node are under way"
            raise Refused(StatusCode.RESOURCE_EXHAUSTED, text, retry_seconds=5.0)
        self._fetches[node_id] += 1

        def ended(_: Any) -> None:
            self._fetches[node_id] -= 1
            if not self._fetches[node_id]:
                del self._fetches[node_id]

        context.add_done_callback(ended)

    async def _send_file(self, context: Any, path: Path, begin: int, end: int) -> None:
        loop = asyncio.get_running_loop()
        handle = await loop.run_in_executor(self._disk, os.open, path, os.O_RDONLY)

        buffer = memoryview(bytearray(min(self._chunk_bytes, end - begin)))

        def read(at: int) -> Future[bytes]:
            return self._disk.submit(_read, handle, at, buffer[: end - at], path)

        ahead = read(begin)
        try:
            for at in range(begin, end, self._chunk_bytes):
                message = await asyncio.wrap_future(ahead)
                if at + self._chunk_bytes < end:
                    ahead = read(at + self._chunk_bytes)
                await self._send(context, message, min(self._chunk_bytes, end - at))
        finally:
            # Whatever ended the call: a thread may be reading still.
            ahead.add_done_callback(lambda _: os.close(handle))

    async def _send(self, context: Any, message: bytes, count: int) -> None:
        try:
            async with asyncio.timeout(self._idle_seconds):
                await context.write(message)
        except TimeoutError:
            text = f"nothing was read for {self._idle_seconds:g} s; fetch again from your offset"
            raise Refused(StatusCode.DEADLINE_EXCEEDED, text) from None
        self._telemetry.moved("down", "message", count)

    async def upload(self, node_id: str, context: Any) -> pb.UploadStatusReply:
        """Take the frames of one upload; what arrived stays, whatever ends the call.

        Raises:
            Refused: the task is not the node's, a frame is malformed, or there is no slot.
            UploadRefused: by the store: gap, damage, too large, no space.
        """
        start = await self._first_frame(context)
        task = self._runs.task(start.task_id)
        if task is None or task.node_id != node_id:
            raise Refused(StatusCode.PERMISSION_DENIED, NOT_LEASED)
        slot = self._slots.take(node_id, start.upload_id)
        steps = _Steps(self._disk)
        try:
            upload = await steps.run(self._uploads.start, node_id, start, task.max_update_bytes)
            if upload.offset:
                self._telemetry.upload_resumed()
            return await self._receive(slot, upload, steps, start, context)
        finally:
            self._slots.give_back(slot)
            steps.close()

    async def _receive(
        self, slot: Slot, upload: Upload, steps: _Steps, start: pb.UploadStart, context: Any
    ) -> pb.UploadStatusReply:
        writing: asyncio.Future[Any] | None = None

        def make_safe() -> None:
            """Nothing came for a while: what arrived shall not have to be sent again."""
            nonlocal writing
            if writing is None or (writing.done() and not writing.cancelled() and not writing.exception()):
                writing = steps.begin(upload.sync)
                writing.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

        while True:
            pause = asyncio.get_running_loop().call_later(SYNC_SECONDS, make_safe)
            try:
                frame = await self._next_frame(slot, context, writing)
            finally:
                pause.cancel()
            if frame is None:
                break
            if writing is not None:
                await writing
            piece = frame if isinstance(frame, Piece) else _piece(frame)
            count = len(piece.data)
            if count > MOST_CHUNK_BYTES:
                raise Refused(StatusCode.INVALID_ARGUMENT, _NO_CHUNK)
            slot.count(count)
            self._telemetry.moved("up", "update", count)
            writing = steps.begin(upload.write, *piece)
        if writing is not None:
            await writing
        if upload.offset == start.object.size:
            await steps.run(upload.finish)
            return pb.UploadStatusReply(offset=start.object.size, complete=True, generation=start.generation)
        offset = await steps.run(upload.sync)
        return pb.UploadStatusReply(offset=offset, complete=False, generation=start.generation)

    async def _first_frame(self, context: Any) -> pb.UploadStart:
        try:
            async with asyncio.timeout(self._idle_seconds):
                frame = await context.read()
        except TimeoutError:
            raise Refused(StatusCode.DEADLINE_EXCEEDED, "no frame arrived") from None
        if not isinstance(frame, pb.UploadFrame) or frame.WhichOneof("frame") != "start":
            raise Refused(StatusCode.INVALID_ARGUMENT, "the first frame must be the start of the upload")
        start: pb.UploadStart = frame.start
        return start

    async def _next_frame(
        self, slot: Slot, context: Any, writing: asyncio.Future[Any] | None
    ) -> Piece | pb.UploadFrame | None:
        """The next frame, None at the end of the stream; a failure of the writing before it is raised."""

        def end_wait(future: asyncio.Future[Any]) -> None:
            if not future.cancelled() and future.exception() is not None:
                slot.cut(Refused(StatusCode.ABORTED, "what was sent before could not be written"))

        if writing is not None:
            writing.add_done_callback(end_wait)
        try:
            async with slot.waiting():
                frame = await context.read()
        except (TimeoutError, Refused) as over:
            if writing is not None and writing.done():
                writing.result()
            raise (over if isinstance(over, Refused) else slot.over()) from None
        return None if frame is grpc.aio.EOF else frame


class _Steps:
    """The steps of one upload on disk, one after the other, also where the call ends in the middle of one."""

    def __init__(self, disk: Executor) -> None:
        self._disk = disk
        self._last: Future[Any] | None = None
        self._upload: Future[Upload] | None = None

    async def run(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do one step in a thread; the first one opens the upload."""
        return await self.begin(step, *args, **kwargs)

    def begin(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """As `run`, without waiting for its end; the step before must have ended."""
        future = self._disk.submit(step, *args, **kwargs)
        self._last = future
        if self._upload is None:
            self._upload = cast("Future[Upload]", future)
        return asyncio.wrap_future(future)

    def close(self) -> None:
        """Close the upload when the step under way has ended; nobody waits for it."""
        if self._upload is not None and self._last is not None:
            self._disk.submit(_close, self._upload, self._last)


def _piece(frame: pb.UploadFrame) -> Piece:
    """A frame that protobuf had to take apart.

    Raises:
        Refused: it holds no chunk.
    """
    if frame.WhichOneof("frame") != "chunk":
        raise Refused(StatusCode.INVALID_ARGUMENT, _NO_CHUNK)
    return Piece(frame.chunk.offset, frame.chunk.data, frame.chunk.crc32)


def _read(handle: int, offset: int, buffer: memoryview, path: Path) -> bytes:
    if os.preadv(handle, [buffer], offset) != len(buffer):
        raise RuntimeError(f"object {path.name} is shorter than it was when it was opened")
    return chunk_message(offset, buffer)


def _close(upload: Future[Upload], last: Future[Any]) -> None:
    wait([last])
    if not upload.cancelled() and upload.exception() is None:
        upload.result().close()

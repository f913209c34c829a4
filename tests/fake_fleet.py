"""A coordinator in memory for tests of clients: the contract of `Fleet`, and faults on demand.

It checks signatures, leases one task at a time, keeps a ledger and takes uploads in pieces like the real one,
but has no runs, no disk and no time. `faults["Submit"].append(LoseReply())` breaks the next Submit.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
import zlib
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc
from grpc import StatusCode

from fedsim.identity import ENROL, LOGIN, SUBMIT, TASK, Key, node_id_of, verify
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import FleetServicer, add_FleetServicer_to_server
from fedsim.transport import TICKET, server_options
from tests.faults import Abort, CutAfter, Damage, Fault, Hang, Lie, LoseReply
from tests.ports import free_port


@dataclass
class Stored:
    """One upload."""

    object: pb.Object
    content: bytearray = field(default_factory=bytearray)
    generation: int = 0
    complete: bool = False


class Accepted(NamedTuple):
    """One entry of the ledger."""

    body: pb.SubmitBody
    request: pb.SubmitRequest
    content: bytes


def task_config(strategy: str = "fedavg", model: str = "mlp", dataset: str = "digits") -> bytes:
    """The configuration of a task, as much of it as a policy looks at."""
    tables = {"strategy": {"name": strategy}, "model": {"name": model}, "data": {"name": dataset}}
    return json.dumps(tables).encode()


def local(batch_size: int = 16, epochs: int = 1, steps: int | None = None) -> bytes:
    """The local training of a task."""
    return json.dumps({"batch_size": batch_size, "epochs": epochs, "steps": steps, "lr": 0.1}).encode()


class FakeFleet(FleetServicer):  # type: ignore[misc]  # generated code has no types
    """The service; start it with ``async with``.

    Args:
        inline_bytes, chunk_bytes: limits that clients are told.
        approve: whether a new key is let in at once.
        heartbeat_seconds: that clients are told.
    """

    def __init__(
        self,
        *,
        inline_bytes: int = 1 << 20,
        chunk_bytes: int = 64 << 10,
        approve: bool = True,
        heartbeat_seconds: float = 20.0,
    ) -> None:
        self.key = Key.new()
        self.incarnation = 1
        self.major = 1
        self.server_time = time.time
        self.limits = pb.Limits(
            chunk_bytes=chunk_bytes, object_bytes=1 << 33, inline_bytes=inline_bytes
        )  # fmt: skip
        self.approve = approve
        self.heartbeat_seconds = heartbeat_seconds
        self.token: str | None = None  # that Enrol wants
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.calls: list[str] = []  # names of methods, in order of arrival
        self.nodes: dict[bytes, pb.NodeState] = {}
        self.tickets: dict[bytes, tuple[bytes, bytes]] = {}  # ticket -> key, session
        self.sessions: dict[bytes, bytes] = {}  # key -> newest session
        self.nonces: set[bytes] = set()
        self.offers: deque[pb.Offer] = deque()
        self.held: pb.Offer | None = None
        self.objects: dict[bytes, bytes] = {}
        self.uploads: dict[bytes, Stored] = {}
        self.received = 0  # bytes of uploads, repeated ones too
        self.sent: list[int] = []  # offsets that Fetch was asked for
        self.ledger: dict[bytes, Accepted] = {}  # by task id
        self.submits: list[bytes] = []  # every SubmitRequest, as bytes
        self.fails: list[pb.FailRequest] = []
        self.beats: list[pb.HeartbeatRequest] = []
        self.byes: list[str] = []
        self.leases: list[pb.LeaseRequest] = []
        self.cancelled: set[bytes] = set()
        self.verdict: Callable[[pb.SubmitBody], pb.SubmitReply] = lambda body: pb.SubmitReply(
            verdict=pb.ACCEPTED
        )
        self.empty_reply = pb.LeaseReply(delay_seconds=0.01)
        self.poll_seconds = 0.05
        self.changed = asyncio.Condition()
        self._server: Any = None
        self._port = free_port()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def __aenter__(self) -> FakeFleet:
        await self.up()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.down()

    async def up(self) -> None:
        """Serve, on the same port each time."""
        self._server = grpc.aio.server(options=server_options())
        add_FleetServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def down(self) -> None:
        """Be gone, in the middle of whatever is going on."""
        await self._server.stop(None)

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait until something that was called for has happened."""
        async with asyncio.timeout(seconds), self.changed:
            await self.changed.wait_for(condition)

    def offer(
        self,
        message: bytes = b"model",
        lent: bytes = b"",
        *,
        inline: bool = True,
        signer: Key | None = None,
        **fields: Any,
    ) -> pb.Task:
        """Queue a task; further keywords replace fields of it."""
        given = {
            "server_id": self.key.public, "run_id": "0123456789ab", "run_name": "digits-1",
            "task_id": os.urandom(16), "client": 0, "config": task_config(), "local": local(), "steps": -1,
            "schema": "5c4e", "population": 5, "lease_seconds": 90.0, "message": _object(message),
            "update": [pb.TensorSpec(name="vectors/delta", dtype="F32", shape=[10])],
        }  # fmt: skip
        if lent:
            given["lent"] = _object(lent)
        task = pb.Task(**(given | fields))
        self.objects[task.message.digest] = message
        if lent:
            self.objects[task.lent.digest] = lent
        body = task.SerializeToString()
        self.offers.append(
            pb.Offer(
                body=body,
                signature=(signer or self.key).sign(TASK, body),
                message=message if inline else b"",
                lent=lent if inline else b"",
            )
        )
        return task

    def forget_tickets(self) -> None:
        """As after a long absence: everybody has to log in again."""
        self.tickets.clear()

    async def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloReply:
        await self._begin("Hello", context, ticket=False)
        if request.major != self.major:
            text = f"this coordinator speaks {self.major}.0, the client {request.major}.{request.minor}"
            await context.abort(StatusCode.FAILED_PRECONDITION, text)
        nonce = os.urandom(32)
        self.nonces.add(nonce)
        return pb.HelloReply(
            major=self.major, minor=0, build="fake", server_id=self.key.public, nonce=nonce,
            limits=self.limits, server_time=self.server_time(), incarnation=self.incarnation,
        )  # fmt: skip

    async def Enrol(self, request: pb.Signed, context: Any) -> pb.EnrolReply:
        await self._begin("Enrol", context, ticket=False)
        body = pb.EnrolBody.FromString(request.body)
        await self._proven(body, request, ENROL, context)
        if body.public_key not in self.nodes:
            if self.token is not None and body.token != self.token:
                await context.abort(StatusCode.PERMISSION_DENIED, "the token is not valid")
            self.nodes[body.public_key] = pb.APPROVED if self.approve else pb.PENDING
        return pb.EnrolReply(
            node_id=node_id_of(body.public_key), state=self.nodes[body.public_key], name=body.name
        )

    async def Login(self, request: pb.Signed, context: Any) -> pb.LoginReply:
        await self._begin("Login", context, ticket=False)
        body = pb.LoginBody.FromString(request.body)
        await self._proven(body, request, LOGIN, context)
        if self.nodes.get(body.public_key) != pb.APPROVED:
            await context.abort(StatusCode.UNAUTHENTICATED, "this key may not log in")
        ticket = os.urandom(32)
        self.tickets[ticket] = (body.public_key, body.session)
        self.sessions[body.public_key] = body.session
        return pb.LoginReply(
            ticket=ticket, ticket_seconds=900, lease_seconds=90, heartbeat_seconds=self.heartbeat_seconds,
            node_id=node_id_of(body.public_key), name="n", role="client",
        )  # fmt: skip

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        await self._begin("Heartbeat", context)
        await self._note(self.beats, request)
        held = [
            pb.HeldLease(task_id=p.task_id, seconds=90, cancelled=p.task_id in self.cancelled)
            for p in request.held
        ]
        return pb.HeartbeatReply(held=held)

    async def Lease(self, request: pb.LeaseRequest, context: Any) -> pb.LeaseReply:
        fault = await self._begin("Lease", context)
        await self._note(self.leases, request)
        if self.held is None and not self.offers:
            await asyncio.sleep(self.poll_seconds)
        if self.held is None and self.offers:
            self.held = self.offers.popleft()
        if isinstance(fault, LoseReply):
            await context.abort(StatusCode.UNAVAILABLE, "the reply is lost")
        return self.empty_reply if self.held is None else pb.LeaseReply(offer=self.held)

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.Chunk]:
        fault = await self._begin("Fetch", context)
        self.sent.append(request.offset)
        content = self.objects.get(request.digest)
        if content is None:
            await context.abort(StatusCode.PERMISSION_DENIED, "no task of this node needs this object")
            return
        if isinstance(fault, Lie):
            content = bytes(len(content))
        size = self.limits.chunk_bytes
        for number, at in enumerate(range(request.offset, len(content), size)):
            data = content[at : at + size]
            crc = zlib.crc32(data)
            if isinstance(fault, CutAfter) and number == fault.chunks:
                await context.abort(StatusCode.UNAVAILABLE, "cut")
            if isinstance(fault, Damage) and number == fault.chunk:
                crc ^= 1
            yield pb.Chunk(offset=at, data=data, crc32=crc)

    async def UploadStatus(self, request: pb.UploadStatusRequest, context: Any) -> pb.UploadStatusReply:
        await self._begin("UploadStatus", context)
        stored = self.uploads.get(request.upload_id)
        if stored is None:
            await context.abort(StatusCode.NOT_FOUND, "no such upload")
            raise AssertionError
        return pb.UploadStatusReply(
            offset=len(stored.content), complete=stored.complete, generation=stored.generation
        )

    async def Upload(self, frames: AsyncIterator[pb.UploadFrame], context: Any) -> pb.UploadStatusReply:
        fault = await self._begin("Upload", context)
        start = (await anext(frames)).start
        stored = self.uploads.setdefault(start.upload_id, Stored(start.object))
        if start.generation <= stored.generation:
            text = f"generation {stored.generation} of this upload was seen already"
            await context.abort(StatusCode.FAILED_PRECONDITION, text)
        stored.generation = start.generation
        number = 0
        async for frame in frames:
            chunk = frame.chunk
            if isinstance(fault, CutAfter) and number == fault.chunks:
                await context.abort(StatusCode.UNAVAILABLE, "cut")
            number += 1
            self.received += len(chunk.data)
            if zlib.crc32(chunk.data) != chunk.crc32:
                await context.abort(StatusCode.DATA_LOSS, "damaged chunk")
            if chunk.offset != len(stored.content):
                await context.abort(StatusCode.FAILED_PRECONDITION, f"expected {len(stored.content)}")
            stored.content += chunk.data
        if len(stored.content) == stored.object.size:
            if hashlib.sha256(stored.content).digest() != stored.object.digest:
                del self.uploads[start.upload_id]
                await context.abort(StatusCode.DATA_LOSS, "wrong digest")
            stored.complete = True
        return pb.UploadStatusReply(
            offset=len(stored.content), complete=stored.complete, generation=stored.generation
        )

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitReply:
        fault = await self._begin("Submit", context)
        await self._note(self.submits, request.SerializeToString())
        body = pb.SubmitBody.FromString(request.body)
        public, _ = self._caller(context)
        if not verify(public, SUBMIT, request.body, request.signature):
            await context.abort(StatusCode.UNAUTHENTICATED, "the signature is wrong")
        earlier = self.ledger.get(body.task_id)
        if earlier is not None:
            return pb.SubmitReply(verdict=pb.DUPLICATE, first=pb.ACCEPTED)
        content = bytes(request.update)
        if body.upload_id:
            stored = self.uploads.get(body.upload_id)
            if stored is None or not stored.complete:
                await context.abort(StatusCode.FAILED_PRECONDITION, "the upload is not complete")
                raise AssertionError
            content = bytes(stored.content)
        if hashlib.sha256(content).digest() != body.update.digest:
            return pb.SubmitReply(verdict=pb.REJECTED, reason="digest")
        reply = self.verdict(body)
        if reply.verdict != pb.RETRY:
            self.held = None
        if reply.verdict == pb.ACCEPTED:
            self.ledger[body.task_id] = Accepted(body, request, content)
        async with self.changed:
            self.changed.notify_all()
        if isinstance(fault, LoseReply):
            await context.abort(StatusCode.UNAVAILABLE, "the reply is lost")
        return reply

    async def Fail(self, request: pb.FailRequest, context: Any) -> pb.FailReply:
        await self._begin("Fail", context)
        self.held = None
        await self._note(self.fails, request)
        return pb.FailReply()

    async def Bye(self, request: pb.ByeRequest, context: Any) -> pb.ByeReply:
        await self._begin("Bye", context)
        await self._note(self.byes, request.reason)
        return pb.ByeReply()

    async def _begin(self, method: str, context: Any, *, ticket: bool = True) -> Fault | None:
        """Count the call, check its ticket, and break it where a fault says so."""
        await self._note(self.calls, method)
        fault = self.faults[method].popleft() if self.faults[method] else None
        match fault:
            case Abort(code, text, retry_after):
                trailing = () if retry_after is None else (("fedsim-retry-after", f"{retry_after}"),)
                await context.abort(code, text, trailing)
            case Hang():
                await asyncio.Event().wait()
        if ticket:
            known = self._caller(context)
            if known is None:
                await context.abort(StatusCode.UNAUTHENTICATED, "the ticket is not valid")
                raise AssertionError
            public, session = known
            if self.sessions[public] != session:
                await context.abort(StatusCode.FAILED_PRECONDITION, "superseded by a newer login")
        return fault

    async def _proven(self, body: Any, request: pb.Signed, label: bytes, context: Any) -> None:
        fresh = body.nonce in self.nonces and body.server_id == self.key.public
        self.nonces.discard(body.nonce)
        if not fresh or not verify(body.public_key, label, request.body, request.signature):
            await context.abort(StatusCode.UNAUTHENTICATED, "not proven")

    def _caller(self, context: Any) -> Any:
        metadata = dict(context.invocation_metadata())
        return self.tickets.get(metadata.get(TICKET, b""))

    async def _note(self, where: list[Any], what: Any) -> None:
        async with self.changed:
            where.append(what)
            self.changed.notify_all()


def _object(content: bytes) -> pb.Object:
    return pb.Object(digest=hashlib.sha256(content).digest(), size=len(content))

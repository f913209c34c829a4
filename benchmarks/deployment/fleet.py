"""Clients that train nothing: they speak the wire protocol and answer every task with random values.

They load a coordinator as real clients do, over TLS and with signed updates that its validation accepts, at
a small part of the cost. Many of them share one event loop and a few connections. What they check is what
costs the coordinator nothing: signatures and digests of what they are sent are taken on trust unless a
caller asks for more.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc import StatusCode

from benchmarks.deployment.random_updates import Update, Updates
from fedsim.bundle import TensorSpec
from fedsim.identity import ENROL, LOGIN, SUBMIT, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import ControlStub, FleetStub
from fedsim.transport import TICKET, Tls, open_channel
from fedsim.wire import MAJOR, MINOR

BUILD = "load"
SECONDS = 120.0  # that a call may take
NODES_PER_CHANNEL = 64  # below the limit of streams on a connection, with room for submissions


class Caller:
    """Somebody with a key: logged in by `enter`, then free to call.

    Args:
        channel: of grpc.aio, which others may share.
        name: to be known by; token: of the invitation.
    """

    def __init__(self, channel: Any, name: str, token: str, key: Key | None = None) -> None:
        self.name, self.token = name, token
        self.key = key or Key.new()
        self.stub: Any = FleetStub(channel)  # type: ignore[no-untyped-call]
        self.control: Any = ControlStub(channel)  # type: ignore[no-untyped-call]
        self.session = os.urandom(16)
        self.server_id = b""
        self.limits = pb.Limits()
        self._metadata: tuple[tuple[str, bytes], ...] = ()

    @property
    def node_id(self) -> str:
        return self.key.node_id

    async def enter(self) -> None:
        """Enrol and log in."""
        hello = await self._hello()
        body = pb.EnrolBody(
            server_id=hello.server_id, nonce=hello.nonce, public_key=self.key.public, token=self.token,
            name=self.name,
        )  # fmt: skip
        await self.stub.Enrol(self._signed(ENROL, body), timeout=SECONDS)
        await self.log_in()

    async def log_in(self) -> None:
        """A new ticket for this session."""
        hello = await self._hello()
        body = pb.LoginBody(
            server_id=hello.server_id, nonce=hello.nonce, public_key=self.key.public, build=BUILD,
            client_time=time.time(), session=self.session,
        )  # fmt: skip
        reply = await self.stub.Login(self._signed(LOGIN, body), timeout=SECONDS)
        self._metadata = ((TICKET, reply.ticket),)

    async def call(self, method: Any, request: Any, seconds: float = SECONDS) -> Any:
        """One call; whose ticket has expired logs in again, and who is asked to wait does.

        Args:
            method: of a stub of grpc.aio, which has no types.
        """
        while True:
            try:
                return await method(request, metadata=self._metadata, timeout=seconds)
            except grpc.aio.AioRpcError as error:
                if error.code() == StatusCode.UNAUTHENTICATED:
                    await self.log_in()
                elif error.code() == StatusCode.RESOURCE_EXHAUSTED:
                    await asyncio.sleep(1.0)
                else:
                    raise

    async def _hello(self) -> pb.HelloReply:
        reply: pb.HelloReply = await self.stub.Hello(
            pb.HelloRequest(major=MAJOR, minor=MINOR, build=BUILD), timeout=SECONDS
        )
        self.server_id, self.limits = reply.server_id, reply.limits
        return reply

    def _signed(self, context: bytes, body: Any) -> pb.Signed:
        content = body.SerializeToString()
        return pb.Signed(body=content, signature=self.key.sign(context, content))


class Operator(Caller):
    """Submits runs and looks at them."""

    async def submit(self, config: str, name: str) -> pb.Run:
        request = pb.SubmitRunRequest(config=config, name=name, run_key=os.urandom(8).hex())
        run: pb.Run = await self.call(self.control.SubmitRun, request, 600.0)
        return run

    async def run(self, run_id: str) -> pb.Run:
        run: pb.Run = await self.call(self.control.GetRun, pb.RunRequest(run_id=run_id))
        return run

    async def until(self, run_id: str, done: Callable[[pb.Run], bool], seconds: float = 600.0) -> pb.Run:
        """Wait until the run is as `done` wants it.

        Raises:
            RuntimeError: it was paused or failed before.
        """
        end = time.monotonic() + seconds
        while True:
            run = await self.run(run_id)
            if done(run):
                return run
            if run.state in ("failed", "paused") or time.monotonic() > end:
                raise RuntimeError(f"the run is {run.state}: {run.detail}")
            await asyncio.sleep(0.2)


class FakeNode(Caller):
    """A client; `seed` draws its updates."""

    def __init__(self, channel: Any, name: str, token: str, *, seed: int = 0, key: Key | None = None) -> None:
        super().__init__(channel, name, token, key)
        self._seed = seed
        self._layouts: dict[tuple[str, ...], Updates] = {}

    async def lease(self, seconds: float = 25.0) -> tuple[pb.Task, pb.Offer] | None:
        """A task, or None where there was none in that time."""
        request = pb.LeaseRequest(wait_seconds=seconds)
        reply = await self.call(self.stub.Lease, request, seconds + SECONDS)
        if not reply.HasField("offer"):
            await asyncio.sleep(reply.delay_seconds)
            return None
        return pb.Task.FromString(reply.offer.body), reply.offer

    async def fetch(self, wanted: pb.Object, *, checked: bool = True) -> int:
        """Take an object and keep nothing of it; the bytes that came.

        Args:
            checked: look at every CRC and at the digest, as a real client does.

        Raises:
            ValueError: what came is something else.
        """
        hashed, got = hashlib.sha256(), 0
        call = self.stub.Fetch(pb.FetchRequest(digest=wanted.digest), metadata=self._metadata)
        hashing: Awaitable[None] | None = None
        async for chunk in call:
            data = chunk.data  # a copy, each time
            got += len(data)
            if not checked:
                continue
            if zlib.crc32(data) != chunk.crc32:
                raise ValueError(f"a chunk at {chunk.offset} is damaged")
            if hashing is not None:
                await hashing
            hashing = asyncio.ensure_future(asyncio.to_thread(hashed.update, data))
        if hashing is not None:
            await hashing
        if got != wanted.size or (checked and hashed.digest() != wanted.digest):
            raise ValueError(f"{got} bytes came, {wanted.size} were promised")
        return got

    def update_for(self, task: pb.Task) -> Update:
        """A random answer to a task."""
        layout = tuple(f"{s.name} {s.dtype} {s.shape}" for s in task.update)
        if layout not in self._layouts:
            specs = [TensorSpec(s.name, s.dtype, tuple(s.shape)) for s in task.update]
            self._layouts[layout] = Updates(specs, self._seed)
        return self._layouts[layout].next()

    async def upload(self, task: pb.Task, update: Update) -> bytes:
        """Stream an update up; its upload id, once it is durable there."""
        upload_id = os.urandom(16)
        start = pb.UploadStart(
            upload_id=upload_id, generation=1, task_id=task.task_id,
            object=pb.Object(digest=update.digest, size=update.size),
        )  # fmt: skip

        async def frames() -> AsyncIterator[pb.UploadFrame]:
            yield pb.UploadFrame(start=start)
            for at in range(0, update.size, self.limits.chunk_bytes):
                data = update.read(at, self.limits.chunk_bytes)
                frame = pb.UploadFrame()
                # Filled in place: a message that is put into another one is copied.
                frame.chunk.offset, frame.chunk.data, frame.chunk.crc32 = at, data, zlib.crc32(data)
                yield frame

        reply = await self.stub.Upload(frames(), metadata=self._metadata)
        if not reply.complete:
            raise ValueError(f"the coordinator has {reply.offset} of {update.size} bytes")
        return upload_id

    async def submit(self, task: pb.Task, update: Update, upload_id: bytes = b"") -> pb.SubmitReply:
        """Hand an answer in until it has a verdict."""
        body = pb.SubmitBody(
            server_id=self.server_id, run_id=task.run_id, task_id=task.task_id, attempt=task.attempt,
            key=os.urandom(16), update=pb.Object(digest=update.digest, size=update.size), upload_id=upload_id,
            examples=10, local_steps=1, normaliser=1.0, train_seconds=0.0, metrics={"loss": 1.0},
        ).SerializeToString()  # fmt: skip
        request = pb.SubmitRequest(
            body=body,
            signature=self.key.sign(SUBMIT, body),
            update=b"" if upload_id else update.read(0, update.size),
        )
        while True:
            reply: pb.SubmitReply = await self.call(self.stub.Submit, request)
            if reply.verdict != pb.RETRY:
                return reply
            await asyncio.sleep(reply.delay_seconds)

    async def answer(self, task: pb.Task, offer: pb.Offer) -> pb.SubmitReply:
        """Do a task from its offer to the verdict, whatever its size."""
        if task.message.size and not offer.message:
            await self.fetch(task.message)
        update = self.update_for(task)
        inline = update.size <= self.limits.inline_bytes
        return await self.submit(task, update, b"" if inline else await self.upload(task, update))

    async def serve(self, done: Callable[[pb.Task, pb.SubmitReply], None]) -> None:
        """Take tasks for ever; each that has a verdict is told to `done`."""
        while True:
            leased = await self.lease()
            if leased is not None:
                done(leased[0], await self.answer(*leased))


@dataclass(eq=False)
class FakeFleet:
    """Nodes on shared connections of one event loop.

    Args:
        address, ca: of the coordinator.
        tokens: name -> token of each node's invitation.
    """

    address: str
    ca: Path
    tokens: dict[str, str]
    nodes: list[FakeNode] = field(default_factory=list)
    channels: list[Any] = field(default_factory=list)

    def channel(self) -> Any:
        """One more connection. Any: of grpc.aio."""
        channel = open_channel(self.address, Tls(self.ca))
        self.channels.append(channel)
        return channel

    async def enter(self, *, at_a_time: int = 32) -> None:
        """Let every node enrol and log in."""
        channel = None
        for number, (name, token) in enumerate(self.tokens.items()):
            if number % NODES_PER_CHANNEL == 0:
                channel = self.channel()
            self.nodes.append(FakeNode(channel, name, token, seed=number))
        gate = asyncio.Semaphore(at_a_time)

        async def one(node: FakeNode) -> None:
            async with gate:
                await node.enter()

        await asyncio.gather(*(one(node) for node in self.nodes))

    def serve(self, done: Callable[[pb.Task, pb.SubmitReply], None]) -> list[asyncio.Task[None]]:
        """Let every node work; cancel the tasks to end it."""
        return [asyncio.ensure_future(node.serve(done)) for node in self.nodes]

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()

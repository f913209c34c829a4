"""A coordinator's service for nodes on loopback: real gRPC, real uploads, made-up runs and tickets."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from fedsim.identity import SUBMIT, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import FleetStub
from fedsim.server.auth import Peer
from fedsim.server.board import OpenTask
from fedsim.server.calls import RETRY_AFTER
from fedsim.server.database import open_database
from fedsim.server.denied import Denied
from fedsim.server.fleet import Fleet
from fedsim.server.fleet_parts import FleetParts
from fedsim.server.frames import add_fleet
from fedsim.server.objects import Objects
from fedsim.server.services import Services
from fedsim.server.settings import LimitsSection, ServerSettings
from fedsim.server.telemetry import Telemetry
from fedsim.server.uploads import Uploads
from fedsim.transport import TICKET, client_options, server_options
from tests.fake_runs import FakeRuns, sent


class Tickets:
    """Tickets of peers that a test admits; used as the argument `auth`."""

    def __init__(self) -> None:
        self.peers: dict[bytes, Peer] = {}
        self.renewal: tuple[bytes, float] | None = None

    def admit(self, key: Key, role: str = "client") -> bytes:
        ticket = os.urandom(32)
        self.peers[ticket] = Peer(key.node_id, f"node-{key.node_id[:4]}", role, key.public, os.urandom(16))
        return ticket

    def nonce(self) -> bytes:
        return bytes(32)

    def peer(self, metadata: Any) -> Peer:
        for name, value in metadata:
            if name == TICKET and value in self.peers:
                return self.peers[value]
        raise Denied(StatusCode.UNAUTHENTICATED, "no valid ticket")

    def renew(self, peer: Peer) -> tuple[bytes, float] | None:
        return self.renewal

    def drop(self, peer: Peer) -> None:
        self.peers = {ticket: known for ticket, known in self.peers.items() if known != peer}

    def enrol(self, signed: pb.Signed, address: str, certificate: object) -> pb.EnrolReply:
        body = pb.EnrolBody.FromString(signed.body)
        raise Denied(StatusCode.PERMISSION_DENIED, f"no token {body.name} from {address}")

    def login(self, signed: pb.Signed, address: str, certificate: object) -> pb.LoginReply:
        body = pb.LoginBody.FromString(signed.body)
        raise Denied(StatusCode.UNAUTHENTICATED, f"no login {body.build}")


@dataclass(eq=False)
class Service:
    """A service that runs, and what it works with."""

    fleet: Fleet
    runs: FakeRuns
    auth: Tickets
    uploads: Uploads
    objects: Objects
    key: Key
    address: str
    channels: list[Any] = field(default_factory=list)

    def node(
        self, key: Key | None = None, *, role: str = "client", options: Sequence[tuple[str, int]] = ()
    ) -> Node:
        """A node that is logged in; `options` of its channel come on top."""
        key = key or Key.new()
        channel = grpc.aio.insecure_channel(self.address, [*client_options(proxy=False), *options])
        self.channels.append(channel)
        return Node(key, FleetStub(channel), ((TICKET, self.auth.admit(key, role)),), self.key.public)


@dataclass(eq=False)
class Node:
    """The calling side."""

    key: Key
    stub: Any
    metadata: tuple[tuple[str, bytes], ...]
    server_id: bytes

    @property
    def node_id(self) -> str:
        return self.key.node_id

    async def call(self, method: str, request: Any, *, seconds: float = 60.0) -> Any:
        return await getattr(self.stub, method)(request, metadata=self.metadata, timeout=seconds)

    def body(self, task: OpenTask, content: bytes, **fields: Any) -> pb.SubmitBody:
        """What a node says of an answer."""
        body = pb.SubmitBody(
            server_id=self.server_id,
            run_id=task.run_id,
            task_id=task.task_id,
            attempt=task.attempt,
            key=os.urandom(16),
            examples=10,
            local_steps=5,
            normaliser=1.0,
            train_seconds=0.1,
        )
        digest, size = sent(content).object
        body.update.digest, body.update.size = digest, size
        body.MergeFrom(pb.SubmitBody(**fields))
        return body

    def signed(self, body: pb.SubmitBody, update: bytes = b"") -> pb.SubmitRequest:
        raw = body.SerializeToString()
        return pb.SubmitRequest(body=raw, signature=self.key.sign(SUBMIT, raw), update=update)

    async def submit(self, task: OpenTask, content: bytes, **fields: Any) -> pb.SubmitReply:
        """Send an answer inside the submission."""
        reply: pb.SubmitReply = await self.call(
            "Submit", self.signed(self.body(task, content, **fields), content)
        )
        return reply


class NoUploads:
    """In place of `Uploads` where a test uploads nothing: to open a database takes a while."""

    def close(self) -> None:
        pass


@asynccontextmanager
async def serving(
    folder: Path, *, stored: bool = False, idle_seconds: float = 60.0, **limits: Any
) -> AsyncIterator[Service]:
    """Serve on an ephemeral port of loopback.

    Args:
        folder: the state folder.
        stored: with a database and real uploads.
        limits: keys of ``[limits]``.
    """
    key = Key.new()
    database = open_database("sqlite", folder) if stored else None
    objects = Objects(folder / "objects")
    uploads: Any = NoUploads()
    if database is not None:
        uploads = Uploads(database, objects, folder / "uploads", keep_free_bytes=0)
    runs, auth = FakeRuns(key), Tickets()
    work, disk = ThreadPoolExecutor(2, "work"), ThreadPoolExecutor(4, "disk")
    parts: Any = FleetParts(
        auth=auth,  # type: ignore[arg-type]
        runs=runs,  # type: ignore[arg-type]
        uploads=uploads,
        objects=objects,
        key=key,
        settings=ServerSettings(limits=LimitsSection(**limits)),
        telemetry=Telemetry(folder),
        work=work,
        disk=disk,
        incarnation=3,
        idle_seconds=idle_seconds,
    )
    fleet = Fleet(parts)
    server = grpc.aio.server(options=server_options())
    services = Services()
    add_fleet(fleet, services)
    server.add_generic_rpc_handlers((services,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    service = Service(fleet, runs, auth, uploads, objects, key, f"127.0.0.1:{port}")
    try:
        yield service
    finally:
        for channel in service.channels:
            await channel.close()
        await server.stop(0)
        fleet.presence.close()
        await asyncio.to_thread(uploads.close)  # it may wait for the writer, which no event loop does
        work.shutdown()
        disk.shutdown()
        if database is not None:
            database.close()


def run(folder: Path, scenario: Callable[[Service], Awaitable[Any]], **options: Any) -> Any:
    """Serve from `folder` while the scenario lasts; see `serving` for the options."""

    async def served() -> Any:
        async with serving(folder, **options) as service:
            return await asyncio.wait_for(scenario(service), 180)

    return asyncio.run(served())


async def refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as found:
        await call
    return found.value


def retry_after(error: grpc.aio.AioRpcError) -> float:
    """Seconds that the caller is asked to stay away."""
    return float(dict(error.trailing_metadata())[RETRY_AFTER])

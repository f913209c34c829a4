"""Clients for tests: the real runtime on a loopback port, with a fake worker and waits of milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fedsim.client import connection as connection_module
from fedsim.client.connection import Connection, Introduction
from fedsim.client.policy import PolicyFile
from fedsim.client.runtime import Runtime
from fedsim.client.state import StateFolder
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.transport import open_channel
from tests.fake_fleet import FakeFleet
from tests.fake_worker import FakeWorker

OPEN_POLICY = """
[coordinators]
allow = ["{server_id}"]
[runs]
names = ["*"]
[plugins]
strategies = ["*"]
models = ["*"]
datasets = ["*"]
"""


def on_loopback(test: Callable[[FakeFleet], Awaitable[None]], **options: Any) -> None:
    """Run a test against a coordinator of its own; `options` are those of `FakeFleet`."""

    async def main() -> None:
        async with FakeFleet(**options) as fleet, asyncio.timeout(120):
            await test(fleet)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection_module, "BYE_SECONDS", 60.0)  # a goodbye shall arrive on a busy machine too
        asyncio.run(main())


def at_once(attempt: int) -> float:
    """A back-off for tests, still longer than nothing so that others get their turn."""
    return 0.005


@dataclass
class Client:
    """A client that works in the background.

    Args:
        done: its `Runtime.run`; ends with what that raises.
    """

    runtime: Runtime
    connection: Connection
    folder: StateFolder
    worker: FakeWorker
    done: asyncio.Task[None]

    async def stop(self) -> None:
        """Tell it to stop, as SIGTERM does, and wait until it has."""
        self.runtime.stop()
        async with asyncio.timeout(60):
            await self.done

    async def ends(self) -> None:
        """Wait until it ends by itself; raises what ended it."""
        async with asyncio.timeout(60):
            await self.done

    async def crash(self) -> None:
        """End it without a word, as SIGKILL would."""
        self.done.cancel()
        await asyncio.wait([self.done])


def own_key(path: Path) -> Key:
    """The key of the client in `path`; the same one every time."""
    file = path.parent / f"{path.name}.key"
    if not file.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Key.new().save(file)
    return Key.load(file)


@asynccontextmanager
async def connected(
    fleet: FakeFleet,
    path: Path,
    *,
    server_id: bytes | None = None,
    token: str = "",
    key: Key | None = None,
    max_retries: int | None = None,
) -> AsyncIterator[Connection]:
    """A connection that is not logged in yet."""
    folder = StateFolder(path)
    channel = open_channel(fleet.address, None, insecure=True)
    who = Introduction(fleet.address, server_id, token, "n")
    connection = Connection(
        channel, key or own_key(path), folder, who, backoff=at_once, max_retries=max_retries
    )
    try:
        yield connection
    finally:
        await connection.close()
        folder.close()


@asynccontextmanager
async def client(
    fleet: FakeFleet,
    path: Path,
    worker: FakeWorker | None = None,
    *,
    policy: str | None = OPEN_POLICY,
    key: Key | None = None,
    max_retries: int | None = None,
    now: Callable[[], datetime] = datetime.now,
) -> AsyncIterator[Client]:
    """A client at work; `policy` None leaves it without a policy file."""
    async with connected(fleet, path, key=key, max_retries=max_retries) as connection:
        folder = connection._folder
        file = path / "policy.toml"
        if policy is not None and not file.exists():
            file.write_text(policy.format(server_id=fleet.key.public.hex()), encoding="utf-8")
        worker = worker or FakeWorker()
        request = pb.LeaseRequest(wait_seconds=1.0, device="cpu")
        runtime = Runtime(
            connection, folder, PolicyFile(file), worker, request=request, backoff=at_once, now=now
        )
        work = Client(runtime, connection, folder, worker, asyncio.create_task(runtime.run()))
        try:
            yield work
        finally:
            await work.crash()

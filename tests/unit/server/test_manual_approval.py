"""A coordinator that lets nobody in by itself, a client that waits, and the administrator's hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli import call
from fedsim.client import connection as module
from fedsim.client.operator import Operator
from fedsim.client.operator_views import RemoteNode
from fedsim.connections import Connection
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server.coordinator import Coordinator
from fedsim.server.settings import load_settings
from fedsim.server.state import State
from fedsim.server.state_keys import ADMIN_KEY
from tests.small_clients import connected


def settings(folder: Path, **flags: Any) -> Any:  # Any: ServerSettings
    return load_settings(
        flags={
            "server.state": str(folder / "state"),
            "server.listen": "127.0.0.1:0",
            "server.http": "127.0.0.1:0",
            "server.insecure": True,
            "server.manual_approval": True,
            "limits.min_free_bytes": 0,
            **flags,
        }
    )


def invited(config: Any) -> str:
    """A token; the first opening of the state makes the administrator's key as well."""
    with State(config) as state:
        return state.nodes.invite(name="site-a")


class Door:
    """Where a coordinator is reached; stands for the service of `connected`."""

    def __init__(self, address: str, coordinator: Coordinator) -> None:
        self.address = address
        self.coordinator = coordinator


@asynccontextmanager
async def serving(config: Any) -> AsyncIterator[Any]:  # Any: Door, where a FakeFleet is expected
    """A coordinator that drains at the end of the block."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    one = Coordinator(config, on_serving=lambda address: ready.set_result(str(address)))
    process = asyncio.create_task(one.run())
    await asyncio.wait({process, ready}, return_when=asyncio.FIRST_COMPLETED)
    if process.done():
        process.result()
    yield Door(ready.result(), one)
    one.drain()
    await asyncio.wait_for(process, 180)


def clients(address: str, admin: str) -> list[RemoteNode]:
    """What the administrator is told of the clients."""
    with Operator(Connection(address, insecure=True), Key.load(Path(admin))) as operator:
        return [node for node in operator.nodes() if node.role == "client"]


def test_a_client_with_a_token_waits_until_node_approve_lets_it_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_APPROVAL_SECONDS", (0.02, 0.02))
    monkeypatch.setenv("FEDSIM_HOME", str(tmp_path / "home"))
    config = settings(tmp_path)
    token, admin = invited(config), str(tmp_path / "state" / ADMIN_KEY)

    async def scenario() -> None:
        async with serving(config) as door, connected(door, tmp_path / "client", token=token) as link:
            start = asyncio.create_task(link.start())
            while not (found := await asyncio.to_thread(clients, door.address, admin)):
                await asyncio.sleep(0.01)
            assert [(node.name, node.state, node.last_seen) for node in found] == [("site-a", "pending", 0.0)]
            assert not start.done()
            words = ["node", "approve", "site-a", "--connect", door.address, "--insecure", "--key", admin]
            assert await asyncio.to_thread(call, words) == 0
            assert "approved" in capsys.readouterr().out
            async with asyncio.timeout(120):
                await start
            reply = await link.lease(pb.LeaseRequest(device="cuda"))
            assert reply.reason == "idle"
            door.coordinator._fleet.look_after(1e9)  # as about once a second
            while True:
                (node,) = await asyncio.to_thread(clients, door.address, admin)
                if node.device and node.online:  # both are told together with others, a moment later
                    break
                await asyncio.sleep(0.01)
            assert (node.state, node.online, node.device) == ("approved", True, "cuda")
            assert node.last_seen > 0

    asyncio.run(asyncio.wait_for(scenario(), 180))


def test_without_manual_approval_a_token_is_enough(tmp_path: Path) -> None:
    config = settings(tmp_path, **{"server.manual_approval": False})
    token = invited(config)

    async def scenario() -> None:
        async with serving(config) as door, connected(door, tmp_path / "client", token=token) as link:
            await link.start()
            assert link.online

    asyncio.run(asyncio.wait_for(scenario(), 180))

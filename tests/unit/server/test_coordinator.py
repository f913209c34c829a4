"""The coordinator's process as a whole: opening, being healthy, letting in, and an orderly end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from fedsim.errors import EnvironmentProblem, FedsimError
from fedsim.identity import ENROL, LOGIN, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import FleetStub
from fedsim.server import coordinator as module
from fedsim.server.coordinator import Coordinator
from fedsim.server.health import SERVICES
from fedsim.server.settings import ServerSettings, load_settings
from fedsim.server.state import State, listening_file
from fedsim.transport import TICKET, open_channel
from fedsim.wire import MAJOR, MINOR
from tests.fleet_server import refused, retry_after

SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)


def settings(folder: Path, **flags: Any) -> ServerSettings:
    return load_settings(
        flags={
            "server.state": str(folder / "state"),
            "server.listen": "127.0.0.1:0",
            "server.http": "127.0.0.1:0",
            "server.insecure": True,
            "server.allow_anonymous": True,
            "limits.min_free_bytes": 0,
            **flags,
        }
    )


class Caller:
    """The other side of one coordinator."""

    def __init__(self, address: str, one: Coordinator) -> None:
        self.coordinator = one
        self.channel = open_channel(address, None, insecure=True)
        self.fleet: Any = FleetStub(self.channel)
        self.health: Any = HealthStub(self.channel)

    async def healthy(self, service: str = "") -> Any:
        reply = await self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
        return reply.status

    async def hello(self) -> pb.HelloReply:
        reply: pb.HelloReply = await self.fleet.Hello(pb.HelloRequest(major=MAJOR, minor=MINOR), timeout=60)
        return reply

    async def enrol(self, key: Key) -> pb.EnrolReply:
        greeting = await self.hello()
        body = pb.EnrolBody(server_id=greeting.server_id, nonce=greeting.nonce, public_key=key.public)
        reply: pb.EnrolReply = await self.fleet.Enrol(signed(key, ENROL, body), timeout=60)
        return reply

    async def login(self, key: Key, session: bytes = b"s" * 16) -> tuple[tuple[str, bytes], ...]:
        """Log in: the metadata for further calls."""
        greeting = await self.hello()
        body = pb.LoginBody(
            server_id=greeting.server_id, nonce=greeting.nonce, public_key=key.public, session=session
        )
        reply = await self.fleet.Login(signed(key, LOGIN, body), timeout=60)
        return ((TICKET, reply.ticket),)


def signed(key: Key, context: bytes, body: Any) -> pb.Signed:
    raw = body.SerializeToString()
    return pb.Signed(body=raw, signature=key.sign(context, raw))


def run(config: ServerSettings, scenario: Callable[[Caller], Awaitable[Any]]) -> Any:
    """Run a coordinator while the scenario lasts, then drain it."""

    async def lives() -> Any:
        serving: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        one = Coordinator(config, on_serving=lambda address: serving.set_result(str(address)))
        process = asyncio.create_task(one.run())
        await asyncio.wait({process, serving}, return_when=asyncio.FIRST_COMPLETED)
        if process.done():
            process.result()
        caller = Caller(serving.result(), one)
        try:
            return await asyncio.wait_for(scenario(caller), 180)
        finally:
            one.drain()
            await asyncio.wait_for(process, 180)
            await caller.channel.close()

    return asyncio.run(lives())


def test_a_node_enrols_logs_in_and_asks_for_work(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> Any:
        key = Key.new()
        enrolled = await caller.enrol(key)
        ticket = await caller.login(key)
        lease = await caller.fleet.Lease(pb.LeaseRequest(), metadata=ticket)
        file = json.loads(listening_file(caller.coordinator.settings.server.state).read_text())
        return (
            enrolled.node_id == key.node_id,
            lease.reason,
            [await caller.healthy(s) for s in SERVICES],
            file,
        )

    known, reason, health, file = run(settings(tmp_path), scenario)
    assert known
    assert reason == "idle"
    assert health == [SERVING] * 3
    assert file["pid"] == os.getpid()
    assert not listening_file(tmp_path / "state").exists()


def test_of_two_processes_with_one_key_the_newer_is_heard_and_the_older_is_told(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> tuple[Any, Any, grpc.aio.AioRpcError]:
        key = Key.new()
        await caller.enrol(key)
        older = await caller.login(key, b"1" * 16)
        before = await caller.fleet.Heartbeat(pb.HeartbeatRequest(), metadata=older)
        newer = await caller.login(key, b"2" * 16)
        error = await refused(caller.fleet.Heartbeat(pb.HeartbeatRequest(), metadata=older))
        return before, await caller.fleet.Heartbeat(pb.HeartbeatRequest(), metadata=newer), error

    before, after, error = run(settings(tmp_path), scenario)
    assert before == after == pb.HeartbeatReply()
    assert error.code() is StatusCode.FAILED_PRECONDITION
    assert error.details().startswith("superseded")


def test_a_login_that_is_sent_again_and_one_with_the_nonce_of_nobody_are_refused(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> list[StatusCode]:
        key = Key.new()
        await caller.enrol(key)
        greeting = await caller.hello()
        body = pb.LoginBody(
            server_id=greeting.server_id, nonce=greeting.nonce, public_key=key.public, session=b"s" * 16
        )
        request = signed(key, LOGIN, body)
        await caller.fleet.Login(request)
        again = await refused(caller.fleet.Login(request))
        body.nonce = bytes(len(body.nonce))
        made_up = await refused(caller.fleet.Login(signed(key, LOGIN, body)))
        return [again.code(), made_up.code()]

    assert run(settings(tmp_path), scenario) == [StatusCode.UNAUTHENTICATED] * 2


def test_a_key_and_its_ticket_are_known_after_a_restart(tmp_path: Path) -> None:
    key = Key.new()

    async def first(caller: Caller) -> Any:
        await caller.enrol(key)
        return await caller.login(key), (await caller.hello()).server_id

    async def second(caller: Caller) -> Any:
        await caller.fleet.Heartbeat(pb.HeartbeatRequest(), metadata=ticket)
        return (await caller.hello()).server_id

    ticket, server_id = run(settings(tmp_path), first)
    assert run(settings(tmp_path), second) == server_id


def test_a_drain_says_so_before_it_ends_and_lets_a_transfer_finish(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> Any:
        key = Key.new()
        await caller.enrol(key)
        ticket = await caller.login(key)
        waiting = asyncio.ensure_future(
            caller.fleet.Lease(pb.LeaseRequest(wait_seconds=20), metadata=ticket, timeout=60)
        )
        while not len(caller.coordinator._fleet.polls):
            await asyncio.sleep(0.01)
        caller.coordinator._fleet.running += 1  # a transfer
        caller.coordinator.drain()
        lease = await waiting
        while await caller.healthy() == SERVING:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        still = [await caller.healthy(service) for service in SERVICES]
        asked = await caller.fleet.Lease(pb.LeaseRequest(), metadata=ticket)
        caller.coordinator._fleet.running -= 1
        return lease, still, asked

    lease, still, asked = run(settings(tmp_path), scenario)
    assert lease.reason == asked.reason == "draining"
    assert asked.delay_seconds > 0
    assert still == [NOT_SERVING] * 3


def test_while_the_state_is_opened_calls_are_told_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def slow(config: ServerSettings) -> State:
        gate.wait(120)
        return State(config)

    monkeypatch.setattr(module, "State", slow)
    config = settings(tmp_path)

    async def scenario() -> Any:
        one = Coordinator(config)
        ports: list[Any] = []
        listen = one._listen

        async def listening(services: Any) -> Any:
            found = await listen(services)
            ports.append(found[1])
            return found

        one._listen = listening  # type: ignore[method-assign]
        process = asyncio.create_task(one.run())
        while not ports:
            await asyncio.sleep(0.01)
        caller = Caller(str(ports[0]), one)
        health = await caller.healthy()
        error = await refused(caller.hello())
        stream = await refused(caller.fleet.Fetch(pb.FetchRequest()).read())
        upload = await refused(caller.fleet.Upload(iter([pb.UploadFrame()])))
        gate.set()
        while await caller.healthy() != SERVING:
            await asyncio.sleep(0.01)
        hello = await caller.hello()
        one.drain()
        await asyncio.wait_for(process, 180)
        await caller.channel.close()
        return health, [error, stream, upload], hello

    health, errors, hello = asyncio.run(scenario())
    assert health == NOT_SERVING
    for error in errors:
        assert error.code() is StatusCode.UNAVAILABLE
        assert retry_after(error) > 0
    assert hello.major == MAJOR


def test_without_space_the_coordinator_is_not_healthy_until_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STORAGE_SECONDS", 0.02)
    problems = ["no space"]
    monkeypatch.setattr(State, "problem", lambda self: next(iter(problems), None))

    async def scenario(caller: Caller) -> tuple[Any, str | None]:
        while await caller.healthy("fedsim.v1.Fleet") == SERVING:
            await asyncio.sleep(0.01)
        reason = caller.coordinator._health.reason
        problems.clear()
        while await caller.healthy("fedsim.v1.Fleet") != SERVING:
            await asyncio.sleep(0.01)
        return reason, caller.coordinator._health.reason

    assert run(settings(tmp_path), scenario) == ("no space", None)


def test_a_state_folder_says_what_is_wrong_with_its_disk(tmp_path: Path) -> None:
    with State(settings(tmp_path)) as state:
        assert state.problem() is None
    with State(settings(tmp_path, **{"limits.min_free_bytes": 2**60})) as state:
        assert "min_free_bytes" in str(state.problem())


def test_a_second_coordinator_on_a_state_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> tuple[FedsimError, Any]:
        with pytest.raises(FedsimError) as found:
            await Coordinator(settings(tmp_path)).run()
        return found.value, await caller.healthy()

    error, health = run(settings(tmp_path), scenario)
    assert str(os.getpid()) in str(error)
    assert health == SERVING


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    async def scenario(caller: Caller) -> tuple[Any, str]:
        address = json.loads(listening_file(tmp_path / "state").read_text())["address"]
        with pytest.raises(EnvironmentProblem) as found:
            await Coordinator(settings(tmp_path / "other", **{"server.listen": address})).run()
        return found.value, address

    error, address = run(settings(tmp_path), scenario)
    assert error.code == "FS-SRV-001"
    assert address in error.what


SERVE = """
import asyncio, sys
from pathlib import Path
from fedsim.server import coordinator
from fedsim.server.settings import load_settings
flags = {"server.state": sys.argv[1], "server.listen": "127.0.0.1:0", "server.http": "127.0.0.1:0",
         "server.insecure": True, "limits.min_free_bytes": 0}
if len(sys.argv) > 2:
    coordinator._QUIET_LOOKS = 10**6
sys.exit(asyncio.run(coordinator.serve(load_settings(flags=flags))))
"""


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A coordinator in a process of its own that serves."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(folder), *words], stderr=subprocess.PIPE, text=True
    )
    while True:
        assert process.poll() is None, process.stderr and process.stderr.read()
        with suppress(FileNotFoundError):
            if json.loads(listening_file(folder).read_text())["pid"] == process.pid:
                return process
        time.sleep(0.05)


@pytest.mark.slow
def test_one_signal_ends_in_order_and_a_second_one_at_once(tmp_path: Path) -> None:
    orderly = started(tmp_path / "a")
    orderly.send_signal(signal.SIGHUP)
    orderly.send_signal(signal.SIGTERM)
    _, said = orderly.communicate(timeout=60)
    assert orderly.returncode == 0, said
    assert "Traceback" not in said

    stubborn = started(tmp_path / "b", "never quiet")
    stubborn.send_signal(signal.SIGTERM)
    assert stubborn.stderr is not None
    while "draining" not in stubborn.stderr.readline():  # two signals that wait for it would be one
        assert stubborn.poll() is None
    stubborn.send_signal(signal.SIGTERM)
    _, said = stubborn.communicate(timeout=60)
    assert stubborn.returncode == 130, said

    again = started(tmp_path / "b")
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    assert again.returncode == 0

"""A coordinator's service for operators on loopback: real gRPC, keys and database, made-up runs.

It serves in a thread of its own, since operators' code waits without ``await``.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from fedsim.client.operator import Operator
from fedsim.connections import Connection
from fedsim.errors import ConfigError
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import add_ControlServicer_to_server
from fedsim.server.audit import Audit
from fedsim.server.auth import Auth
from fedsim.server.control import ControlParts, ControlService
from fedsim.server.database import open_database
from fedsim.server.fleet import Fleet
from fedsim.server.fleet_parts import FleetParts
from fedsim.server.frames import add_fleet
from fedsim.server.health import OPENING, Health
from fedsim.server.nodes import Nodes
from fedsim.server.run_table import NoSuchRun
from fedsim.server.services import Services
from fedsim.server.settings import ServerSettings
from fedsim.server.telemetry import Telemetry
from fedsim.transport import server_options
from tests.fake_runs import FakeRuns

RUN_ID = "0123456789ab"


def record(number: int, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "round": number, "version": number, "outcome": "ok" if number else "start", "cohort": 3,
        "received": 3, "refused": 0, "late": 0, "lost": 0, "accuracy": 0.5 + number / 100, "loss": 1.0,
        "bytes_down": 1000, "bytes_up": 500, "clock_seconds": 1.0,
        "time": {"seconds": 0.5, "rss_mb": 100.0}, **more,
    }  # fmt: skip


@dataclass(eq=False)
class ScriptedRuns:
    """One run whose events a test writes; offers what `fedsim.server.runs.Runs` offers to operators."""

    path: Path
    state: str = "running"
    detail: str = ""
    submitted: list[tuple[str, str, str, str]] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)
    happened: list[pb.Event] = field(default_factory=list)
    on_events: Callable[[], None] = lambda: None

    def tell(self, type: str, **data: Any) -> None:
        """Something happened."""
        self.happened.append(
            pb.Event(
                revision=len(self.happened) + 1, run_id=RUN_ID, type=type, data=json.dumps(data), time=1.0
            )
        )
        self.on_events()

    def end(self, state: str = "ok", detail: str = "") -> None:
        """The run is over."""
        self.state, self.detail = state, detail
        self.tell("state", state=state, detail=detail)

    def submit(self, config: str, name: str, run_key: str, nodes: str) -> pb.Run:
        taken = [s for s in self.submitted if s[2] == run_key]
        if taken and taken[0] != (config, name, run_key, nodes):
            raise ConfigError("this run key belongs to another run", code="FS-SRV-052", hint="another key")
        if "[run" not in config:
            raise ConfigError("no table [run]", code="FS-CFG-131", where="[run]", hint="add it")
        self.submitted.append((config, name, run_key, nodes))
        return self.get(RUN_ID)

    def list(self) -> list[pb.Run]:
        return [self.get(RUN_ID)]

    def get(self, run: str) -> pb.Run:
        if run not in (RUN_ID, "digits"):
            raise NoSuchRun(f"no run is called {run!r}")
        return pb.Run(
            run_id=RUN_ID, name="digits", state=self.state, detail=self.detail, rounds_done=2, rounds=2,
            clients=3, online=3, record=json.dumps(record(2)), folder=self.path.name,
        )  # fmt: skip

    def pause(self, run: str) -> pb.Run:
        self.state = "paused"
        return self.get(run)

    def resume(self, run: str) -> pb.Run:
        self.state = "running"
        return self.get(run)

    def stop(self, run: str, now: bool) -> pb.Run:
        self.state = "stopped" if now else "stopping"
        return self.get(run)

    def events(self, run_id: str, after: int) -> list[pb.Event]:
        return [e for e in self.happened if e.revision > after]

    def folder(self, run: str) -> Path:
        self.get(run)
        return self.path

    def revoke(self, node_id: str) -> None:
        self.revoked.append(node_id)


@dataclass(eq=False)
class Desk:
    """A service that runs, and what it works with."""

    address: str
    runs: ScriptedRuns
    nodes: Nodes
    audit: Audit
    telemetry: Telemetry
    key: Key
    control: ControlService
    health: Health
    loop: asyncio.AbstractEventLoop
    online: set[str]
    drained: list[bool]
    forgotten: list[str]

    def token(self, role: str) -> str:
        """An invitation."""
        return self.nodes.invite(role)

    def bundle(self, path: Path, role: str = "operator") -> Path:
        """A bundle as `fedsim node invite` writes it."""
        server_id, token = self.key.public.hex(), self.token(role)
        path.write_text(f'server = "{self.address}"\nserver_id = "{server_id}"\nca = ""\ntoken = "{token}"\n')
        return path

    def known(self, role: str) -> Key:
        """A key that may log in with this role."""
        from fedsim.server.enrolment import Applicant

        key = Key.new()
        applicant = Applicant(key.public, self.token(role), "", {})
        self.nodes.enrol(applicant, anonymous=False, state="approved", check=lambda node_id, name: None)
        return key

    def connection(self, **fields: Any) -> Connection:
        """How an operator reaches it."""
        return Connection(self.address, insecure=True, **{"server_id": self.key.public, **fields})

    def operator(self, role: str = "admin", *, patience: float = 5.0, **fields: Any) -> Operator:
        """Somebody who may log in."""
        return Operator(self.connection(**fields), self.known(role), patience=patience)

    def on_loop(self, work: Any) -> Any:
        """Run a coroutine where the service runs."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)


@contextmanager
def control_desk(folder: Path) -> Iterator[Desk]:
    """Serve until the block ends.

    Args:
        folder: for state and the run's folder.
    """
    ready: threading.Event = threading.Event()
    made: list[Desk] = []
    failed: list[BaseException] = []
    closing = asyncio.Event()
    loop = asyncio.new_event_loop()

    def work() -> None:
        try:
            loop.run_until_complete(_serve(folder, loop, made, ready, closing))
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=work, name="control-desk")
    thread.start()
    ready.wait(30)
    try:
        if failed:
            raise failed[0]
        yield made[0]
    finally:
        loop.call_soon_threadsafe(closing.set)
        thread.join(30)
        loop.close()
    if failed:
        raise failed[0]


async def _serve(
    folder: Path,
    loop: asyncio.AbstractEventLoop,
    made: list[Desk],
    ready: threading.Event,
    closing: asyncio.Event,
) -> None:
    state = folder / "state"
    database = open_database("sqlite", state)
    audit = Audit(state / "audit.jsonl")
    nodes = Nodes(database, audit)
    key = Key.new()
    auth = Auth(database, audit, nodes, key, lease_seconds=90, heartbeat_seconds=20)
    path = folder / "2025-01-31T14-05_digits_7f3a"
    path.mkdir()
    runs = ScriptedRuns(path)
    telemetry, health = Telemetry(), Health()
    pool = ThreadPoolExecutor(4, "work")
    fake: Any = FakeRuns(key)
    nothing: Any = None
    fleet = Fleet(
        FleetParts(
            auth=auth,
            runs=fake,
            uploads=nothing,
            objects=nothing,
            key=key,
            settings=ServerSettings(),
            telemetry=telemetry,
            work=pool,
            disk=pool,
        )  # fmt: skip
    )
    online: set[str] = set()
    drained: list[bool] = []
    forgotten: list[str] = []
    scripted: Any = runs
    control = ControlService(
        ControlParts(
            auth=auth,
            nodes=nodes,
            runs=scripted,
            audit=audit,
            telemetry=telemetry,
            server_id=key.public,
            work=pool,
            online=lambda: frozenset(online),
            drain=lambda: drained.append(True),
            revoked=forgotten.append,
            incarnation=3,
            chunk_bytes=64 * 1024,
        )  # fmt: skip
    )
    server = grpc.aio.server(options=server_options())
    services = Services()
    add_fleet(fleet, services)
    server.add_generic_rpc_handlers((services,))
    add_ControlServicer_to_server(control, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await health.fit(OPENING)
    made.append(
        Desk(
            f"127.0.0.1:{port}",
            runs,
            nodes,
            audit,
            telemetry,
            key,
            control,
            health,
            loop,
            online,
            drained,
            forgotten,
        )  # fmt: skip
    )
    ready.set()
    await closing.wait()
    control.close()
    await server.stop(0)
    fleet.presence.close()
    pool.shutdown()
    database.close()
    audit.close()

"""Nodes that send whatever a test wants, to a real coordinator with real runs and honest nodes beside them.

`Site` is a whole coordinator in a thread of this process: state folder, ledger, runs, gRPC on loopback.
`RawNode` speaks its protocol by hand, one blocking call at a time, and can therefore say anything. What an
honest node answers depends on its name and the round alone, so that runs with and without somebody hostile
can be compared by the SHA-256 of their final models.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import tomli_w
import torch
from grpc import StatusCode

from fedsim.bundle import DTYPES, encode
from fedsim.client.operator import Operator
from fedsim.client.operator_views import RemoteRun
from fedsim.config import config_from, to_toml
from fedsim.connections import Connection
from fedsim.identity import ENROL, LOGIN, SUBMIT, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import ControlStub, FleetStub
from fedsim.server.coordinator import Coordinator
from fedsim.server.settings import load_settings
from fedsim.server.state_keys import ADMIN_KEY
from fedsim.storage import sha256
from fedsim.transport import TICKET, client_options
from fedsim.wire import MAJOR, MINOR
from tests.processes import start

SECONDS = 60.0
"""For anything that must happen; a machine with other work on it is no failure."""
CHUNK = 64 * 1024
PATIENT = {
    "limits.min_free_bytes": 0, "limits.inline_bytes": CHUNK, "limits.chunk_bytes": CHUNK,
    "leases.seconds": 3_600, "leases.heartbeat_seconds": 600,
}  # fmt: skip
"""Settings: small chunks, and nobody is given up for being silent while a test looks elsewhere."""


def values(rounds: int = 1, *, clients: int = 3, hidden: int = 4, **tables: Any) -> dict[str, Any]:
    """A run of `clients` in which everybody is asked in every round and one answer is enough.

    Args:
        hidden: width of the model; 4 is about 1 kB, above 2,000 an update is uploaded in chunks.
        tables: more keys of the configuration, by table.
    """
    found: dict[str, Any] = {
        "run": {"seed": 5, "rounds": rounds},
        "data": {
            "name": "synthetic", "clients": clients, "features": 6, "classes": 3, "examples": 12,
            "partition": {"kind": "iid", "clients": clients},
        },
        "model": {"name": "mlp", "hidden": [hidden]},
        "client": {"steps": 1, "batch_size": 4, "lr": 0.1},
        "round": {"sample": clients, "quorum": 1},
        "engine": {"name": "loop"},
        "evaluation": {"central": False, "clients": "never"},
        "output": {"report": False, "plots": False, "checkpoint_every": 0},
        "deployment": {"min_clients": clients},
    }  # fmt: skip
    for name, table in tables.items():
        found[name] = {**found.get(name, {}), **table}
    return found


def object_of(content: bytes) -> pb.Object:
    """How the wire names these bytes."""
    return pb.Object(digest=hashlib.sha256(content).digest(), size=len(content))


def tensors_for(task: pb.Task, value: float) -> dict[str, torch.Tensor]:
    """An answer of the right form, `value` everywhere."""
    return {s.name: torch.full(list(s.shape), value, dtype=DTYPES[s.dtype]) for s in task.update}


def honest_update(task: pb.Task, name: str) -> bytes:
    """The bundle of an honest node: a small dyadic number, so that sums do not depend on their order."""
    return encode(tensors_for(task, (1 + sum(name.encode()) % 7 + task.round_index) / 1024))


def few(cases: Iterable[str], *chosen: str) -> list[Any]:
    """Parameters of a test (Any: of pytest): those that were not chosen are slow, as there are many."""
    marks = pytest.mark.slow
    return [name if name in chosen else pytest.param(name, marks=marks) for name in cases]


class Denial(NamedTuple):
    """How a call was refused."""

    code: StatusCode
    text: str
    metadata: Mapping[str, Any]


def denied(call: Callable[..., Any], *arguments: Any, **named: Any) -> Denial:
    """Make a call that must be refused."""
    try:
        found = call(*arguments, **named)
    except grpc.RpcError as error:
        trailing: Any = error.trailing_metadata() or ()
        return Denial(error.code(), error.details() or "", dict(trailing))
    raise AssertionError(f"the call was answered: {found}")


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until `condition` holds; what it returned."""
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, f"in {SECONDS:g} s: not {what}"
        time.sleep(0.005)
    return found


class RawNode:
    """Somebody with a key and a connection of its own; nothing here happens by itself.

    Args:
        address: of the coordinator.
        name: that it asks for when it enrols.
        options: of its channel, on top of a client's.
    """

    def __init__(
        self, address: str, name: str = "", *, key: Key | None = None, options: Sequence[tuple[str, int]] = ()
    ) -> None:
        self.name, self.key = name, key or Key.new()
        # Nothing on this side may stop what the other side has to refuse.
        unbounded = {"grpc.max_send_message_length": -1, "grpc.max_metadata_size": 1 << 30,
                     "grpc.absolute_max_metadata_size": 1 << 30}  # fmt: skip
        chosen = {**dict(client_options(proxy=False)), **unbounded, **dict(options)}
        self.channel = grpc.insecure_channel(address, list(chosen.items()))
        self.stub: Any = FleetStub(self.channel)  # type: ignore[no-untyped-call]
        self.control: Any = ControlStub(self.channel)  # type: ignore[no-untyped-call]
        self.server_id = b""
        self.metadata: tuple[tuple[str, Any], ...] = ()

    @property
    def node_id(self) -> str:
        return self.key.node_id

    def close(self) -> None:
        self.channel.close()

    # ------------------------------------------------------------ being let in

    def hello(self) -> pb.HelloReply:
        """A nonce, and who the coordinator is."""
        reply: pb.HelloReply = self.stub.Hello(pb.HelloRequest(major=MAJOR, minor=MINOR), timeout=SECONDS)
        self.server_id = reply.server_id
        return reply

    def signed(self, context: bytes, body: Any, *, key: Key | None = None) -> pb.Signed:
        """A message of protobuf with a signature, by this node unless `key` is another's."""
        raw = body.SerializeToString()
        return pb.Signed(body=raw, signature=(key or self.key).sign(context, raw))

    def enrol_body(self, token: str = "", **fields: Any) -> pb.EnrolBody:
        """What this node says to be enrolled."""
        greeting = self.hello()
        return pb.EnrolBody(
            **{
                "server_id": greeting.server_id, "nonce": greeting.nonce, "public_key": self.key.public,
                "token": token, "name": self.name, **fields,
            }
        )  # fmt: skip

    def login_body(self, **fields: Any) -> pb.LoginBody:
        """What this node says to log in."""
        greeting = self.hello()
        return pb.LoginBody(
            **{
                "server_id": greeting.server_id, "nonce": greeting.nonce, "public_key": self.key.public,
                "session": os.urandom(16), **fields,
            }
        )  # fmt: skip

    def enrol(self, token: str = "", **fields: Any) -> pb.EnrolReply:
        """Enrol with an invitation."""
        reply: pb.EnrolReply = self.stub.Enrol(
            self.signed(ENROL, self.enrol_body(token, **fields)), timeout=SECONDS
        )
        return reply

    def log_in(self, **fields: Any) -> pb.LoginReply:
        """Begin a session; its ticket goes with every further call."""
        reply: pb.LoginReply = self.stub.Login(self.signed(LOGIN, self.login_body(**fields)), timeout=SECONDS)
        self.metadata = ((TICKET, reply.ticket),)
        self.call("Heartbeat", pb.HeartbeatRequest())  # a client that was never heard of is not asked
        return reply

    # ------------------------------------------------------------ work

    def call(self, method: str, request: Any, *, seconds: float = SECONDS) -> Any:
        """One call of the service for nodes, with the ticket."""
        return getattr(self.stub, method)(request, metadata=self.metadata, timeout=seconds)

    def lease(self) -> tuple[pb.Task, pb.Offer]:
        """The task that this node should do; waits until there is one."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            reply = self.call("Lease", pb.LeaseRequest(wait_seconds=5.0), seconds=30.0)
            if reply.HasField("offer"):
                return pb.Task.FromString(reply.offer.body), reply.offer
        raise AssertionError(f"no task for {self.name} in {SECONDS:g} s")

    def body(self, task: pb.Task, content: bytes, **fields: Any) -> pb.SubmitBody:
        """What this node says of an answer; `fields` replace those of an honest one."""
        return pb.SubmitBody(
            **{
                "server_id": self.server_id, "run_id": task.run_id, "task_id": task.task_id,
                "attempt": task.attempt, "key": os.urandom(16), "update": object_of(content), "examples": 8,
                "local_steps": 1, "normaliser": 0.1, "train_seconds": 0.01, **fields,
            }
        )  # fmt: skip

    def request(self, body: pb.SubmitBody, content: bytes = b"") -> pb.SubmitRequest:
        """The submission, signed."""
        raw = body.SerializeToString()
        return pb.SubmitRequest(body=raw, signature=self.key.sign(SUBMIT, raw), update=content)

    def submit(self, task: pb.Task, content: bytes, **fields: Any) -> pb.SubmitReply:
        """Hand an answer in, by way of an upload where it is large; again while the round is closing."""
        upload_id = b""
        if len(content) > CHUNK:
            upload_id = os.urandom(16)
            self.upload(frames(task, content, upload_id=upload_id))
        body = self.body(task, content, **{"upload_id": upload_id, **fields})
        request = self.request(body, b"" if body.upload_id else content)
        while True:
            reply: pb.SubmitReply = self.call("Submit", request)
            if reply.verdict != pb.RETRY:
                return reply
            time.sleep(reply.delay_seconds)

    def upload(self, sent: Iterable[pb.UploadFrame]) -> pb.UploadStatusReply:
        """Stream these frames up."""
        reply: pb.UploadStatusReply = self.stub.Upload(iter(sent), metadata=self.metadata, timeout=SECONDS)
        return reply

    def fetch(self, digest: bytes, **fields: Any) -> bytes:
        """Download an object."""
        request = pb.FetchRequest(digest=digest, **fields)
        return b"".join(c.data for c in self.stub.Fetch(request, metadata=self.metadata, timeout=SECONDS))

    def answer(self) -> pb.SubmitReply:
        """Do the next task as an honest node does."""
        task, _ = self.lease()
        reply = self.submit(task, honest_update(task, self.name))
        assert reply.verdict == pb.ACCEPTED, reply
        return reply

    def give_up(self) -> None:
        """Say of the next task that it came to nothing: the run goes on without this node."""
        task, _ = self.lease()
        self.call("Fail", pb.FailRequest(task_id=task.task_id, attempt=task.attempt, code="exception"))


def frames(
    task: pb.Task, content: bytes, *, upload_id: bytes, generation: int = 1, size: int = CHUNK
) -> Iterator[pb.UploadFrame]:
    """The frames of an honest upload."""
    yield begin(task, content, upload_id=upload_id, generation=generation)
    for at in range(0, len(content), size):
        yield piece(at, content[at : at + size])


def begin(
    task: pb.Task, content: bytes, *, upload_id: bytes, generation: int = 1, **fields: Any
) -> pb.UploadFrame:
    """The first frame of an upload."""
    start = {
        "upload_id": upload_id, "generation": generation, "task_id": task.task_id,
        "object": object_of(content), **fields,
    }  # fmt: skip
    return pb.UploadFrame(start=pb.UploadStart(**start))


def piece(offset: int, data: bytes, *, crc32: int | None = None) -> pb.UploadFrame:
    """One chunk."""
    crc = zlib.crc32(data) if crc32 is None else crc32
    return pb.UploadFrame(chunk=pb.Chunk(offset=offset, data=data, crc32=crc))


class Run:
    """One run of a site."""

    def __init__(self, site: Place, run_id: str) -> None:
        self.site, self.run_id = site, run_id
        self.path = site.state / "runs" / site.operator.get(run_id).folder

    def end(self) -> RemoteRun:
        """Wait until it is over, with success."""
        found: RemoteRun = until(lambda: (run := self.site.operator.get(self.run_id)).over and run, "over")
        assert found.state == "ok", (found.state, found.detail)
        return found

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file of its folder."""
        return [json.loads(line) for line in (self.path / name).read_text().splitlines()]

    @property
    def digest(self) -> str:
        """SHA-256 of the final model."""
        return sha256(self.path / "checkpoints" / "final.safetensors")


class Place:
    """A coordinator, wherever it runs, and those who deal with it.

    Args:
        state: its folder.
    """

    state: Path
    address: str

    def _enter(self) -> None:
        """It serves now."""
        self.nodes: list[RawNode] = []
        key = Key.load(self.state / ADMIN_KEY)
        self.operator = Operator(Connection(self.address, insecure=True), key, patience=SECONDS)

    def _leave(self) -> None:
        for node in self.nodes:
            node.close()
        self.operator.close()

    def stranger(self, name: str = "", **more: Any) -> RawNode:
        """Somebody whom the coordinator does not know."""
        node = RawNode(self.address, name, **more)
        self.nodes.append(node)
        return node

    def node(self, name: str, *, role: str = "client", labels: Mapping[str, str] | None = None) -> RawNode:
        """Somebody who was invited, has enrolled and is logged in."""
        node = self.stranger(name)
        node.enrol(self.operator.invite(role, labels=labels).token)
        node.log_in()
        return node

    def fleet(self, *names: str, group: str) -> list[RawNode]:
        """Nodes that runs of this `group` alone are for; the run's selection is ``group = …``."""
        return [self.node(name, labels={"group": group}) for name in names]

    def submit(self, wanted: Mapping[str, Any], *, group: str) -> Run:
        """Start a run for one group of nodes."""
        text = to_toml(config_from(dict(wanted), {}))
        return Run(self, self.operator.submit(text, nodes=f"group = {group}").run_id)

    def metric(self, start: str) -> float:
        """The sum of the numbers of /metrics whose lines begin so."""
        http = json.loads((self.state / "listening.json").read_text())["http"]
        with urllib.request.urlopen(f"http://{http}/metrics", timeout=SECONDS) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))

    @property
    def audit(self) -> list[dict[str, Any]]:
        """The lines of the audit log."""
        return [json.loads(line) for line in (self.state / "audit.jsonl").read_text().splitlines()]


class Site(Place):
    """A coordinator in a thread of this process; `close` in every case.

    Args:
        folder: for its state.
        flags: settings such as ``{"limits.uploads": 2}``.
    """

    def __init__(self, folder: Path, flags: Mapping[str, Any] | None = None) -> None:
        self.state = folder / "state"
        self.settings = load_settings(
            flags={
                "server.state": str(self.state), "server.listen": "127.0.0.1:0", "server.http": "127.0.0.1:0",
                "server.insecure": True, **PATIENT, **(flags or {}),
            }
        )  # fmt: skip
        self._serving: Future[str] = Future()
        self._thread = threading.Thread(target=self._live, name="coordinator", daemon=True)
        self._thread.start()
        self.address = self._serving.result(SECONDS)
        self._enter()

    def _live(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self.coordinator = Coordinator(
                self.settings, grace_seconds=2.0, on_serving=lambda a: self._serving.set_result(str(a))
            )
            await self.coordinator.run()

        try:
            asyncio.run(serve())
        except BaseException as error:
            if not self._serving.done():
                self._serving.set_exception(error)
            raise

    def close(self) -> None:
        """Hang up and end the coordinator in good order."""
        self._leave()
        self._loop.call_soon_threadsafe(self.coordinator.drain)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the coordinator does not end"


class Child(Place):
    """A coordinator in a process of its own, whose memory can be looked at; `close` in every case.

    Args:
        folder: for its state and its log.
    """

    def __init__(self, folder: Path, flags: Mapping[str, Any] | None = None) -> None:
        self.state, self.log = folder / "state", folder / "log"
        tables: dict[str, dict[str, Any]] = {}
        own = {
            "server.state": str(self.state), "server.listen": "127.0.0.1:0", "server.http": "127.0.0.1:0",
            "server.insecure": True, "server.log_format": "json", **PATIENT, **(flags or {}),
        }  # fmt: skip
        for key, value in own.items():
            table, _, name = key.partition(".")
            tables.setdefault(table, {})[name] = value
        config = folder / "server.toml"
        config.write_text(tomli_w.dumps(tables))
        with self.log.open("wb") as out:
            self.process = start(
                folder, "server", "--config", str(config), stdout=out, stderr=out, text=False,
                environ={"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        found = until(self._listening, "a coordinator that listens")
        self.address = found["address"]
        self._enter()

    def _listening(self) -> dict[str, Any] | None:
        assert self.process.poll() is None, self.log.read_text()
        try:
            found: dict[str, Any] = json.loads((self.state / "listening.json").read_text())
        except (OSError, ValueError):
            return None
        return found

    def memory(self, line: str) -> int:
        """Bytes, of /proc/PID/status: VmRSS now, VmHWM at most so far, VmData and VmSize promised."""
        for text in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if text.startswith(f"{line}:"):
                return 1024 * int(text.split()[1])
        raise AssertionError(f"no {line}")

    def close(self) -> None:
        """Hang up and end the process."""
        self._leave()
        self.process.terminate()
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def site(folder: Path, flags: Mapping[str, Any] | None = None) -> Iterator[Site]:
    """A coordinator that is ended with the block."""
    found = Site(folder, flags)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def child(folder: Path, flags: Mapping[str, Any] | None = None) -> Iterator[Child]:
    """The same in a process of its own."""
    found = Child(folder, flags)
    try:
        yield found
    finally:
        found.close()

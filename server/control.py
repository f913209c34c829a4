"""The service that operators call: `fedsim.v1.Control` on grpc.aio.

Operators log in as nodes do, with a key of their own, and every call is checked against the role of that
key: a viewer reads, an operator starts and stops runs, an admin decides who takes part. What needs the
database or the disk runs in threads; what changes something is written to the audit log, whoever did it.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from grpc import StatusCode

from fedsim import __version__
from fedsim.errors import FedsimError
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import ControlServicer
from fedsim.printable import printable
from fedsim.runs.folder import LOG
from fedsim.server.artifacts import lines_from, open_artifact
from fedsim.server.calls import Refused, answered
from fedsim.server.control_checks import check_submission, node_name, node_of, run_name, told_to_operator
from fedsim.server.logs import fields
from fedsim.server.nodes import TOKEN_SECONDS
from fedsim.server.watch import OVER, Watchers
from fedsim.wire import MAJOR, MINOR

if TYPE_CHECKING:
    from fedsim.server.audit import Audit
    from fedsim.server.auth import Auth, Peer
    from fedsim.server.nodes import Nodes
    from fedsim.server.runs import Runs
    from fedsim.server.telemetry import Telemetry

P = ParamSpec("P")
T = TypeVar("T")

VIEWER, OPERATOR, ADMIN = "viewer", "operator", "admin"
ROLES = (VIEWER, OPERATOR, ADMIN)
"""Each may do what the ones before it may."""
_LONGEST_LINE = 16 * 1024
_LINES = 500
_LOOK_SECONDS = 0.5
_SLOW_SECONDS = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControlParts:
    """What the service works with.

    Args:
        server_id: public key of the server.
        work: threads that may wait for disk and database.
        online: the nodes that are there now; called on the loop.
        drain: begin to shut down; called on the loop.
        revoked: forget a node's leases and parked calls; called on the loop with its id.
        incarnation: grows when a backup is restored.
        chunk_bytes: payload of one message of an artifact.
    """

    auth: Auth
    nodes: Nodes
    runs: Runs
    audit: Audit
    telemetry: Telemetry
    server_id: bytes
    work: Executor
    online: Callable[[], frozenset[str]]
    drain: Callable[[], None]
    revoked: Callable[[str], None]
    incarnation: int = 0
    chunk_bytes: int = 1024 * 1024


class ControlService(ControlServicer):
    """The servicer; create it on the event loop that serves it."""

    def __init__(self, parts: ControlParts) -> None:
        self._parts = parts
        self.watchers = Watchers(parts.runs, parts.telemetry, parts.work)
        parts.runs.on_events = self.watchers.wake_soon

    def close(self) -> None:
        """End what streams; the calls that are left answer UNAVAILABLE."""
        self.watchers.close()

    # ------------------------------------------------------------ runs

    @answered
    async def SubmitRun(self, request: pb.SubmitRunRequest, context: Any) -> pb.Run:
        peer = self._peer(context, OPERATOR)
        check_submission(request)
        run = await self._thread(
            self._parts.runs.submit, request.config, request.name, request.run_key, request.nodes
        )
        await self._audit(peer, "run_submitted", run=run.run_id, name=run.name)
        return run

    @answered
    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsReply:
        self._peer(context, VIEWER)
        return pb.ListRunsReply(runs=await self._thread(self._parts.runs.list))

    @answered
    async def GetRun(self, request: pb.RunRequest, context: Any) -> pb.Run:
        self._peer(context, VIEWER)
        return await self._run(request.run_id)

    @answered
    async def PauseRun(self, request: pb.RunRequest, context: Any) -> pb.Run:
        peer = self._peer(context, OPERATOR)
        run = await self._thread(self._parts.runs.pause, run_name(request.run_id))
        await self._audit(peer, "run_paused", run=run.run_id)
        return run

    @answered
    async def ResumeRun(self, request: pb.RunRequest, context: Any) -> pb.Run:
        peer = self._peer(context, OPERATOR)
        run = await self._thread(self._parts.runs.resume, run_name(request.run_id))
        await self._audit(peer, "run_resumed", run=run.run_id)
        return run

    @answered
    async def StopRun(self, request: pb.StopRequest, context: Any) -> pb.Run:
        peer = self._peer(context, OPERATOR)
        run = await self._thread(self._parts.runs.stop, run_name(request.run_id), request.now)
        await self._audit(peer, "run_stopped", run=run.run_id, now=request.now)
        return run

    @answered
    async def WatchRun(self, request: pb.WatchRequest, context: Any) -> None:
        self._peer(context, VIEWER)
        run = await self._run(request.run_id)
        await self.watchers.watch(run.run_id, request.after_revision, context)

    @answered
    async def GetArtifact(self, request: pb.ArtifactRequest, context: Any) -> None:
        self._peer(context, VIEWER)
        folder = await self._thread(self._parts.runs.folder, run_name(request.run_id))
        file, size = await self._thread(open_artifact, folder, request.name)
        try:
            if request.offset > size:
                text = f"offset {request.offset} is behind the end of {size} bytes"
                raise Refused(StatusCode.OUT_OF_RANGE, text)
            await self._thread(file.seek, request.offset)
            at = request.offset
            while at < size:
                data = await self._thread(file.read, min(self._parts.chunk_bytes, size - at))
                if not data:
                    raise Refused(StatusCode.ABORTED, "the file became shorter; fetch it again")
                await self._send(context, pb.Chunk(offset=at, data=data, crc32=zlib.crc32(data)))
                at += len(data)
        finally:
            file.close()

    @answered
    async def GetLogs(self, request: pb.LogsRequest, context: Any) -> None:
        self._peer(context, VIEWER)
        run = await self._run(request.run_id)
        path = (await self._thread(self._parts.runs.folder, run.run_id)) / LOG
        offset = 0
        while True:
            over = not request.follow or (await self._run(run.run_id)).state in OVER
            found = await self._thread(lines_from, path, offset, longest=_LONGEST_LINE, most=_LINES)
            for line, behind in found:
                await self._send(context, pb.LogLine(line=printable(line, longest=_LONGEST_LINE)))
                offset = behind
            if not found and over:
                return
            if not found:
                await asyncio.sleep(_LOOK_SECONDS)

    # ------------------------------------------------------------ nodes

    @answered
    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesReply:
        self._peer(context, VIEWER)
        known = await self._thread(self._parts.nodes.list)
        online = self._parts.online()
        return pb.ListNodesReply(nodes=[node_of(node, online) for node in known])

    @answered
    async def ApproveNode(self, request: pb.NodeRequest, context: Any) -> pb.Node:
        peer = self._peer(context, ADMIN)
        node = await self._thread(self._parts.nodes.approve, node_name(request.node), by=peer.node_id)
        return node_of(node, self._parts.online())

    @answered
    async def RevokeNode(self, request: pb.NodeRequest, context: Any) -> pb.Node:
        peer = self._peer(context, ADMIN)
        # Its tickets are gone when this returns; then what is there of it goes.
        node = await self._thread(self._parts.nodes.revoke, node_name(request.node), by=peer.node_id)
        self._parts.revoked(node.node_id)
        await self._thread(self._parts.runs.revoke, node.node_id)
        return node_of(node, self._parts.online())

    @answered
    async def LabelNode(self, request: pb.LabelRequest, context: Any) -> pb.Node:
        peer = self._peer(context, ADMIN)
        labels, remove = dict(request.set), list(request.remove)
        name = node_name(request.node)
        node = await self._thread(self._parts.nodes.label, name, labels, remove, by=peer.node_id)
        return node_of(node, self._parts.online())

    @answered
    async def CreateEnrolToken(self, request: pb.TokenRequest, context: Any) -> pb.TokenReply:
        peer = self._peer(context, ADMIN)
        role, seconds = request.role or "client", request.valid_seconds or TOKEN_SECONDS
        labels = dict(request.labels)
        token = await self._thread(
            self._parts.nodes.invite, role, seconds, labels, request.name, by=peer.node_id
        )
        return pb.TokenReply(token=token, valid_seconds=seconds, server_id=self._parts.server_id)

    # ------------------------------------------------------------ the coordinator itself

    @answered
    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainReply:
        peer = self._peer(context, ADMIN)
        await self._audit(peer, "drain")
        log.info("an operator asked for a drain", extra=fields(node=peer.node_id))
        self._parts.drain()
        return pb.DrainReply()

    @answered
    async def Version(self, request: pb.VersionRequest, context: Any) -> pb.VersionReply:
        self._peer(context, VIEWER)
        return pb.VersionReply(
            build=__version__, major=MAJOR, minor=MINOR, incarnation=self._parts.incarnation
        )

    # ------------------------------------------------------------ help

    def _peer(self, context: Any, least: str) -> Peer:
        """Who calls, if its role allows this call; a role that is unknown allows nothing."""
        peer = self._parts.auth.peer(context.invocation_metadata())
        if peer.role not in ROLES or ROLES.index(peer.role) < ROLES.index(least):
            text = f"this call needs the role {least}, this key has the role {peer.role}"
            raise Refused(StatusCode.PERMISSION_DENIED, text)
        return peer

    async def _run(self, name: str) -> pb.Run:
        return await self._thread(self._parts.runs.get, run_name(name))

    async def _thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._parts.work, lambda: function(*args, **kwargs))
        except FedsimError as error:
            told = told_to_operator(error)
            if told is None:
                raise
            raise told from error

    async def _audit(self, peer: Peer, action: str, **fields: object) -> None:
        await self._thread(lambda: self._parts.audit.write(action, by=peer.node_id, **fields))

    async def _send(self, context: Any, message: pb.Chunk | pb.LogLine) -> None:
        try:
            async with asyncio.timeout(_SLOW_SECONDS):
                await context.write(message)
        except TimeoutError:
            text = f"nothing was read for {_SLOW_SECONDS:g} s; ask again from your offset"
            raise Refused(StatusCode.DEADLINE_EXCEEDED, text) from None

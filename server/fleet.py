"""The service that nodes call: `fedsim.v1.Fleet` on grpc.aio.

Nodes open every connection and every call. `Lease` is a long poll, `Fetch` and `Upload` are streams, the
rest answers at once. All of it runs on one event loop; what blocks (disk, validation of big updates,
logging in) runs in threads. An update counts only when `Submit` has said so, and it says so after the
ledger is on disk.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import unquote

from grpc import StatusCode

from fedsim import __version__
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import FleetServicer
from fedsim.printable import printable
from fedsim.server.auth import certificate_names
from fedsim.server.calls import Refused, answered, refuse
from fedsim.server.completions import Completions
from fedsim.server.leases import Leases
from fedsim.server.logs import fields, task_fields
from fedsim.server.polls import Polls
from fedsim.server.presence import Presence
from fedsim.server.sightings import Sightings
from fedsim.server.slots import Slots
from fedsim.server.streams import NOT_LEASED, Streams
from fedsim.server.submissions import Submissions
from fedsim.wire import MAJOR, MINOR

if TYPE_CHECKING:
    from fedsim.server.auth import Peer
    from fedsim.server.board import OpenTask
    from fedsim.server.fleet_parts import FleetParts

R = TypeVar("R")
Q = TypeVar("Q")

log = logging.getLogger(__name__)

CAPABILITIES = ("inline", "resume")
FAILURES = frozenset({"oom", "cuda_oom", "data", "policy_refused", "exception", "cancelled", "timeout"})
CLIENT = "client"
DRAINING, IDLE, BUSY = "draining", "idle", "busy"
_MOST_HELD = 64
_MOST_TEXT = 2_000
_LONGEST_SAID = 500  # of it in the log
_DRAIN_DELAY_SECONDS = 5.0


def counted(
    method: Callable[[Fleet, Q, Any], Awaitable[R]],
) -> Callable[[Fleet, Q, Any], Awaitable[R]]:
    """A method that takes one of the places for calls which do something."""

    inner = answered(method)

    @functools.wraps(method)
    async def call(self: Fleet, request: Q, context: Any) -> R:
        # Parked polls have room of their own.
        if self.running - len(self.polls) >= self.limits.concurrent_rpcs:
            text = f"{self.limits.concurrent_rpcs} calls are under way"
            too_many = Refused(StatusCode.RESOURCE_EXHAUSTED, text, retry_seconds=self.polls.delay())
            await refuse(too_many, context, method.__name__)
        self.running += 1
        try:
            return await inner(self, request, context)
        finally:
            self.running -= 1

    return call


class Fleet(FleetServicer):
    """The servicer; made inside the event loop that serves it.

    Args:
        parts: what it works with, see `FleetParts`.
    """

    def __init__(self, parts: FleetParts) -> None:
        self._parts = parts
        self._auth, self._runs, self._key = parts.auth, parts.runs, parts.key
        self._loop = asyncio.get_running_loop()
        self.limits, leases = parts.settings.limits, parts.settings.leases
        self.draining = False
        self.running = 0  # calls in hand, parked ones among them
        self.polls = Polls(self.limits.parked_polls, parts.runs.offer)
        self.leases = Leases(leases.seconds, leases.max_task_seconds, grace_seconds=leases.grace_seconds)
        self.presence = Presence(leases.heartbeat_seconds, parts.runs.set_online)
        self.streams = Streams(
            parts.runs,
            parts.uploads,
            parts.disk,
            slots=Slots(self.limits.uploads_per_node, self.limits.uploads, idle_seconds=parts.idle_seconds),
            telemetry=parts.telemetry,
            chunk_bytes=self.limits.chunk_bytes,
            idle_seconds=parts.idle_seconds,
        )
        self._sightings = Sightings(parts.seen)
        self._completions = Completions()
        self.submissions = Submissions(parts, self._completions)
        parts.runs.on_offers = self.polls.wake_soon

    # What a node does to be let in: no ticket yet.

    @counted
    async def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloReply:
        if request.major != MAJOR:
            text = (
                f"this coordinator speaks protocol {MAJOR}.{MINOR} (fedsim {__version__}), the caller speaks "
                f"{request.major}.{request.minor}: install versions with the same major protocol"
            )
            raise Refused(StatusCode.FAILED_PRECONDITION, text)
        return pb.HelloReply(
            major=MAJOR,
            minor=min(MINOR, request.minor),
            build=__version__,
            capabilities=CAPABILITIES,
            server_id=self._key.public,
            nonce=self._auth.nonce(),
            limits=pb.Limits(
                chunk_bytes=self.limits.chunk_bytes,
                object_bytes=self.limits.object_bytes,
                inline_bytes=self.limits.inline_bytes,
            ),
            server_time=time.time(),
            incarnation=self._parts.incarnation,
        )

    @counted
    async def Enrol(self, request: pb.Signed, context: Any) -> pb.EnrolReply:
        names = certificate_names(context.auth_context())
        return await self._on_disk(self._auth.enrol, request, address_of(context), names)

    @counted
    async def Login(self, request: pb.Signed, context: Any) -> pb.LoginReply:
        names = certificate_names(context.auth_context())
        return await self._on_disk(self._auth.login, request, address_of(context), names)

    # Work.

    @counted
    async def Lease(self, request: pb.LeaseRequest, context: Any) -> pb.LeaseReply:
        peer = self._node(context)
        self._sightings.seen(peer.node_id, request.device)
        task = None if self.draining else self._runs.offer(peer.node_id)
        if task is None and not self.draining and request.wait_seconds > 0:
            if self.polls.full and peer.node_id not in self.polls:
                return pb.LeaseReply(delay_seconds=self.polls.delay(), reason=BUSY)
            task = await self.polls.park(peer.node_id, min(request.wait_seconds, self._parts.poll_seconds))
            # Whoever was superseded or revoked while it waited gets nothing.
            self._node(context)
        if self.draining:
            return pb.LeaseReply(delay_seconds=_DRAIN_DELAY_SECONDS, reason=DRAINING)
        if task is None:
            return pb.LeaseReply(delay_seconds=0.0 if request.wait_seconds > 0 else 1.0, reason=IDLE)
        self.leases.grant(task)
        offer = task.offer(self._key)
        self._parts.telemetry.moved("down", "message", len(offer.message) + len(offer.lent))
        return pb.LeaseReply(offer=offer)

    @counted
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        peer = self._peer(context)
        if len(request.held) > _MOST_HELD:
            raise Refused(StatusCode.INVALID_ARGUMENT, f"more than {_MOST_HELD} tasks are said to be held")
        reply = pb.HeartbeatReply(
            held=[self._beat(peer.node_id, progress) for progress in request.held], draining=self.draining
        )
        renewed = self._auth.renew(peer)
        if renewed is not None:
            reply.ticket, reply.ticket_seconds = renewed
        return reply

    def _beat(self, node_id: str, progress: pb.Progress) -> pb.HeldLease:
        task = self._runs.task(progress.task_id)
        if task is None or task.node_id != node_id or self._runs.cancelled(progress.task_id):
            self._end(progress.task_id, node_id)
            return pb.HeldLease(task_id=progress.task_id, cancelled=True)
        seconds = self.leases.beat(node_id, progress).seconds
        if self.leases.holder(progress.task_id) is None:
            # Its run still wants the answer: the lease was lost with a process, or the run waits.
            seconds = self.leases.grant(task)
        return pb.HeldLease(task_id=progress.task_id, seconds=seconds)

    @counted
    async def Fetch(self, request: pb.FetchRequest, context: Any) -> None:
        await self.streams.fetch(self._node(context).node_id, request, context)

    @counted
    async def UploadStatus(self, request: pb.UploadStatusRequest, context: Any) -> pb.UploadStatusReply:
        peer = self._node(context)
        status = await self._on_disk(self._parts.uploads.status, peer.node_id, request.upload_id)
        if status is None:
            raise Refused(StatusCode.NOT_FOUND, "no such upload of this node")
        return pb.UploadStatusReply(
            offset=status.offset, complete=status.complete, generation=status.generation
        )

    @counted
    async def Upload(self, request: Any, context: Any) -> pb.UploadStatusReply:
        return await self.streams.upload(self._node(context).node_id, context)

    @counted
    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitReply:
        peer = self._node(context)
        found, task = await self.submissions.decide(request, peer)
        # A lease ends with the verdict, but not where the node is asked to send the update again.
        if task is not None and found.verdict != pb.RETRY:
            self._end(task.task_id, peer.node_id)
        if task is not None and found.verdict == pb.REJECTED:
            said = printable(found.text, longest=_LONGEST_SAID)
            log.warning("an update is refused: %s: %s", found.reason, said, extra=task_fields(task))
        return pb.SubmitReply(
            verdict=cast(pb.Verdict, found.verdict),
            reason=found.reason,
            text=found.text,
            first=cast(pb.Verdict, found.first),
            delay_seconds=found.delay,
        )

    @counted
    async def Fail(self, request: pb.FailRequest, context: Any) -> pb.FailReply:
        peer = self._node(context)
        if request.code not in FAILURES:
            raise Refused(StatusCode.INVALID_ARGUMENT, f"code must be one of {', '.join(sorted(FAILURES))}")
        task = self._task(peer, request.task_id)
        # A report on an earlier attempt that arrives late says nothing about this one.
        if request.attempt == task.attempt:
            if self.leases.holder(task.task_id) == peer.node_id:  # a line each time it asks would be too many
                said = printable(request.text, longest=_LONGEST_SAID)
                log.warning("a task failed: %s: %s", request.code, said, extra=task_fields(task))
            text = printable(request.text, longest=_MOST_TEXT)
            await self._completions.of(self._runs.fail(task, request.code, text))
            self._end(task.task_id, peer.node_id)
        return pb.FailReply()

    @counted
    async def Bye(self, request: pb.ByeRequest, context: Any) -> pb.ByeReply:
        peer = self._peer(context)
        await self._on_disk(self._auth.drop, peer)
        self.forget(peer.node_id)
        return pb.ByeReply()

    # What the coordinator does with it.

    def forget(self, node_id: str) -> None:
        """The node left or was revoked: its leases return at once."""
        for task_id in self.leases.end_all(node_id):
            self._runs.expired(task_id)
        self.presence.gone(node_id)

    def drain(self) -> None:
        """Give no work any more; what is in hand goes on."""
        self.draining = True
        self.polls.empty()

    def look_after(self, gap_seconds: float) -> bool:
        """End leases and forget nodes whose time is over; called about once a second.

        Args:
            gap_seconds: a longer pause since the last call means that this process stood still.

        Returns:
            Whether it did.
        """
        stood_still = self.leases.gap() > gap_seconds
        if stood_still:
            self.presence.refresh()
        for task_id in self.leases.overdue(gap_seconds):
            task = self._runs.task(task_id)
            log.warning("a lease is over", extra=fields(task=task_id) if task is None else task_fields(task))
            self._parts.telemetry.lease_expired()
            self._runs.expired(task_id)
        self.presence.sweep(parked=self.polls.__contains__)
        self._sightings.write()
        return stood_still

    def _peer(self, context: Any) -> Peer:
        """Who calls; operators log in, renew their tickets and say goodbye here as well."""
        peer = self._auth.peer(context.invocation_metadata())
        if peer.role == CLIENT:
            self.presence.heard(peer.node_id)
        return peer

    def _node(self, context: Any) -> Peer:
        """The client that calls; other roles have no work here."""
        peer = self._peer(context)
        if peer.role != CLIENT:
            raise Refused(StatusCode.PERMISSION_DENIED, f"the role {peer.role} may not do a client's work")
        return peer

    def _task(self, peer: Peer, task_id: bytes) -> OpenTask:
        task = self._runs.task(task_id)
        if task is None or task.node_id != peer.node_id:
            raise Refused(StatusCode.PERMISSION_DENIED, NOT_LEASED)
        return task

    def _end(self, task_id: bytes, node_id: str) -> None:
        if self.leases.holder(task_id) == node_id:
            self.leases.end(task_id)

    async def _on_disk(self, function: Callable[..., R], *args: Any) -> R:
        return await self._loop.run_in_executor(self._parts.disk, function, *args)


def address_of(context: Any) -> str:
    """Where a call came from, without the port: what attempts are counted by."""
    kind, _, rest = unquote(str(context.peer())).partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else rest or kind

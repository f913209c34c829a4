"""One client's connection to its coordinator: one channel, one session, calls that outlive both.

A call made here is repeated until the coordinator has answered it: over lost links, restarts of the
coordinator and expired tickets, with a back-off that is spread by chance so that a thousand clients do not
return in the same second. What ends it is an answer, a refusal of this very call (`Refused`), or one of the
ends of `fedsim.client.problems`. After every break the coordinator has to introduce itself again, so that
neither another one nor an older copy takes its place.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import grpc
from grpc import StatusCode

from fedsim import __version__
from fedsim.client import problems
from fedsim.client.state import StateFolder
from fedsim.client.statuses import BadCertificate, Expired, Lost, Refused, Superseded, meaning
from fedsim.identity import ENROL, LOGIN, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import FleetStub
from fedsim.transport import TICKET

T = TypeVar("T")
Metadata = tuple[tuple[str, bytes], ...]

MAJOR, MINOR = 1, 0
"""As in `fedsim.wire`, which loads torch and would make this process ten times as large."""

CAPABILITIES = ("inline", "resume")
POLL_SECONDS = 25.0
_SECONDS = 20.0  # deadline of a call that waits for nothing
BYE_SECONDS = 3.0  # and of the last one, for which a client that ends does not stay long
_SLOW_BYTES_PER_SECOND = 20e6  # a coordinator that checks a large update is given this rate
_LOGINS = 2  # a nonce can run out between Hello and Login, once
_APPROVAL_SECONDS = (5.0, 60.0)  # between two questions whether the operator has approved this client
_SKEW_SECONDS = 120.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Introduction:
    """How a client introduces itself.

    Args:
        address: of the coordinator, for messages.
        server_id: public key of the coordinator where an enrolment bundle named it.
        token: for enrolment, empty where there is none.
        name, labels: that the client asks for.
    """

    address: str
    server_id: bytes | None = None
    token: str = field(default="", repr=False)
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


class Connection:
    """Calls of the service `Fleet` in one session; belongs to one event loop.

    Args:
        channel: of grpc.aio, which has no types.
        key: of this client.
        folder: remembers the coordinator.
        who: how the client introduces itself.
        backoff: seconds before try 1, 2, …
        max_retries: tries in a row that may fail; None for any number.
    """

    def __init__(
        self,
        channel: Any,
        key: Key,
        folder: StateFolder,
        who: Introduction,
        *,
        backoff: Callable[[int], float],
        max_retries: int | None = None,
    ) -> None:
        self.stub: Any = FleetStub(channel)  # type: ignore[no-untyped-call]  # generated code
        self.key = key
        self.limits = pb.Limits()
        self.heartbeat_seconds = 20.0
        self._returned = asyncio.Event()  # set when the coordinator is back after a break
        self._channel = channel
        self._folder = folder
        self._who = who
        self._backoff = backoff
        self._max_retries = max_retries
        self._session = os.urandom(16)
        self._door = asyncio.Lock()
        self._greeted = False
        self._ticket = b""
        self._nonce = b""  # not used yet
        self._skewed = False
        self._broken = False
        self._back = asyncio.Event()

    @property
    def online(self) -> bool:
        """Whether the last call that was answered came after the last break."""
        return self._greeted and bool(self._ticket)

    @property
    def server_id(self) -> bytes:
        """Public key of the coordinator; empty before the first Hello."""
        return self._folder.bound.server_id

    async def start(self) -> None:
        """Log in.

        Raises:
            CoordinatorProblem: this client is not let in, or the coordinator is not the right one.
        """

        async def nothing(metadata: Metadata) -> None:
            return None

        await self.persist(nothing)

    async def lease(self, request: pb.LeaseRequest) -> pb.LeaseReply:
        """Ask for work, and wait for it where there is none yet."""
        reply: pb.LeaseReply = await self._call(self.stub.Lease, request, request.wait_seconds + _SECONDS)
        return reply

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        """Say what is held; the ticket is renewed by the way."""
        reply: pb.HeartbeatReply = await self._call(self.stub.Heartbeat, request, _SECONDS)
        if reply.ticket:
            self._ticket = reply.ticket
        return reply

    async def submit(self, request: pb.SubmitRequest, size: int) -> pb.SubmitReply:
        """Hand an answer in; `size` is that of the update in bytes."""
        seconds = 2 * _SECONDS + size / _SLOW_BYTES_PER_SECOND
        reply: pb.SubmitReply = await self._call(self.stub.Submit, request, seconds)
        return reply

    async def fail(self, task_id: bytes, attempt: int, code: str, text: str) -> None:
        """Say that a task came to nothing; a coordinator that does not know the task is told nothing."""
        request = pb.FailRequest(task_id=task_id, attempt=attempt, code=code, text=text)
        try:
            await self._call(self.stub.Fail, request, _SECONDS)
        except Refused as refused:
            log.info("task=%s code=%s fail=refused why=%s", task_id.hex(), code, refused)

    async def upload_status(self, upload_id: bytes) -> pb.UploadStatusReply:
        """What the coordinator has of an upload; all zero where it knows of none."""
        request = pb.UploadStatusRequest(upload_id=upload_id)
        try:
            reply: pb.UploadStatusReply = await self._call(self.stub.UploadStatus, request, _SECONDS)
        except Refused as refused:
            if refused.code != StatusCode.NOT_FOUND:
                raise
            return pb.UploadStatusReply()
        return reply

    async def bye(self, reason: str) -> None:
        """Say goodbye, once; the session is over whatever comes back."""
        ticket, self._ticket = self._ticket, b""
        if ticket and self._greeted:
            with suppress(grpc.aio.AioRpcError):
                await self.stub.Bye(
                    pb.ByeRequest(reason=reason), timeout=BYE_SECONDS, metadata=((TICKET, ticket),)
                )

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def wait_for_return(self, seconds: float) -> None:
        """Wait so long, or until the coordinator is back after a break."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._returned.wait()
        self._returned.clear()

    async def persist(
        self, attempt: Callable[[Metadata], Awaitable[T]], *, mark: Callable[[], int] = lambda: 0
    ) -> T:
        """Make `attempt` until it succeeds.

        Args:
            attempt: one try, given the metadata to send; fails with an error of gRPC or with `Lost`.
            mark: how far it has come; a try that came further is not counted as one that failed.

        Raises:
            Refused: this call is refused for good.
            CoordinatorProblem, SupersededError: the client cannot go on.
        """
        tries, logins, reached = 0, 0, mark()
        while True:
            trouble: Exception
            metadata: Metadata = ()
            try:
                metadata = await self._ready()
                answer = await attempt(metadata)
            except grpc.aio.AioRpcError as error:
                trouble = meaning(error)
            except Lost as error:
                trouble = error
            else:
                self._answered()
                return answer
            if mark() != reached:
                tries, reached = 0, mark()
            where = self._who.address
            match trouble:
                case Lost():
                    tries += 1
                    if self._max_retries is not None and tries > self._max_retries:
                        raise problems.gave_up(tries, trouble.text, where=where)
                    await self._pause(tries, trouble)
                case Expired():
                    logins += 1
                    if logins > _LOGINS:  # the ticket is new, so it is this call that is not accepted
                        raise Refused(StatusCode.UNAUTHENTICATED, str(trouble))
                    if metadata == self._metadata():
                        self._ticket = b""
                case Superseded():
                    raise problems.superseded(str(trouble), where=where)
                case BadCertificate():
                    raise problems.bad_certificate(str(trouble), where=where)
                case _:
                    raise trouble

    async def _call(self, method: Any, request: Any, seconds: float) -> Any:
        """One call that waits at most `seconds` for its answer, until it has one. Any: of grpc.aio."""
        return await self.persist(lambda metadata: method(request, timeout=seconds, metadata=metadata))

    def _metadata(self) -> Metadata:
        return ((TICKET, self._ticket),)

    async def _ready(self) -> Metadata:
        """Greeted and logged in: the metadata of a call."""
        if not (self._greeted and self._ticket):
            async with self._door:
                if not self._greeted:
                    await self._hello()
                if not self._ticket:
                    await self._log_in()
        return self._metadata()

    def _answered(self) -> None:
        if self._broken:
            self._broken = False
            log.info("server=%s back", self._who.address)
            self._returned.set()
            self._back.set()

    async def _pause(self, tries: int, trouble: Lost) -> None:
        """Wait before the next try; a call that gets through meanwhile ends the waiting of the others."""
        delay = self._backoff(tries) if trouble.delay is None else trouble.delay * (1 + self._backoff(1) / 10)
        level = logging.DEBUG if self._broken else logging.WARNING
        log.log(level, "server=%s lost=%r again_in=%.1f", self._who.address, trouble.text, delay)
        self._broken = True
        if not trouble.link:
            await asyncio.sleep(delay)
            return
        self._greeted = False
        self._back.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._back.wait()

    async def _hello(self) -> None:
        """Who is there? Refuses another coordinator, and one that went back in time."""
        where = self._who.address
        request = pb.HelloRequest(major=MAJOR, minor=MINOR, build=__version__, capabilities=CAPABILITIES)
        try:
            reply: pb.HelloReply = await self.stub.Hello(request, timeout=_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() in (StatusCode.FAILED_PRECONDITION, StatusCode.UNIMPLEMENTED):
                raise problems.other_version(error.details(), where=where) from error
            raise
        if reply.major != MAJOR:
            said = f"the coordinator speaks {reply.major}.{reply.minor}, this client {MAJOR}.{MINOR}"
            raise problems.other_version(said, where=where)
        bound = self._folder.bound
        pinned = self._who.server_id or bound.server_id
        for known in filter(None, (self._who.server_id, bound.server_id)):
            if known != reply.server_id:
                raise problems.other_server(known, reply.server_id, where=where)
        if not pinned and len(reply.server_id) != 32:
            raise problems.other_server(b"", reply.server_id, where=where)
        if reply.incarnation < bound.incarnation:
            raise problems.went_back(bound.incarnation, reply.incarnation, where=where)
        if (reply.server_id, reply.incarnation) != (bound.server_id, bound.incarnation):
            self._folder.bind(replace(bound, server_id=reply.server_id, incarnation=reply.incarnation))
        skew = reply.server_time - time.time()
        if abs(skew) > _SKEW_SECONDS and not self._skewed:
            self._skewed = True
            log.warning("clock_seconds=%+.0f the coordinator's clock differs from this machine's", skew)
        self.limits = reply.limits
        self._nonce = reply.nonce
        self._greeted = True

    async def _log_in(self) -> None:
        """Enrol where that was not done yet, then log in; a nonce serves one of the two."""
        refused: problems.CoordinatorProblem | None = None
        if not self._folder.bound.enrolled:
            refused = await self._enrol()
        for left in reversed(range(_LOGINS)):
            body = pb.LoginBody(
                server_id=self.server_id, nonce=await self._fresh_nonce(), public_key=self.key.public,
                build=__version__, client_time=time.time(), session=self._session,
            )  # fmt: skip
            try:
                reply: pb.LoginReply = await self.stub.Login(self._signed(LOGIN, body), timeout=_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED):
                    raise
                if not left or error.code() == StatusCode.PERMISSION_DENIED:
                    raise refused or problems.denied(error.details(), where=self._who.address) from error
            else:
                break
        if not self._folder.bound.enrolled or self._folder.bound.name != reply.name:
            self._folder.bind(replace(self._folder.bound, enrolled=True, name=reply.name))
        self.heartbeat_seconds = reply.heartbeat_seconds or self.heartbeat_seconds
        self._ticket = reply.ticket
        log.info("server=%s node=%s name=%s logged in", self._who.address, reply.node_id, reply.name)

    async def _enrol(self) -> problems.CoordinatorProblem | None:
        """Ask to be let in, and wait until the operator has approved it where that is needed.

        Returns:
            The refusal: a key that is known already may log in all the same.
        """
        wait, longest = _APPROVAL_SECONDS
        while True:
            body = pb.EnrolBody(
                server_id=self.server_id, nonce=await self._fresh_nonce(), public_key=self.key.public,
                token=self._who.token, name=self._who.name, labels=self._who.labels,
            )  # fmt: skip
            try:
                reply: pb.EnrolReply = await self.stub.Enrol(self._signed(ENROL, body), timeout=_SECONDS)
            except grpc.aio.AioRpcError as error:
                trouble = meaning(error)
                if not isinstance(trouble, (Refused, Expired)):
                    raise
                return problems.denied(error.details(), where=self._who.address)
            if reply.state != pb.PENDING:
                return None
            log.warning("node=%s waits for approval: fedsim node approve %s", reply.node_id, reply.node_id)
            await asyncio.sleep(wait)
            wait = min(1.5 * wait, longest)

    async def _fresh_nonce(self) -> bytes:
        """A nonce that was not used before."""
        if not self._nonce:
            await self._hello()
        nonce, self._nonce = self._nonce, b""
        return nonce

    def _signed(self, context: bytes, body: Any) -> pb.Signed:
        content = body.SerializeToString()
        return pb.Signed(body=content, signature=self.key.sign(context, content))

"""The line between an operator and a coordinator: an event loop in a thread, one channel, one ticket.

Commands and notebooks are ordinary code without ``await``; what they ask is run on this loop and waited
for. A call that meets a broken link is repeated for a while, which every call of the service allows: runs
are submitted under a key, and the rest says how things should be and not how to change them.
"""

from __future__ import annotations

import asyncio
import os
import queue
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import grpc
from grpc import StatusCode

from fedsim import __version__
from fedsim.client import problems
from fedsim.client.operator_problems import no_answer, not_allowed, not_let_in, refused
from fedsim.client.statuses import BadCertificate, Expired, Lost, Refused, Superseded, meaning
from fedsim.connections import Connection
from fedsim.identity import LOGIN, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import ControlStub, FleetStub
from fedsim.transport import TICKET, Tls, backoff, open_channel

T = TypeVar("T")
Metadata = tuple[tuple[str, bytes], ...]

MAJOR, MINOR = 1, 0
"""As in `fedsim.wire`, which loads torch."""
CALL_SECONDS = 30.0
PATIENCE_SECONDS = 15.0
_LOGINS = 3
_TICK_SECONDS = 1.0
_AHEAD = 64  # messages of a stream that wait for a slow reader


class Link:
    """A connection that is logged in when it is first used.

    Args:
        connection: whom to call.
        key: of the operator.
        patience: seconds for which a call is repeated while the coordinator does not answer.
    """

    def __init__(self, connection: Connection, key: Key, *, patience: float = PATIENCE_SECONDS) -> None:
        self.connection = connection
        self.patience = patience
        self.role = ""
        self._key = key
        self._rng = random.Random()
        self._session = os.urandom(16)
        self._ticket = b""
        self._door = asyncio.Lock()
        self._channel: Any = None  # of grpc.aio, which has no types
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="operator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up."""
        if self._loop.is_closed():
            return
        with suppress(Exception):
            self._wait(self._hang_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, method: str, request: Any, *, seconds: float = CALL_SECONDS) -> Any:
        """One call of the service Control and its answer.

        Raises:
            CoordinatorProblem: it cannot be reached, is the wrong one, or does not let this key in.
            CoordinatorRefused: FS-SRV-024, the call is refused.
        """

        async def attempt(metadata: Metadata) -> Any:
            stub: Any = ControlStub(self._channel)  # type: ignore[no-untyped-call]
            return await getattr(stub, method)(request, timeout=seconds, metadata=metadata)

        return self._wait(self._persist(attempt, lambda: 0, self.patience))

    def stream(
        self,
        method: str,
        request: Callable[[], Any],
        fresh: Callable[[Any], bool],
        *,
        patience: float | None = None,
        until: float | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> Iterator[Any]:
        """The messages of a streaming call, which is taken up again where the link broke.

        Args:
            request: makes the request for what is not here yet; called on the loop.
            fresh: whether a message was not given before; called on the loop with each of them, in order.
            patience: seconds for which the call is repeated without a message.
            until: on the monotonic clock, when to wait no longer.
            tick: called about once a second while there is nothing; may raise.

        Raises:
            As `call`; TimeoutError, it is `until`.
        """
        inbox: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=_AHEAD)
        ended = threading.Event()
        given = 0

        async def put(item: tuple[Any, BaseException | None]) -> None:
            # A reader that takes its time holds up the stream, and HTTP/2 the coordinator.
            while not ended.is_set():
                try:
                    inbox.put_nowait(item)
                    return
                except queue.Full:
                    await asyncio.sleep(0.02)

        async def attempt(metadata: Metadata) -> None:
            nonlocal given
            stub: Any = ControlStub(self._channel)  # type: ignore[no-untyped-call]
            call = getattr(stub, method)(request(), metadata=metadata)
            try:
                async for message in call:
                    if fresh(message):
                        given += 1
                        await put((message, None))
            finally:
                call.cancel()

        async def run() -> None:
            error: BaseException | None = None
            try:
                await self._persist(attempt, lambda: given, self.patience if patience is None else patience)
            except Exception as caught:  # raised in the thread of the reader
                error = caught
            await put((None, error))

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            while True:
                left = _TICK_SECONDS if until is None else min(_TICK_SECONDS, until - time.monotonic())
                try:
                    message, error = inbox.get(timeout=max(0.0, left))
                except queue.Empty:
                    if until is not None and time.monotonic() >= until:
                        raise TimeoutError from None
                    tick()
                    continue
                if error is not None:
                    raise error
                if message is None:
                    return
                yield message
        finally:
            ended.set()
            if not self._loop.is_closed():
                future.cancel()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # where the wait was interrupted

    async def _hang_up(self) -> None:
        if self._channel is not None:
            ticket, self._ticket = self._ticket, b""
            if ticket:
                with suppress(grpc.aio.AioRpcError):
                    stub: Any = FleetStub(self._channel)  # type: ignore[no-untyped-call]
                    await stub.Bye(pb.ByeRequest(reason="done"), timeout=1.0, metadata=((TICKET, ticket),))
            await self._channel.close()
            self._channel = None

    async def _persist(
        self, attempt: Callable[[Metadata], Awaitable[T]], mark: Callable[[], int], patience: float
    ) -> T:
        """Make `attempt` until it succeeds, patience ends or it is refused."""
        where = str(self.connection)
        until, tries, logins, reached = time.monotonic() + patience, 0, 0, mark()
        trouble: Exception
        while True:
            try:
                async with self._door:
                    if not self._ticket:
                        await self._log_in()
                return await attempt(((TICKET, self._ticket),))
            except grpc.aio.AioRpcError as error:
                trouble = meaning(error)
            except Lost as error:
                trouble = error
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                trouble = Lost("the channel was closed")
            if mark() != reached:
                until, tries, logins, reached = time.monotonic() + patience, 0, 0, mark()
            match trouble:
                case Lost():
                    tries += 1
                    delay = trouble.delay if trouble.delay is not None else backoff(tries, self._rng)
                    if time.monotonic() + delay > until:
                        raise no_answer(trouble.text, patience, where=where)
                    await asyncio.sleep(delay)
                case Expired() | Superseded() if logins < _LOGINS:
                    # Two commands of one person use one key, and the newer ends the older one's session.
                    logins += 1
                    self._ticket = b""
                case Expired() | Superseded():
                    raise not_let_in(str(trouble), where=where)
                case BadCertificate():
                    raise problems.bad_certificate(str(trouble), where=where)
                case Refused(code=StatusCode.PERMISSION_DENIED):
                    raise not_allowed(trouble.text, where=where)
                case Refused():
                    raise refused(trouble.code.name, trouble.text, where=where)
                case _:
                    raise trouble

    async def _log_in(self) -> None:
        where = str(self.connection)
        fleet: Any = await self.fleet()
        hello = await greet(fleet, self.connection)
        body = pb.LoginBody(
            server_id=hello.server_id,
            nonce=hello.nonce,
            public_key=self._key.public,
            build=__version__,
            client_time=time.time(),
            session=self._session,
        ).SerializeToString()
        signed = pb.Signed(body=body, signature=self._key.sign(LOGIN, body))
        try:
            reply = await fleet.Login(signed, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() in (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED):
                raise not_let_in(error.details() or "", where=where) from error
            raise
        self._ticket, self.role = reply.ticket, reply.role

    async def fleet(self) -> Any:  # Any: of grpc.aio
        """The stub of the service for nodes, on the channel, which is opened where it is not open."""
        if self._channel is None:
            self._channel = channel_to(self.connection)
        return FleetStub(self._channel)  # type: ignore[no-untyped-call]


def channel_to(connection: Connection) -> Any:  # Any: of grpc.aio
    """A channel to the coordinator of an entry; on the loop that uses it."""
    tls = None if connection.insecure else Tls(connection.ca, None, None)
    return open_channel(connection.address, tls, insecure=connection.insecure)


async def greet(fleet: Any, connection: Connection) -> pb.HelloReply:  # Any: of grpc.aio
    """Say hello and check who answers.

    Raises:
        CoordinatorProblem: FS-CLI-002 another version, FS-CLI-004 another coordinator.
    """
    where = str(connection)
    request = pb.HelloRequest(major=MAJOR, minor=MINOR, build=__version__)
    try:
        reply: pb.HelloReply = await fleet.Hello(request, timeout=CALL_SECONDS)
    except grpc.aio.AioRpcError as error:
        if error.code() in (StatusCode.FAILED_PRECONDITION, StatusCode.UNIMPLEMENTED):
            raise problems.other_version(error.details() or "", where=where) from error
        raise
    if connection.server_id is not None and connection.server_id != reply.server_id:
        raise problems.other_server(connection.server_id, reply.server_id, where=where)
    return reply

"""One question to a coordinator: who are you, which protocol do you speak, what time is it there?"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import grpc

from fedsim.client.operator_link import channel_to, greet
from fedsim.client.operator_problems import no_answer
from fedsim.client.problems import bad_certificate
from fedsim.client.statuses import BadCertificate, meaning
from fedsim.connections import Connection
from fedsim.pb.federation_pb2_grpc import FleetStub


class Hello(NamedTuple):
    """How a coordinator introduces itself.

    Args:
        protocol: ``major.minor``; server_id: its public key, 32 bytes.
        server_time: seconds since 1970, on its clock.
    """

    build: str
    protocol: str
    server_id: bytes
    server_time: float


def hello(connection: Connection, *, seconds: float) -> Hello:
    """Ask, and wait at most so many seconds.

    Raises:
        CoordinatorProblem: FS-SRV-022, nobody answers; FS-CLI-002, 004 or 007, not the right one.
        ConfigError: FS-SEC-004, plain text where it is not allowed.
    """
    return asyncio.run(_hello(connection, seconds))


async def _hello(connection: Connection, seconds: float) -> Hello:
    where = str(connection)
    channel = channel_to(connection)
    fleet: Any = FleetStub(channel)  # type: ignore[no-untyped-call]  # generated code has no types
    try:
        async with asyncio.timeout(seconds):
            reply = await greet(fleet, connection)
    except grpc.aio.AioRpcError as error:
        trouble = meaning(error)
        if isinstance(trouble, BadCertificate):
            raise bad_certificate(str(trouble), where=where) from error
        raise no_answer(str(trouble), seconds, where=where) from error
    except TimeoutError as error:
        raise no_answer("silence", seconds, where=where) from error
    finally:
        await channel.close()
    return Hello(reply.build, f"{reply.major}.{reply.minor}", reply.server_id, reply.server_time)

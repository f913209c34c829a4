"""Is a coordinator there, and does it serve? The question that containers and people ask."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedsim.client.operator_link import channel_to
from fedsim.client.operator_problems import no_answer
from fedsim.client.problems import bad_certificate
from fedsim.client.statuses import BadCertificate, meaning
from fedsim.connections import Connection


def check_health(connection: Connection, *, seconds: float = 10.0) -> str:
    """What the coordinator says of itself: ``SERVING``, or ``NOT_SERVING`` while it opens, drains or is full.

    Raises:
        CoordinatorProblem: it cannot be reached in `seconds`, or its certificate is not accepted.
    """
    return asyncio.run(_check(connection, seconds))


async def _check(connection: Connection, seconds: float) -> str:
    channel = channel_to(connection)
    stub: Any = health_pb2_grpc.HealthStub(channel)  # Any: generated code has no types
    try:
        # The channel goes on trying to connect for as long as the call may take.
        reply = await stub.Check(
            health_pb2.HealthCheckRequest(service=""), timeout=seconds, wait_for_ready=False
        )
    except grpc.aio.AioRpcError as error:
        trouble = meaning(error)
        if isinstance(trouble, BadCertificate):
            raise bad_certificate(str(trouble), where=str(connection)) from error
        raise no_answer(str(trouble), seconds, where=str(connection)) from error
    finally:
        await channel.close()
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

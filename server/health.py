"""Whether the coordinator serves, for gRPC health checks and for ``/readyz``.

There may be several reasons not to at a time: the state is being opened, the coordinator drains, or the
disk is full. The service is healthy while there is none.
"""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health, health_pb2

SERVICES = ("", "fedsim.v1.Fleet", "fedsim.v1.Control")
OPENING, DRAINING, STORAGE = "opening", "draining", "storage"


class Health:
    """The reasons not to serve; `servicer` tells watchers of every change.

    It begins with `OPENING` as a reason.
    """

    def __init__(self) -> None:
        self.servicer: Any = health.aio.HealthServicer()  # Any: the package has no types
        self._reasons: dict[str, str] = {}

    @property
    def reason(self) -> str | None:
        """Why the coordinator does not serve, or None where it does."""
        return next(iter(self._reasons.values()), None)

    async def unfit(self, reason: str, text: str) -> None:
        """Do not serve, for one of the reasons above.

        Args:
            text: one sentence for whoever asks.
        """
        self._reasons[reason] = text
        await self._tell()

    async def fit(self, reason: str) -> None:
        """This is no reason any more."""
        if self._reasons.pop(reason, None) is not None:
            await self._tell()

    async def _tell(self) -> None:
        codes = health_pb2.HealthCheckResponse
        status = codes.NOT_SERVING if self._reasons else codes.SERVING
        for name in SERVICES:
            await self.servicer.set(name, status)

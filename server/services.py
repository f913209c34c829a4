"""The services behind a port: refused with a clear word while the state is being opened, then served.

The port is open before the state is, so that health checks get an answer and nodes are told to wait; gRPC
wants to know its handlers before it starts. So one handler stands in front and passes calls on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from grpc import StatusCode

from fedsim.server.calls import Refused, refuse

OWN = "/fedsim.v1."
_OPENING_SECONDS = 1.0


class Services:
    """A generic handler of gRPC, and a server to which servicers can be added at any time."""

    def __init__(self) -> None:
        self._handlers: list[Any] = []  # Any: gRPC has no types
        self._waiting = grpc.unary_unary_rpc_method_handler(_wait)

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Serve these from now on; called by the generated ``add_…_to_server``."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """The same methods again in another form; they are served already."""

    def service(self, details: Any) -> Any:
        """The handler of one call, None where there is no such method."""
        if not self._handlers and details.method.startswith(OWN):
            return self._waiting
        found = (handler.service(details) for handler in self._handlers)
        return next((handler for handler in found if handler is not None), None)


async def _wait(request: bytes, context: Any) -> bytes:
    text = "the coordinator opens its state"
    await refuse(Refused(StatusCode.UNAVAILABLE, text, retry_seconds=_OPENING_SECONDS), context, "opening")

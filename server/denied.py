"""The one way in which security says no."""

from __future__ import annotations

import grpc


class Denied(Exception):
    """A caller that is not let in, or not any further.

    Args:
        status: of gRPC.
        text: one sentence for the caller; it tells a stranger nothing that it does not know.
        retry_seconds: when another attempt makes sense; None where the caller decides.
    """

    def __init__(self, status: grpc.StatusCode, text: str, *, retry_seconds: float | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.retry_seconds = retry_seconds

"""What a failed call means for a client: wait and repeat, log in again, give this one thing up, or stop.

Every call of the service may be repeated without harm, so a broken link is never an error of the task in
hand. Besides UNAVAILABLE and DEADLINE_EXCEEDED that is CANCELLED, UNKNOWN and INTERNAL: proxies and
restarting servers end streams with those, and a coordinator that failed inside may be well a minute later.
"""

from __future__ import annotations

import math
from contextlib import suppress

import grpc
from grpc import StatusCode

RETRY_AFTER = "fedsim-retry-after"
"""Trailing metadata of a refused call: seconds to stay away."""

_LINK = {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED}
_PASSING = {*_LINK, StatusCode.RESOURCE_EXHAUSTED, StatusCode.INTERNAL, StatusCode.UNKNOWN}
_MOST_DELAY = 600.0
# gRPC reports a failed TLS handshake as UNAVAILABLE; only its text tells it from a link that is down.
_CERTIFICATE = (
    "CERTIFICATE_VERIFY_FAILED",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REQUIRED",
    "ALERT_BAD_CERTIFICATE",
    "ALERT_UNKNOWN_CA",
    "HOSTNAME VERIFICATION",
    "IS NOT IN PEER CERTIFICATE",
)


class Lost(Exception):
    """The coordinator cannot answer now; the same call may succeed later.

    Args:
        text: what gRPC or the coordinator said.
        delay: seconds that the coordinator asked for, None where it did not.
        link: whether the connection itself is in doubt.
    """

    def __init__(self, text: str, *, delay: float | None = None, link: bool = True) -> None:
        super().__init__(text)
        self.text = text
        self.delay = delay
        self.link = link


class Expired(Exception):
    """The ticket is not valid; log in again."""


class Superseded(Exception):
    """Another process has logged in with this client's key."""


class BadCertificate(Exception):
    """The TLS handshake failed for good."""


class Refused(Exception):
    """The coordinator refuses this call, and would again.

    Args:
        code: of gRPC; text: in the coordinator's words.
    """

    def __init__(self, code: StatusCode, text: str) -> None:
        super().__init__(f"{code.name}: {text}")
        self.code = code
        self.text = text


def meaning(error: grpc.aio.AioRpcError) -> Exception:
    """The failure of a call as one of the exceptions above."""
    code, text = error.code(), error.details() or error.code().name
    if code in _PASSING:
        if code == StatusCode.UNAVAILABLE and any(mark in text.upper() for mark in _CERTIFICATE):
            return BadCertificate(text)
        delay = _delay(error)
        return Lost(f"{code.name}: {text}", delay=delay, link=code in _LINK)
    if code == StatusCode.UNAUTHENTICATED:
        return Expired(text)
    if code == StatusCode.FAILED_PRECONDITION and text.lower().startswith("superseded"):
        return Superseded(text)
    return Refused(code, text)


def _delay(error: grpc.aio.AioRpcError) -> float | None:
    """Seconds that the coordinator asked for, within reason."""
    for name, value in error.trailing_metadata() or ():
        if name == RETRY_AFTER:
            with suppress(ValueError):
                seconds = float(value)
                if math.isfinite(seconds) and seconds >= 0:
                    return min(seconds, _MOST_DELAY)
    return None

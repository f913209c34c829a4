"""What can go wrong with one call to a `tests.fake_fleet.FakeFleet`."""

from __future__ import annotations

from typing import NamedTuple

from grpc import StatusCode


class Abort(NamedTuple):
    """The call fails before anything is done."""

    code: StatusCode = StatusCode.UNAVAILABLE
    text: str = "cut"
    retry_after: float | None = None


class LoseReply(NamedTuple):
    """The call is done, and its reply is lost."""


class Hang(NamedTuple):
    """The call gets no answer until its caller gives up."""


class CutAfter(NamedTuple):
    """A stream breaks after so many chunks."""

    chunks: int


class Damage(NamedTuple):
    """A chunk of a download has a wrong CRC-32."""

    chunk: int


class Lie(NamedTuple):
    """A download carries other bytes than asked for, with right CRCs."""


Fault = Abort | LoseReply | Hang | CutAfter | Damage | Lie

"""From an error in a call to the status that the caller sees.

Every method of the services runs inside `answered`: what was refused on purpose becomes its status code
and a clear text; anything unexpected becomes INTERNAL with the number of an incident, whose traceback is in
the log alone, and the coordinator goes on. A caller never sees a path, a query or a stack.
"""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode

from fedsim.bundle import BundleError
from fedsim.errors import EnvironmentProblem, FedsimError
from fedsim.server.denied import Denied
from fedsim.server.upload_rows import UploadRefused

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")

# Trailing metadata: seconds that the caller should stay away before it tries again, and the byte at which
# an upload has to go on.
RETRY_AFTER = "fedsim-retry-after"
OFFSET = "fedsim-offset"
_MOST_TEXT = 1_000

log = logging.getLogger(__name__)


class Refused(Exception):
    """A call that is answered with a status other than OK.

    Args:
        code: of gRPC.
        text: one sentence for the caller.
        retry_seconds: when a second attempt makes sense; None where the caller decides.
        offset: where an upload has to go on, in bytes.
    """

    def __init__(
        self,
        code: StatusCode,
        text: str,
        *,
        retry_seconds: float | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.retry_seconds = retry_seconds
        self.offset = offset

    @property
    def trailing(self) -> tuple[tuple[str, str], ...]:
        """Metadata that goes with the status."""
        found = []
        if self.retry_seconds is not None:
            found.append((RETRY_AFTER, f"{self.retry_seconds:.3f}"))
        if self.offset is not None:
            found.append((OFFSET, str(self.offset)))
        return tuple(found)


def answered(
    method: Callable[Concatenate[S, P], Awaitable[T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """A method whose exceptions reach the caller as status codes; its last argument is the context."""

    @functools.wraps(method)
    async def call(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, *args, **kwargs)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await refuse(error, args[-1], method.__name__)

    return call  # type: ignore[return-value]  # a method as a class sees it


async def refuse(error: Exception, context: Any, method: str) -> NoReturn:
    """End a call with the status that fits `error`.

    Args:
        context: of grpc.aio, which has no types.
        method: its name, for the log.
    """
    refused = refusal(error)
    if refused is None:
        incident = secrets.token_hex(4)
        log.error("call=%s incident=%s failed", method, incident, exc_info=error)
        text = f"the coordinator failed in {method}: its log has the details under incident {incident}"
        refused = Refused(StatusCode.INTERNAL, text)
    elif log.isEnabledFor(logging.DEBUG):
        log.debug("call=%s status=%s text=%r", method, refused.code.name, refused.text)
    await context.abort(refused.code, status_text(refused.text), refused.trailing)
    raise AssertionError("abort returned")


def refusal(error: Exception) -> Refused | None:
    """What the caller is told about an expected error; None for one that nobody foresaw."""
    match error:
        case Refused():
            return error
        case Denied():
            return Refused(error.status, error.text, retry_seconds=error.retry_seconds)
        case UploadRefused():
            return Refused(error.status, error.text, retry_seconds=error.retry_seconds, offset=error.offset)
        case BundleError():
            return Refused(StatusCode.INVALID_ARGUMENT, error.reason)
        case DecodeError():
            return Refused(StatusCode.INVALID_ARGUMENT, "the body is no message of fedsim.v1")
        case EnvironmentProblem():
            # Path and reason of the operating system stay here: they are the operator's business.
            log.error("the coordinator cannot store or read its state: %s", error)
            code = StatusCode.RESOURCE_EXHAUSTED if error.code in _FULL else StatusCode.UNAVAILABLE
            text = f"the coordinator cannot store this now ({error.code}); try again later"
            return Refused(code, text, retry_seconds=10.0 if error.code in _FULL else 2.0)
        case FedsimError():
            return Refused(_code_of(error), error.what)
    return None


def _code_of(error: FedsimError) -> StatusCode:
    if error.code in _NOT_FOUND:
        return StatusCode.NOT_FOUND
    return StatusCode.INVALID_ARGUMENT if error.exit_code == 2 else StatusCode.FAILED_PRECONDITION


_FULL = {"FS-LED-001", "FS-ENV-021"}  # no space on the disk
_NOT_FOUND = {"FS-SRV-051"}  # no such run


def status_text(text: str) -> str:
    """A text that fits into the status of a call: one printable line of bounded length."""
    line = "".join(c if c.isprintable() else " " for c in text[:_MOST_TEXT])
    return line.encode("utf-8", "replace").decode("utf-8")

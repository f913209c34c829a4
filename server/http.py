"""The coordinator's second port: ``/metrics``, ``/livez`` and ``/readyz``, on the loop of the gRPC server.

Probes answer everybody and say no more than a probe must. Numbers are for whoever may see them: where the
port can be reached from other machines they are given against a bearer token alone. Connections are bounded
in number and in life, so that a consumer that hangs takes nothing away from the rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedsim.connections import Address
from fedsim.errors import EnvironmentProblem
from fedsim.server.telemetry import CONTENT_TYPE, Telemetry
from fedsim.storage import unreadable
from fedsim.transport import is_loopback

MOST_CONNECTIONS = 256
LIFE_SECONDS = 60.0  # of a connection; a scraper opens a new one
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_LEAST_TOKEN = 16

log = logging.getLogger(__name__)


def make_app(
    telemetry: Telemetry, ready: Callable[[], str | None], *, token: str | None, open_metrics: bool
) -> FastAPI:
    """The web application.

    Args:
        ready: why the coordinator is not ready to serve, or None where it is.
        token: that `/metrics` asks for; None where there is none.
        open_metrics: whether `/metrics` answers without a token.
    """
    app = FastAPI(title="fedsim", openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/livez")
    async def livez() -> Response:
        return PlainTextResponse("ok\n", headers=_HEADERS)

    @app.get("/readyz")
    async def readyz() -> Response:
        reason = ready()
        if reason is None:
            return PlainTextResponse("ok\n", headers=_HEADERS)
        return PlainTextResponse(f"not ready: {reason}\n", status_code=503, headers=_HEADERS)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if not open_metrics:
            if token is None:
                text = "metrics are off here: [server] http_token names the file with the token they need\n"
                return PlainTextResponse(text, status_code=403, headers=_HEADERS)
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                headers = {**_HEADERS, "WWW-Authenticate": 'Bearer realm="fedsim"'}
                return PlainTextResponse("a bearer token is needed\n", status_code=401, headers=headers)
        return Response(telemetry.render(), media_type=CONTENT_TYPE, headers=_HEADERS)

    return app


def read_token(path: Path) -> str:
    """The token in a file that its owner alone may read.

    Raises:
        EnvironmentProblem: FS-SRV-020, it can be read by others or holds no usable token; FS-ENV-024.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        token = path.read_text(encoding="ascii").strip()
    except UnicodeDecodeError as error:
        raise _no_token(path, "it holds more than ASCII") from error
    except OSError as error:
        raise unreadable(error, path) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise _no_token(path, f"other users may read it (mode {mode:04o})")
    if len(token) < _LEAST_TOKEN or not token.isprintable() or " " in token:
        raise _no_token(path, f"a token is one word of at least {_LEAST_TOKEN} characters")
    return token


def _no_token(path: Path, why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        "the token for /metrics cannot be used",
        code="FS-SRV-020",
        where=str(path),
        why=why,
        hint=f"make one with: (umask 077; openssl rand -hex 32 > {path.name})",
    )


class HttpServer:
    """The port, from `start` to `stop`.

    Args:
        address: to listen on; port 0 lets the system choose.
        ready, token: see `make_app`.
    """

    def __init__(
        self,
        address: Address,
        telemetry: Telemetry,
        ready: Callable[[], str | None],
        *,
        token: str | None = None,
    ) -> None:
        self.address = address
        local = is_loopback(str(address))
        # A token that is set is asked for everywhere: on loopback a proxy may stand in front.
        app = make_app(telemetry, ready, token=token, open_metrics=local and token is None)
        config = uvicorn.Config(
            app,
            http=_Bounded,
            loop="none",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None
        if not local and token is None:
            log.warning(
                "metrics are off: %s can be reached by other machines and http_token is not set", address
            )

    async def start(self) -> Address:
        """Listen; the address with its real port.

        Raises:
            EnvironmentProblem: FS-SRV-021, the port cannot be opened.
        """
        listening = self._listen()
        self.address = Address(self.address.host, listening.getsockname()[1])
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]), name="http")
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)
        if self._task.done():
            self._task.result()  # what it failed of
            raise RuntimeError("the HTTP server ended while it started")
        return self.address

    async def stop(self) -> None:
        """Close the port and what is connected."""
        if self._task is not None:
            self._server.should_exit = True
            await self._task
            self._task = None

    def _listen(self) -> socket.socket:
        host, port = self.address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, place = found[0]
            listening = socket.create_server(place[:2], family=family, backlog=128)
        except OSError as error:
            raise EnvironmentProblem(
                f"the port {self.address} cannot be opened",
                code="FS-SRV-021",
                where=f"[server] http = {self.address}",
                why=error.strerror or str(error),
                hint="end the process that has it (fedsim doctor), or choose another port with --http",
            ) from error
        listening.setblocking(False)
        return listening


class _Server(uvicorn.Server):
    """uvicorn inside a process that handles its signals by itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Bounded(H11Protocol):
    """A connection that lives for a minute at most, whether it talks, listens or hangs."""

    _end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._end = self.loop.call_later(LIFE_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)

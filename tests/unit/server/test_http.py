"""The port for numbers and probes, over real sockets."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fedsim.connections import Address
from fedsim.errors import EnvironmentProblem
from fedsim.server import http
from fedsim.server.http import HttpServer, read_token
from fedsim.server.telemetry import Telemetry

LOCAL = Address("127.0.0.1", 0)
ANYWHERE = Address("0.0.0.0", 0)
TOKEN = "0123456789abcdef0123"


async def get(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of one request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: x",
        "Connection: close",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    answer = (await asyncio.wait_for(reader.read(), 60)).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    status, *fields = head.split("\r\n")
    named = {k.lower(): v.strip() for k, _, v in (field.partition(":") for field in fields)}
    return int(status.split()[1]), named, body


def served(
    scenario: Callable[[int], Awaitable[None]],
    *,
    address: Address = LOCAL,
    token: str | None = None,
    ready: Callable[[], str | None] = lambda: None,
) -> None:
    """Serve while the scenario lasts; it is given the port."""

    async def work() -> None:
        telemetry = Telemetry()
        telemetry.round("digits", 3)
        server = HttpServer(address, telemetry, ready, token=token)
        found = await server.start()
        assert found.port > 0
        try:
            await scenario(found.port)
        finally:
            await server.stop()

    asyncio.run(work())


def test_the_loop_that_serves_says_that_it_lives_and_gives_its_numbers() -> None:
    async def scenario(port: int) -> None:
        status, headers, body = await get(port, "/livez")
        assert (status, body) == (200, "ok\n")
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        status, headers, body = await get(port, "/metrics")
        assert status == 200
        assert headers["content-type"].startswith("text/plain; version=")
        assert 'fedsim_round{run="digits"} 3.0' in body
        for path in ("/", "/docs", "/openapi.json", "/metrics/../x"):
            assert (await get(port, path))[0] == 404

    served(scenario)


def test_ready_follows_the_coordinator_and_says_why_not() -> None:
    reasons = [None, "draining", None]

    async def scenario(port: int) -> None:
        assert (await get(port, "/readyz"))[::2] == (200, "ok\n")
        assert (await get(port, "/readyz"))[::2] == (503, "not ready: draining\n")
        assert (await get(port, "/readyz"))[0] == 200

    served(scenario, ready=lambda: reasons.pop(0))


@pytest.mark.parametrize("address", [LOCAL, ANYWHERE])
def test_with_a_token_numbers_are_for_those_who_have_it(address: Address) -> None:
    async def scenario(port: int) -> None:
        status, headers, body = await get(port, "/metrics")
        assert (status, headers["www-authenticate"]) == (401, 'Bearer realm="fedsim"')
        assert "fedsim_round" not in body
        for wrong in (TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer ", "Bearer \xe9"):
            assert (await get(port, "/metrics", Authorization=wrong))[0] == 401
        status, _, body = await get(port, "/metrics", Authorization=f"Bearer {TOKEN}")
        assert status == 200
        assert "fedsim_round" in body
        assert (await get(port, "/livez"))[0] == 200
        assert (await get(port, "/readyz"))[0] == 200

    served(scenario, address=address, token=TOKEN)


def test_beyond_loopback_numbers_are_off_without_a_token() -> None:
    async def scenario(port: int) -> None:
        status, _, body = await get(port, "/metrics")
        assert status == 403
        assert "http_token" in body
        assert (await get(port, "/livez"))[0] == 200

    served(scenario, address=ANYWHERE)


def test_a_consumer_that_hangs_is_cut_and_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LIFE_SECONDS", 0.3)
    made: list[object] = []
    connection_made = http._Bounded.connection_made

    def counted(self: http._Bounded, transport: asyncio.Transport) -> None:
        connection_made(self, transport)
        made.append(self)

    monkeypatch.setattr(http._Bounded, "connection_made", counted)

    async def scenario(port: int) -> None:
        hanging = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in hanging[:10]:
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")  # and never the end of it
        while len(made) < len(hanging):
            await asyncio.sleep(0.005)
        monkeypatch.setattr(http, "LIFE_SECONDS", 60.0)  # of the one that does not hang
        assert (await get(port, "/livez"))[0] == 200
        for reader, writer in hanging:
            with suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 60) == b""
            writer.close()

    served(scenario)


def test_a_port_that_is_taken_is_an_error_with_a_remedy() -> None:
    async def scenario(port: int) -> None:
        second = HttpServer(Address("127.0.0.1", port), Telemetry(), lambda: None)
        with pytest.raises(EnvironmentProblem) as caught:
            await second.start()
        assert caught.value.code == "FS-SRV-021"
        await second.stop()

    served(scenario)


def test_signals_stay_with_the_coordinator() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    async def scenario(port: int) -> None:
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == during

    during = before[0], before[1]

    async def work() -> None:
        nonlocal during
        # asyncio.run puts a handler of its own for SIGINT: what counts is that serving changes nothing.
        during = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        server = HttpServer(LOCAL, Telemetry(), lambda: None)
        found = await server.start()
        await scenario(found.port)
        await server.stop()

    asyncio.run(work())


def test_a_token_is_one_long_word_in_a_file_of_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    assert read_token(path) == TOKEN
    path.chmod(0o640)
    with pytest.raises(EnvironmentProblem, match="cannot be used") as caught:
        read_token(path)
    assert caught.value.code == "FS-SRV-020"
    assert TOKEN not in str(caught.value)
    path.chmod(0o600)
    for text in ("", "short", "two words of sixteen", "\u00e9" * 20):
        path.write_text(text)
        with pytest.raises(EnvironmentProblem, match="cannot be used"):
            read_token(path)
    with pytest.raises(EnvironmentProblem) as caught:
        read_token(tmp_path / "none")
    assert caught.value.code == "FS-ENV-024"

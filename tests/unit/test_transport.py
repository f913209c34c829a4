"""Channels: TLS that checks and rotates, plain text on loopback alone, options that fit together."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.certificate_files import load_authorities, load_pair
from fedsim.errors import ConfigError, EnvironmentProblem
from fedsim.identity import write_new_secret
from fedsim.server.certificates import issue, issue_client, make_ca
from fedsim.transport import (
    FASTEST_PING_SECONDS,
    PING_SECONDS,
    CertificateFiles,
    Tls,
    backoff,
    channel_credentials,
    check_insecure,
    client_options,
    is_loopback,
    open_channel,
    server_credentials,
    server_options,
)

Call = Callable[[Any], Awaitable[bytes]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, a server's certificate and one of a client."""
    folder = tmp_path_factory.mktemp("tls")
    make_ca(folder)
    issue(folder, ["localhost", "127.0.0.1"])
    issue_client(folder, "site-1")
    return folder


class Echo(grpc.GenericRpcHandler):
    """Answers every call by the names in the caller's certificate."""

    def service(self, details: Any) -> Any:
        async def answer(request: bytes, context: Any) -> bytes:
            return b",".join(context.auth_context().get("x509_common_name", [b"nobody"]))

        return grpc.unary_unary_rpc_method_handler(answer)


async def served(credentials: Any, use: Callable[[int], Awaitable[Any]]) -> Any:
    server = grpc.aio.server(options=server_options())
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        return await use(port)
    finally:
        await server.stop(None)


async def ask(channel: Any) -> bytes:
    return bytes(await channel.unary_unary("/x/y")(b"", timeout=10))


async def once(port: int, tls: Tls) -> bytes:
    async with open_channel(f"127.0.0.1:{port}", tls) as channel:
        return await ask(channel)


def test_a_call_goes_through_tls(authority: Path) -> None:
    credentials = server_credentials(authority / "server.pem", authority / "server.key")
    answer = asyncio.run(served(credentials, lambda port: once(port, Tls(authority / "ca.pem"))))
    assert answer == b"nobody"


def test_another_authority_is_not_believed(authority: Path, tmp_path: Path) -> None:
    make_ca(tmp_path)
    credentials = server_credentials(authority / "server.pem", authority / "server.key")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(served(credentials, lambda port: once(port, Tls(tmp_path / "ca.pem"))))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in (caught.value.details() or "")


def test_a_client_certificate_is_asked_for_where_an_authority_is_named(authority: Path) -> None:
    def credentials() -> Any:
        files = authority / "server.pem", authority / "server.key"
        return server_credentials(*files, client_ca=authority / "ca.pem")

    with_one = Tls(authority / "ca.pem", authority / "site-1.pem", authority / "site-1.key")
    assert asyncio.run(served(credentials(), lambda port: once(port, with_one))) == b"site-1"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(served(credentials(), lambda port: once(port, Tls(authority / "ca.pem"))))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_new_files_serve_new_connections_and_old_connections_go_on(tmp_path: Path) -> None:
    make_ca(tmp_path)
    issue(tmp_path, ["127.0.0.1"])
    # A second authority: a channel that trusts it alone connects only after the rotation.
    other = tmp_path / "other"
    make_ca(other)
    issue(other, ["127.0.0.1"])
    credentials = server_credentials(tmp_path / "server.pem", tmp_path / "server.key")

    async def use(port: int) -> None:
        async with open_channel(f"127.0.0.1:{port}", Tls(tmp_path / "ca.pem")) as old:
            assert await ask(old) == b"nobody"
            with pytest.raises(grpc.aio.AioRpcError):
                await once(port, Tls(other / "ca.pem"))
            for name in ("server.key", "server.pem"):
                (other / name).replace(tmp_path / name)
            assert await once(port, Tls(other / "ca.pem")) == b"nobody"
            assert await ask(old) == b"nobody"
            with pytest.raises(grpc.aio.AioRpcError):
                await once(port, Tls(tmp_path / "ca.pem"))

    asyncio.run(served(credentials, use))


def test_files_that_cannot_be_used_leave_the_old_ones_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_ca(tmp_path)
    issue(tmp_path, ["localhost"])
    files = CertificateFiles(tmp_path / "server.pem", tmp_path / "server.key")
    first = files.current
    assert files.changed() is None
    good = (tmp_path / "server.pem").read_bytes()
    (tmp_path / "server.pem").write_bytes(b"nothing of the kind")
    with caplog.at_level(logging.WARNING):
        assert files.changed() is None
        assert files.changed() is None
    assert caplog.text.count("FS-SEC-005") == 1
    assert files.current is first
    (tmp_path / "server.pem").write_bytes(good)
    assert files.changed() is files.current is not first


def test_the_end_of_a_certificate_is_announced_once_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_ca(tmp_path)
    issue(tmp_path, ["localhost"], days=30)
    now = datetime.now(UTC).timestamp()
    files = CertificateFiles(tmp_path / "server.pem", tmp_path / "server.key", wall=lambda: now)
    with caplog.at_level(logging.WARNING):
        files.changed()
        assert "days_left" not in caplog.text
        now += 25 * 86_400
        files.changed()
        files.changed()
        assert caplog.text.count("days_left") == 1
        now += 86_401
        files.changed()
    assert caplog.text.count("days_left") == 2


def test_an_expired_certificate_is_refused_on_both_sides_with_its_date(tmp_path: Path) -> None:
    past = datetime.now(UTC) - timedelta(days=60)
    make_ca(tmp_path, days=30, now=past)
    issue(tmp_path, ["localhost"], now=past)
    issue_client(tmp_path, "site-1", now=past)
    server = lambda: server_credentials(tmp_path / "server.pem", tmp_path / "server.key")  # noqa: E731
    authority = lambda: channel_credentials(Tls(tmp_path / "ca.pem"))  # noqa: E731
    own = lambda: channel_credentials(Tls(None, tmp_path / "site-1.pem", tmp_path / "site-1.key"))  # noqa: E731
    for attempt in (server, authority, own):
        with pytest.raises(EnvironmentProblem) as caught:
            attempt()
        assert caught.value.code == "FS-SEC-005"
        ended = past + timedelta(days=30)
        assert f"expired on {ended:%Y-%m-%d}" in str(caught.value)


def test_a_server_that_goes_on_with_an_expired_certificate_is_refused_by_name(tmp_path: Path) -> None:
    past = datetime.now(UTC) - timedelta(days=60)
    make_ca(tmp_path, days=365, now=past)
    issue(tmp_path, ["127.0.0.1"], now=past)
    key, chain = ((tmp_path / f"server.{end}").read_bytes() for end in ("key", "pem"))
    credentials = grpc.ssl_server_credentials([(key, chain)])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(served(credentials, lambda port: once(port, Tls(tmp_path / "ca.pem"))))
    assert "certificate has expired" in (caught.value.details() or "")


def test_a_certificate_and_a_key_that_do_not_belong_together_are_refused(
    authority: Path, tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentProblem, match="does not belong to the key"):
        load_pair(authority / "server.pem", authority / "site-1.key")
    with pytest.raises(EnvironmentProblem, match="no certificate"):
        load_pair(authority / "server.key", authority / "server.key")
    no_key = tmp_path / "no.key"
    write_new_secret(no_key, (authority / "server.pem").read_bytes())
    with pytest.raises(EnvironmentProblem, match="no private key"):
        load_pair(authority / "server.pem", no_key)
    early = datetime.now(UTC) - timedelta(days=2)
    with pytest.raises(EnvironmentProblem, match="the clock of this machine"):
        load_pair(authority / "server.pem", authority / "server.key", now=early)
    open_key = tmp_path / "open.key"
    open_key.write_bytes((authority / "server.key").read_bytes())
    open_key.chmod(0o644)
    with pytest.raises(EnvironmentProblem) as caught:
        load_pair(authority / "server.pem", open_key)
    assert caught.value.code == "FS-SEC-001"
    assert "PRIVATE" not in repr(load_pair(authority / "server.pem", authority / "server.key"))


def test_an_authority_among_expired_ones_is_enough(authority: Path, tmp_path: Path) -> None:
    past = datetime.now(UTC) - timedelta(days=60)
    make_ca(tmp_path, days=30, now=past)
    both = tmp_path / "both.pem"
    both.write_bytes((tmp_path / "ca.pem").read_bytes() + (authority / "ca.pem").read_bytes())
    assert load_authorities(both) == both.read_bytes()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8470", "127.9.9.9", "localhost:1", "LOCALHOST.", "[::1]:8470", "::1", "unix:/tmp/x",
        "[::ffff:127.0.0.1]:1",
    ],
)  # fmt: skip
def test_these_stay_on_this_machine(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:8470", "10.0.0.1:1", "[::]:8470", "example.org:1", "localhost.example.org:1", "", ":8470",
        "[::1", "127.0.0.1.example.org:1", "2130706433:80", "[::1]x:1",
    ],
)  # fmt: skip
def test_these_may_leave_it(address: str) -> None:
    assert not is_loopback(address)


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_text_is_loopback_or_not(address: str) -> None:
    assert is_loopback(address) in (True, False)


def test_plain_text_beyond_loopback_takes_two_flags(authority: Path) -> None:
    check_insecure("127.0.0.1:1", insecure=True, insecure_beyond_loopback=False)
    check_insecure("10.0.0.1:1", insecure=True, insecure_beyond_loopback=True)
    check_insecure("10.0.0.1:1", insecure=False, insecure_beyond_loopback=False, has_tls=True)
    refused: list[Callable[[], Any]] = [
        lambda: open_channel("10.0.0.1:1", None, insecure=True),
        lambda: open_channel("10.0.0.1:1", None, insecure_beyond_loopback=True),
        lambda: open_channel("127.0.0.1:1", Tls(authority / "ca.pem"), insecure=True),
        lambda: channel_credentials(Tls(None, authority / "site-1.pem", None)),
    ]
    for attempt in refused:
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert caught.value.code == "FS-SEC-004"


def test_keepalive_agrees_on_both_sides() -> None:
    client, server = dict(client_options()), dict(server_options())
    assert PING_SECONDS >= 2 * FASTEST_PING_SECONDS
    assert client["grpc.keepalive_time_ms"] > server["grpc.http2.min_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_permit_without_calls"] == server["grpc.keepalive_permit_without_calls"] == 1
    for name in ("grpc.max_receive_message_length", "grpc.max_send_message_length", "grpc.max_metadata_size"):
        assert client[name] == server[name]
    assert dict(client_options(proxy=False))["grpc.enable_http_proxy"] == 0


def test_grpc_knows_every_option_by_its_name() -> None:
    """gRPC ignores a name that it does not know, and with it whatever the option was for."""
    from grpc._cython import cygrpc

    content = Path(cygrpc.__file__).read_bytes()
    unknown = [name for name, _ in (*client_options(), *server_options()) if name.encode() not in content]
    assert not unknown


def test_metadata_beyond_the_limit_ends_the_call_and_not_the_server(authority: Path) -> None:
    credentials = server_credentials(authority / "server.pem", authority / "server.key")

    async def use(port: int) -> None:
        async with open_channel(f"127.0.0.1:{port}", Tls(authority / "ca.pem")) as channel:
            big = (("x", "y" * 64 * 1024),)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/x/y")(b"", timeout=10, metadata=big)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await ask(channel) == b"nobody"

    asyncio.run(served(credentials, use))


def test_waiting_times_double_up_to_a_bound_and_are_spread_by_chance() -> None:
    rng = random.Random(0)
    for attempt, bound in ((1, 0.5), (2, 1.0), (4, 4.0), (7, 30.0), (10_000, 30.0)):
        drawn = [backoff(attempt, rng) for _ in range(200)]
        assert 0 <= min(drawn) < 0.1 * bound
        assert 0.9 * bound < max(drawn) <= bound

"""Channels and credentials of gRPC, alike for clients, operators and the coordinator.

Both sides must agree on keepalive: a client that pings more often than the server allows is thrown out
with "too many pings", so the numbers of both sides stand here, next to each other. Plain text is for
loopback; anything else needs TLS or two flags that nobody sets by accident.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from fedsim.certificate_files import load_authorities, load_pair
from fedsim.errors import ConfigError, FedsimError

TICKET = "fedsim-ticket-bin"
"""Metadata that carries the ticket of a session."""

MESSAGE_BYTES = 4 * 1024 * 1024
METADATA_BYTES = 16 * 1024
PING_SECONDS, FASTEST_PING_SECONDS = 30, 10
STREAMS_PER_CONNECTION = 128
IDLE_SECONDS = 300
HANDSHAKE_SECONDS = 20
_PING_TIMEOUT_SECONDS = 20
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.5, 30.0
_WARN_DAYS = 7

Options = list[tuple[str, int]]
Credentials = Any  # of grpc, which has no types

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tls:
    """What a client brings to TLS.

    Args:
        ca: certificates that are trusted; None for those that gRPC trusts by itself.
        cert, key: own certificate and its key, where the coordinator asks for one (mTLS).
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


def client_options(*, proxy: bool = True) -> Options:
    """Options of a channel.

    Args:
        proxy: whether the variables https_proxy and no_proxy count.
    """
    return [
        ("grpc.keepalive_time_ms", PING_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        *_limits(),
        # Who calls repeats its calls itself, and waits between them; the link may come back sooner.
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", int(proxy)),
    ]


def server_options() -> Options:
    """Options of a server; connections live as long as they are used."""
    return [
        ("grpc.keepalive_time_ms", 2 * PING_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", FASTEST_PING_SECONDS * 1000),
        *_limits(),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        # Whoever connects and then says nothing, before or after TLS, does not keep its place.
        ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        # A second server on the same port is an error, not a second half of the calls.
        ("grpc.so_reuseport", 0),
    ]


def _limits() -> Options:
    return [
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_metadata_size", METADATA_BYTES),
        # Between the two limits gRPC would refuse by chance.
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
    ]


def open_channel(
    address: str, tls: Tls | None, *, insecure: bool = False, insecure_beyond_loopback: bool = False
) -> Any:
    """A channel of grpc.aio, to be made and used in one event loop; it connects when it is used.

    Args:
        address: ``host:port``.
        tls: None for TLS with the certificates that gRPC trusts by itself.
        insecure: plain text instead; for loopback alone.
        insecure_beyond_loopback: lifts that limit, together with `insecure`.

    Raises:
        ConfigError: FS-SEC-004, plain text where it is not allowed, or flags that contradict each other.
        EnvironmentProblem: FS-ENV-024, FS-SEC-001 or FS-SEC-005, about the files of `tls`.
    """
    check_insecure(
        address,
        insecure=insecure,
        insecure_beyond_loopback=insecure_beyond_loopback,
        has_tls=tls is not None and tls != Tls(),
    )
    options = client_options(proxy=not is_loopback(address))
    if insecure:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, channel_credentials(tls or Tls()), options)


def channel_credentials(tls: Tls) -> Credentials:
    """Credentials of a client; its files are checked first.

    Raises:
        ConfigError: FS-SEC-004, a certificate without its key or the reverse.
        EnvironmentProblem: FS-ENV-024, FS-SEC-001, FS-SEC-005.
    """
    authorities = None if tls.ca is None else load_authorities(tls.ca)
    if (tls.cert is None) != (tls.key is None):
        raise _refused(
            "a certificate needs its private key",
            "one of the two was given without the other",
            "give both --cert and --cert-key, or none",
        )
    if tls.cert is None or tls.key is None:
        return grpc.ssl_channel_credentials(authorities)
    own = load_pair(tls.cert, tls.key)
    return grpc.ssl_channel_credentials(authorities, own.key, own.chain)


def check_insecure(
    address: str, *, insecure: bool, insecure_beyond_loopback: bool, has_tls: bool = False
) -> None:
    """Refuse plain text where others could read it.

    Args:
        has_tls: whether files for TLS were given as well.

    Raises:
        ConfigError: FS-SEC-004.
    """
    if insecure and has_tls:
        raise _refused(
            "plain text and TLS exclude each other",
            "--insecure was given together with files for TLS",
            "remove one of the two",
        )
    if insecure_beyond_loopback and not insecure:
        raise _refused(
            "--insecure-beyond-loopback means nothing by itself",
            "it widens --insecure, which was not given",
            "remove it; the connection uses TLS",
        )
    if insecure and not insecure_beyond_loopback and not is_loopback(address):
        raise _refused(
            "plain text is for loopback alone",
            f"{address} is another machine, or may be: the network would see models and tickets",
            "use TLS (--ca FILE); --insecure-beyond-loopback lifts this check",
        )


def is_loopback(address: str) -> bool:
    """Whether an address (``host``, ``host:port``, ``[::1]:port`` or ``unix:…``) stays on this machine.

    Names other than ``localhost`` are not looked up: what they mean can change.
    """
    if address.startswith("unix:"):
        return True
    host = address
    if address.startswith("["):
        host, bracket, rest = address[1:].partition("]")
        if not bracket or not (rest == "" or rest.startswith(":")):
            return False
    elif address.count(":") == 1:
        host = address.partition(":")[0]
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        number = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(number, "ipv4_mapped", None)
    return (mapped or number).is_loopback


def backoff(attempt: int, rng: random.Random) -> float:
    """Seconds to wait before try `attempt` (1, 2, …): anything from 0 up to a bound that doubles.

    The bound grows from 0.5 to 30 s. Drawing from the whole range keeps a thousand clients that lost
    their coordinator in the same moment from coming back in the same moment.
    """
    bound = _FIRST_BACKOFF * 2.0 ** min(max(attempt - 1, 0), 16)
    return rng.uniform(0.0, min(bound, _LONGEST_BACKOFF))


def server_credentials(cert: Path, key: Path, *, client_ca: Path | None = None) -> Credentials:
    """Credentials for one port of a coordinator; files that change are read again, for new connections.

    Connections that exist go on. New files that cannot be used are left out, with a warning, until they
    can.

    Args:
        client_ca: authority of client certificates; with it, clients without one are refused (mTLS).

    Raises:
        EnvironmentProblem: FS-ENV-024, FS-SEC-001 or FS-SEC-005, a file cannot be used.
    """
    files = CertificateFiles(cert, key, client_ca)
    return grpc.dynamic_ssl_server_credentials(
        files.current,
        files.changed,  # pyright: ignore[reportArgumentType]  # None, where nothing changed, is documented
        require_client_authentication=client_ca is not None,
    )


class CertificateFiles:
    """The certificate of a server, read again when a file of it changes.

    Args:
        wall: seconds since 1970, for the warning before the certificate expires.

    Raises:
        EnvironmentProblem: as `server_credentials`.
    """

    def __init__(
        self, cert: Path, key: Path, client_ca: Path | None = None, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._wall = wall
        self._door = threading.Lock()
        self._stamps = self._look()
        self._warned = 0.0
        self.current = self._load()

    def changed(self) -> Credentials | None:
        """The new configuration of TLS, None where nothing changed; called at every handshake."""
        with self._door:
            self._warn()
            stamps = self._look()
            if stamps == self._stamps:
                return None
            self._stamps = stamps
            try:
                self.current = self._load()
            except FedsimError as error:
                # Certificate and key are replaced one after the other: the next change may heal it.
                log.warning("the new certificate is not used, the old one stays: %s", error)
                return None
            log.info("certificate=%s read again, valid until %s", self._cert, self._ends)
            return self.current

    def _load(self) -> Credentials:
        pair = load_pair(self._cert, self._key)
        authorities = None if self._client_ca is None else load_authorities(self._client_ca)
        self._ends = pair.ends
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.chain)], authorities)

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in (self._cert, self._key, self._client_ca) if path is not None)

    def _warn(self) -> None:
        now = self._wall()
        left = (self._ends - datetime.fromtimestamp(now, UTC)).total_seconds() / 86_400
        if left < _WARN_DAYS and now - self._warned > 86_400:
            self._warned = now
            log.warning("certificate=%s days_left=%.1f: put a new one in place", self._cert, left)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _refused(what: str, why: str, hint: str) -> ConfigError:
    return ConfigError(what, code="FS-SEC-004", where="command line or settings", why=why, hint=hint)

"""What `fedsim doctor --server` looks at on the way to a coordinator: name, port, TLS, protocol, clock.

The steps build on each other: the first that fails says what is wrong in its own words, where a call through
all of them at once could only say that it did not work.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.cli.doctor_checks import FAILED, OK, WARN_DAYS, WARNING, Finding, problem_of
from fedsim.errors import FedsimError

if TYPE_CHECKING:
    from cryptography import x509

    from fedsim.connections import Address, Connection

SKEW_SECONDS = 120.0


def server(
    connection: Connection, *, seconds: float = 5.0, wall: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Every step towards a coordinator, until one fails.

    Args:
        seconds: for which a step may take.
    """
    from fedsim.connections import parse_address

    try:
        address = parse_address(connection.address)
    except ValueError as error:
        yield Finding("address", FAILED, str(error), "give --server HOST:PORT")
        return
    steps = [_dns, _port, _plain if connection.insecure else _tls]
    for step in steps:
        finding = step(address, connection.ca, seconds)
        yield finding
        if finding.state == FAILED:
            return
    yield from _hello(connection, seconds, wall)


def _dns(address: Address, ca: Path | None, seconds: float) -> Finding:
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(address.host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        text = f"the name {address.host} cannot be resolved: {error.strerror or error}"
        return Finding("dns", FAILED, text, "check the name, and this machine's resolver")
    return Finding("dns", OK, f"{address.host} is {', '.join(sorted(found))}")


def _port(address: Address, ca: Path | None, seconds: float) -> Finding:
    try:
        socket.create_connection((address.host, address.port), timeout=seconds).close()
    except TimeoutError:
        text = f"{address} does not answer within {seconds:g} s"
        return Finding("port", FAILED, text, "a firewall may swallow the packets; open that port")
    except OSError as error:
        text = f"{address} cannot be reached: {error.strerror or error}"
        return Finding("port", FAILED, text, "check that the coordinator runs and listens there")
    return Finding("port", OK, f"{address} accepts connections")


def _plain(address: Address, ca: Path | None, seconds: float) -> Finding:
    from fedsim.transport import is_loopback

    if is_loopback(str(address)):
        return Finding("tls", WARNING, "plain text, on loopback", "use TLS anywhere else")
    text = "plain text: the network sees models and tickets"
    return Finding("tls", FAILED, text, "start the coordinator with --cert and --cert-key")


def _tls(address: Address, ca: Path | None, seconds: float) -> Finding:
    from fedsim.certificate_files import names_of

    try:
        if ca is not None:
            from fedsim.certificate_files import load_authorities

            load_authorities(ca)
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    except FedsimError as error:
        return problem_of("tls", error)
    try:
        certificate, version = _handshake(context, address, seconds)
    except ssl.SSLCertVerificationError as error:
        return _untrusted(address, error.verify_message or str(error), ca, seconds)
    except ssl.SSLError as error:
        text = f"the handshake fails: {error.reason or error}"
        return Finding("tls", FAILED, text, "perhaps the coordinator speaks plain text: --insecure")
    except OSError as error:
        text = f"the handshake fails: {error.strerror or error}"
        return Finding("tls", FAILED, text, "perhaps another service listens there")
    left = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    text = (
        f"{version}, certificate for {', '.join(names_of(certificate))}, valid until "
        f"{certificate.not_valid_after_utc:%Y-%m-%d} ({left} days)"
    )
    if left < WARN_DAYS:
        return Finding("tls", WARNING, text, "the coordinator needs a new certificate soon")
    return Finding("tls", OK, text)


def _untrusted(address: Address, said: str, ca: Path | None, seconds: float) -> Finding:
    """Why a certificate is not accepted: its dates, its names, or who issued it."""
    from fedsim.certificate_files import covers, names_of, trouble_with_dates

    blind = ssl.create_default_context()
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE  # to look at the certificate; nothing is sent over this connection
    try:
        certificate, _ = _handshake(blind, address, seconds)
    except OSError:
        return Finding("tls", FAILED, f"the certificate is not accepted: {said}", "check --ca")
    if trouble := trouble_with_dates(certificate):
        return Finding("tls", FAILED, trouble, "the coordinator needs a new certificate")
    if not covers(certificate, address.host):
        names = ", ".join(names_of(certificate)) or "nobody"
        text = f"the certificate is made out to {names}, not to {address.host}"
        return Finding("tls", FAILED, text, "use one of those names, or issue it with --name for this one")
    trusted = "the system's authorities" if ca is None else str(ca)
    text = f"the certificate was not issued by {trusted}: {said}"
    return Finding("tls", FAILED, text, "give the authority of this coordinator with --ca FILE")


def _handshake(context: ssl.SSLContext, address: Address, seconds: float) -> tuple[x509.Certificate, str]:
    from cryptography import x509

    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((address.host, address.port), timeout=seconds) as plain,
        context.wrap_socket(plain, server_hostname=address.host) as secure,
    ):
        content = secure.getpeercert(binary_form=True)
        if content is None:
            raise OSError("the other side shows no certificate")
        return x509.load_der_x509_certificate(content), secure.version() or "TLS"


def _hello(connection: Connection, seconds: float, wall: Callable[[], float]) -> Iterator[Finding]:
    """Ask the coordinator itself: version, identity, clock."""
    from fedsim.client.hello import hello

    try:
        reply = hello(connection, seconds=seconds)
    except FedsimError as error:
        yield problem_of("protocol", error)
        return
    about = f"fedsim {reply.build}, protocol {reply.protocol}, server_id {reply.server_id.hex()}"
    yield Finding("protocol", OK, about)
    skew = reply.server_time - wall()
    text = f"the coordinator's clock is {round(skew):+d} s from this machine's"
    if abs(skew) > SKEW_SECONDS:
        yield Finding("skew", WARNING, text, "set the wrong one, best by NTP; logins work all the same")
    else:
        yield Finding("skew", OK, text)

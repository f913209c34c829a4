"""Certificates in PEM files, read and checked before TLS uses them.

A handshake that fails says little, and says it late. A certificate that has expired, is not valid yet, or
belongs to another private key is refused here, by file and date, on both sides.
"""

from __future__ import annotations

import ipaddress
import os
import stat
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from fedsim.errors import EnvironmentProblem
from fedsim.storage import unreadable

_MOST_BYTES = 4 * 1024 * 1024


class Pair(NamedTuple):
    """A certificate chain and its private key, as PEM; the key appears in no representation.

    Args:
        chain: the certificate itself first.
        ends: when the first of the chain's certificates expires.
    """

    chain: bytes
    key: bytes
    ends: datetime

    def __repr__(self) -> str:
        return f"Pair(ends={self.ends:%Y-%m-%d})"


def load_pair(cert: Path, key: Path, *, now: datetime | None = None) -> Pair:
    """Read a certificate chain and its private key.

    Args:
        now: for tests; None for the clock of this machine.

    Raises:
        EnvironmentProblem: FS-ENV-024, a file cannot be read; FS-SEC-001, every user may read the key;
            FS-SEC-005, it is no certificate, is not valid now, or does not belong to the key.
    """
    chain = read_file(cert)
    certificates = parse(chain, cert)
    check_dates(certificates, cert, now=now)
    secret = _read_key(key)
    try:
        private = serialization.load_pem_private_key(secret, password=None)
    except TypeError:
        raise unusable(key, "the private key is protected by a password") from None
    except ValueError:
        raise unusable(key, "it holds no private key in PEM form") from None
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(*form) != certificates[0].public_key().public_bytes(*form):
        raise unusable(cert, f"its first certificate does not belong to the key in {key}")
    return Pair(chain, secret, min(c.not_valid_after_utc for c in certificates))


def load_authorities(ca: Path, *, now: datetime | None = None) -> bytes:
    """Read certificates that are trusted; at least one of them must be valid now.

    Raises:
        EnvironmentProblem: FS-ENV-024, FS-SEC-005.
    """
    content = read_file(ca)
    check_authorities(content, ca, now=now)
    return content


def check_authorities(content: bytes, path: Path, *, now: datetime | None = None) -> None:
    """As `load_authorities`, for bytes that were read already.

    Raises:
        EnvironmentProblem: FS-SEC-005.
    """
    certificates = parse(content, path)
    troubles = [said for c in certificates if (said := trouble_with_dates(c, now=now))]
    if len(troubles) == len(certificates):
        raise unusable(path, troubles[0])


def parse(content: bytes, path: Path) -> list[x509.Certificate]:
    """The certificates in a PEM text, in their order; `path` is for messages.

    Raises:
        EnvironmentProblem: FS-SEC-005, there is none.
    """
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise unusable(path, "it holds no certificate in PEM form") from error


def check_dates(certificates: Sequence[x509.Certificate], path: Path, *, now: datetime | None = None) -> None:
    """Refuse certificates that are not valid now.

    Raises:
        EnvironmentProblem: FS-SEC-005.
    """
    for certificate in certificates:
        said = trouble_with_dates(certificate, now=now)
        if said:
            raise unusable(path, said)


def trouble_with_dates(certificate: x509.Certificate, *, now: datetime | None = None) -> str | None:
    """Why a certificate is not valid now; None where it is."""
    today = now or datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    who = subject_of(certificate)
    if today > ends:
        return f"the certificate of {who} expired on {ends:%Y-%m-%d %H:%M} UTC, now is {today:%Y-%m-%d %H:%M}"
    if today < begins:
        return (
            f"the certificate of {who} is valid from {begins:%Y-%m-%d %H:%M} UTC, now is "
            f"{today:%Y-%m-%d %H:%M}; perhaps the clock of this machine is wrong"
        )
    return None


def subject_of(certificate: x509.Certificate) -> str:
    """The common name of a certificate, else its whole subject, for messages."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return repr(str(names[0].value) if names else certificate.subject.rfc4514_string())


def names_of(certificate: x509.Certificate) -> list[str]:
    """Host names and IP addresses that a certificate is made out to."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    hosts = extension.value.get_values_for_type(x509.DNSName)
    return [*hosts, *map(str, extension.value.get_values_for_type(x509.IPAddress))]


def covers(certificate: x509.Certificate, host: str) -> bool:
    """Whether TLS accepts a certificate for `host`; ``*`` stands for one first label."""
    names = names_of(certificate)
    try:
        return str(ipaddress.ip_address(host.partition("%")[0])) in names
    except ValueError:
        wanted = host.rstrip(".").lower()
    wild = "*." + wanted.partition(".")[2]
    return any(name.rstrip(".").lower() in (wanted, wild) for name in names)


def read_file(path: Path) -> bytes:
    """A file of certificates, of reasonable size.

    Raises:
        EnvironmentProblem: FS-ENV-024.
    """
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise unreadable(error, path) from error


def unusable(path: Path, why: str) -> EnvironmentProblem:
    """FS-SEC-005: a certificate or its key cannot be used."""
    return EnvironmentProblem(
        f"the certificate in {path.name} cannot be used",
        code="FS-SEC-005",
        where=str(path),
        why=why,
        hint="renew it and put the new files in place: they are read again without a restart; "
        "fedsim doctor shows dates and names, fedsim certs dev DIR --name HOST makes some for a trial",
    )


def _read_key(path: Path) -> bytes:
    """The key of a certificate; a group may read it, as daemons for certificates arrange it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if sys.platform != "win32" and mode & stat.S_IRWXO:
                raise EnvironmentProblem(
                    f"{path.name} holds a secret, and every user of this machine may read or change it",
                    code="FS-SEC-001",
                    where=str(path),
                    why=f"its mode is {stat.S_IMODE(mode):04o}",
                    hint=f"chmod 600 {path}",
                )
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise unreadable(error, path) from error

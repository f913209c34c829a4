"""Certificates for development and small federations: one authority in a folder, and what it issues.

Files: ``ca.pem`` (for everybody), ``ca.key`` (stays here), ``server.pem`` and ``server.key`` (for the
coordinator), ``NAME.pem`` and ``NAME.key`` for clients where TLS asks for them. An authority that is there
is kept, so whoever trusts it need not be told anything when a certificate is renewed.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsim.certificate_files import load_pair, parse, trouble_with_dates, unusable
from fedsim.errors import ConfigError
from fedsim.identity import write_new_secret
from fedsim.schema import shown
from fedsim.server.labels import check_name
from fedsim.storage import problem, write_atomically

CA, CA_KEY, SERVER = "ca.pem", "ca.key", "server"
CA_DAYS, DAYS = 365, 30
_BEFORE = timedelta(hours=1)  # clocks that go behind
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(\*\.)?({_LABEL}\.)*{_LABEL}")


def make_ca(folder: Path, *, days: int = CA_DAYS, now: datetime | None = None) -> Path:
    """Make an authority in `folder`, or keep the one that is there; the file of its certificate.

    Args:
        days: for which a new one is valid.
        now: for tests; None for the clock of this machine.

    Raises:
        EnvironmentProblem: FS-SEC-005, the one that is there has expired or is damaged; FS-ENV-020 … 022.
    """
    path, key_path = folder / CA, folder / CA_KEY
    if path.exists():
        load_pair(path, key_path, now=now)
        return path
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise problem(error, folder) from error
    private = ec.generate_private_key(ec.SECP256R1())
    name = _subject("fedsim development authority")
    builder = (
        _builder(name, name, private.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    content = builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    # The key first: a certificate without its key would be kept, and could issue nothing.
    key_path.unlink(missing_ok=True)
    write_new_secret(key_path, _pem(private))
    write_atomically(path, content)
    return path


def issue(folder: Path, names: Sequence[str], days: int = DAYS, *, now: datetime | None = None) -> Path:
    """A certificate for a coordinator that is reached under `names`; replaces the one that is there.

    Args:
        names: host names and IP addresses.

    Raises:
        ConfigError: FS-SEC-010, a name is none, or there is no name.
        EnvironmentProblem: FS-SEC-005, the authority cannot be used; FS-ENV-020 … 022.
    """
    if not names:
        raise _not_issued("a certificate needs a name", "none was given")
    alternatives = [_alternative(name) for name in dict.fromkeys(names)]
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    return _issue(folder, SERVER, names[0][:64], alternatives, usage, days, now)


def issue_client(folder: Path, name: str, days: int = DAYS, *, now: datetime | None = None) -> Path:
    """A certificate for the client of this name or identifier, where the coordinator asks for one (mTLS).

    Raises:
        ConfigError: FS-SEC-010, the name would be a file of the authority; FS-SEC-007, it is no name.
        EnvironmentProblem: FS-SEC-005, the authority cannot be used; FS-ENV-020 … 022.
    """
    if not re.fullmatch(r"[0-9a-f]{16}", name):
        check_name(name)
    if name.lower() in ("ca", SERVER):
        raise _not_issued("a client cannot have a certificate of this name", name)
    usage = ExtendedKeyUsageOID.CLIENT_AUTH
    return _issue(folder, name, name, [x509.DNSName(name)], usage, days, now)


def _issue(
    folder: Path,
    file: str,
    subject: str,
    alternatives: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    days: int,
    now: datetime | None,
) -> Path:
    pair = load_pair(folder / CA, folder / CA_KEY, now=now)
    authority = parse(pair.chain, folder / CA)[0]
    authority_key = serialization.load_pem_private_key(pair.key, password=None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    private = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_subject(subject), authority.subject, private.public_key(), days, now, authority)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
    )
    certificate = builder.sign(authority_key, hashes.SHA256())
    trouble = trouble_with_dates(certificate, now=now)
    if trouble:
        raise unusable(folder / f"{file}.pem", trouble)
    path = folder / f"{file}.pem"
    _replace_secret(folder / f"{file}.key", _pem(private))
    write_atomically(path, certificate.public_bytes(serialization.Encoding.PEM))
    return path


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime | None,
    authority: x509.Certificate | None = None,
) -> x509.CertificateBuilder:
    if not 1 <= days <= 3650:
        raise _not_issued("a certificate is valid for 1 to 3650 days", str(days))
    today = now or datetime.now(UTC)
    begins, ends = today - _BEFORE, today + timedelta(days=days)
    if authority is not None:
        begins = max(begins, authority.not_valid_before_utc)
        ends = min(ends, authority.not_valid_after_utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if len(name) > 253 or not _HOST.fullmatch(name):
        raise _not_issued("this is no name of a host and no IP address", shown(name[:80]))
    return x509.DNSName(name)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _replace_secret(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".writing-{secrets.token_hex(8)}")
    write_new_secret(unfinished, content)
    try:
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise problem(error, path) from error


def _not_issued(what: str, why: str) -> ConfigError:
    return ConfigError(
        what,
        code="FS-SEC-010",
        where="--name, --client, --days",
        why=why,
        hint="such as: fedsim certs dev DIR --name fedsim.example.org --name 10.0.0.1",
    )

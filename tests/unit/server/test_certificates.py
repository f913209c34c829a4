"""Certificates for development: what is in them, what is kept, what is renewed."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedsim.certificate_files import covers, load_pair, names_of, parse
from fedsim.errors import ConfigError, EnvironmentProblem
from fedsim.server.certificates import issue, issue_client, make_ca


def read(path: Path) -> x509.Certificate:
    return parse(path.read_bytes(), path)[0]


def test_a_certificate_carries_names_and_addresses(tmp_path: Path) -> None:
    ca = make_ca(tmp_path)
    path = issue(tmp_path, ["fedsim.example.org", "10.0.0.1", "::1", "*.lab", "localhost", "localhost"])
    certificate = read(path)
    assert names_of(certificate) == ["fedsim.example.org", "*.lab", "localhost", "10.0.0.1", "::1"]
    for host in ("fedsim.example.org", "FEDSIM.example.org", "10.0.0.1", "::1", "a.lab", "localhost"):
        assert covers(certificate, host), host
    for host in ("example.org", "10.0.0.2", "a.b.lab", "lab", "127.0.0.1"):
        assert not covers(certificate, host), host
    certificate.verify_directly_issued_by(read(ca))
    days = (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)
    assert 29.9 < days <= 30
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_private_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    make_ca(tmp_path / "tls")
    issue(tmp_path / "tls", ["localhost"])
    issue_client(tmp_path / "tls", "site-1")
    for name in ("ca.key", "server.key", "site-1.key"):
        assert stat.S_IMODE((tmp_path / "tls" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700
    assert {p.name for p in (tmp_path / "tls").iterdir()} == {
        "ca.key", "ca.pem", "server.key", "server.pem", "site-1.key", "site-1.pem",
    }  # fmt: skip


def test_the_authority_stays_and_the_certificate_is_renewed(tmp_path: Path) -> None:
    make_ca(tmp_path)
    issue(tmp_path, ["localhost"])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    make_ca(tmp_path)
    issue(tmp_path, ["localhost"])
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"server.key", "server.pem"}
    load_pair(tmp_path / "server.pem", tmp_path / "server.key")


def test_nothing_outlives_its_authority(tmp_path: Path) -> None:
    ca = make_ca(tmp_path, days=10)
    assert read(issue(tmp_path, ["localhost"])).not_valid_after_utc == read(ca).not_valid_after_utc


def test_an_authority_that_has_expired_is_refused_and_not_replaced(tmp_path: Path) -> None:
    past = datetime.now(UTC) - timedelta(days=400)
    path = make_ca(tmp_path, now=past)
    content = path.read_bytes()
    for attempt in (lambda: make_ca(tmp_path), lambda: issue(tmp_path, ["localhost"])):
        with pytest.raises(EnvironmentProblem) as caught:
            attempt()
        assert caught.value.code == "FS-SEC-005"
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["", "a b", "-a", "a..b", "a/b", "x" * 300, "*", "a.*.b", "é", "a\n"])
def test_what_is_no_host_is_refused(tmp_path: Path, name: str) -> None:
    make_ca(tmp_path)
    with pytest.raises(ConfigError) as caught:
        issue(tmp_path, ["localhost", name])
    assert caught.value.code == "FS-SEC-010"
    assert not (tmp_path / "server.pem").exists()


@pytest.mark.parametrize("name", ["ca", "server", "CA", "../x", "a/b", ""])
def test_a_client_does_not_get_the_files_of_others(tmp_path: Path, name: str) -> None:
    make_ca(tmp_path)
    with pytest.raises(ConfigError):
        issue_client(tmp_path, name)
    assert {p.name for p in tmp_path.iterdir()} == {"ca.key", "ca.pem"}

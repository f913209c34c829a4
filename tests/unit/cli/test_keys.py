"""`fedsim keys`, `fedsim certs` and `fedsim node --state`, called as from a terminal."""

from __future__ import annotations

import re
import stat
import tomllib
from pathlib import Path

import pytest

from fedsim.client.operator_enrol import read_bundle
from fedsim.client.settings import client_settings
from fedsim.identity import Key
from fedsim.server.audit import verify
from fedsim.server.database import open_database
from tests.unit.cli.invoked import Program

INVITE = ("node", "invite", "--state", "state", "--server", "localhost:8470")


def test_a_key_is_made_once_and_shown(fedsim: Program, tmp_path: Path) -> None:
    made, _ = fedsim.ended("keys", "new", "my.key")
    key = Key.load(tmp_path / "my.key")
    for word in (key.node_id, key.fingerprint, key.public.hex()):
        assert word in made
    assert fedsim("keys", "show", "my.key", "--format", "json").document["data"] == {
        "node": key.node_id,
        "fingerprint": key.fingerprint,
        "public": key.public.hex(),
        "file": "my.key",
    }
    _, err = fedsim.ended("keys", "new", "my.key", code=6)
    assert "FS-SEC-003" in err
    (tmp_path / "my.key").chmod(0o644)
    _, err = fedsim.ended("keys", "show", "my.key", code=6)
    assert "FS-SEC-001" in err
    assert "chmod 600" in err


def test_certificates_are_made_and_renewed(fedsim: Program, tmp_path: Path) -> None:
    out, _ = fedsim.ended("certs", "dev", "tls", "--name", "localhost", "--name", "10.0.0.1", "--client", "a")
    assert "localhost, 10.0.0.1" in out
    authority = (tmp_path / "tls" / "ca.pem").read_bytes()
    certificate = (tmp_path / "tls" / "server.pem").read_bytes()
    data = fedsim("certs", "dev", "tls", "--format", "json").document["data"]
    assert data["names"] == ["localhost", "127.0.0.1", "::1"]
    assert (tmp_path / "tls" / "ca.pem").read_bytes() == authority
    assert (tmp_path / "tls" / "server.pem").read_bytes() != certificate
    _, err = fedsim.ended("certs", "dev", "tls", "--name", "a b", code=2)
    assert "FS-SEC-010" in err


def test_an_invitation_is_a_file_that_clients_and_operators_read(fedsim: Program, tmp_path: Path) -> None:
    fedsim.ended("certs", "dev", "tls")
    out, _ = fedsim.ended(
        *INVITE,
        "--name",
        "site-a",
        "--label",
        "site=a",
        "--label",
        "gpu",
        "--ca",
        "tls/ca.pem",
        "--out",
        "b.toml",
    )
    path = tmp_path / "b.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # What deploy/compose/init.sh looks for with sed.
    assert re.search(r'^server_id = "[0-9a-f]{64}"$', path.read_text(), re.MULTILINE)
    written = tomllib.loads(path.read_text())
    assert written.keys() == {"server", "server_id", "ca", "token"}
    assert written["token"] not in out
    assert written["ca"] == (tmp_path / "tls" / "ca.pem").read_text()
    key = Key.load(tmp_path / "state" / "identity.key")
    bundle = read_bundle(path)
    assert (bundle.server, bundle.server_id, bundle.token) == ("localhost:8470", key.public, written["token"])
    settings = client_settings({"bundle": path, "state": tmp_path / "client"})
    assert (settings.server, settings.server_id, settings.token) == (
        "localhost:8470",
        key.public,
        written["token"],
    )
    _, err = fedsim.ended(*INVITE, "--out", "b.toml", code=6)
    assert "FS-SEC-003" in err
    assert (tmp_path / "state" / "audit.jsonl").read_text().count("node.invite") == 1


def test_an_invitation_on_stdout_is_the_same_file(fedsim: Program, tmp_path: Path) -> None:
    out, _ = fedsim.ended(*INVITE, "--role", "operator", "--valid", "7d")
    (tmp_path / "b.toml").write_text(out)
    assert read_bundle(tmp_path / "b.toml").server == "localhost:8470"
    data = fedsim(*INVITE, "--role", "admin", "--format", "json").document["data"]
    assert data["role"] == "admin"
    assert len(data["server_id"]) == 64


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--role", "root"), "FS-SEC-007"),
        (("--valid", "2y"), "FS-CFG-020"),
        (("--valid", "90d"), "FS-SEC-007"),
        (("--name", "a b"), "FS-SEC-007"),
        (("--label", "a b"), "FS-CFG-114"),
        (("--server", "nowhere"), "FS-CFG-020"),
        (("--config", "server.toml"), "FS-CFG-020"),
    ],
)
def test_an_invitation_that_makes_no_sense_is_refused(
    fedsim: Program, words: tuple[str, ...], code: str
) -> None:
    _, err = fedsim.ended(*INVITE, *words, code=2)
    assert code in err


def test_a_private_key_beside_the_authority_stays_where_it_is(fedsim: Program, tmp_path: Path) -> None:
    fedsim.ended("certs", "dev", "tls")
    both = tmp_path / "both.pem"
    both.write_bytes((tmp_path / "tls" / "ca.key").read_bytes() + (tmp_path / "tls" / "ca.pem").read_bytes())
    out, _ = fedsim.ended(*INVITE, "--ca", "both.pem")
    assert "BEGIN CERTIFICATE" in out
    assert "PRIVATE" not in out


def test_the_owner_of_a_state_folder_administers_it(fedsim: Program, tmp_path: Path) -> None:
    from fedsim.server.audit import Audit
    from fedsim.server.enrolment import Applicant
    from fedsim.server.nodes import Nodes

    state = tmp_path / "state"
    assert "nobody is known" in fedsim.ended("node", "ls", "--state", "state")[0]
    database, audit, key = open_database("", state), Audit(state / "audit.jsonl"), Key.new()
    Nodes(database, audit).enrol(
        Applicant(key.public, "", "site-a", {}), anonymous=True, state="pending", check=lambda *_: None
    )
    _, err = fedsim.ended("node", "ls", "--state", "state", code=6)
    assert "FS-LED-007" in err
    assert "--connect" in err
    audit.close()
    database.close()
    assert f"fedsim node approve {key.node_id}" in fedsim.ended("node", "ls", "--state", "state")[0]
    assert "approved" in fedsim.ended("node", "approve", "site-a", "--state", "state")[0]
    fedsim.ended("node", "label", "site-a", "site=a", "gpu", "--state", "state")
    fedsim.ended("node", "label", "site-a", "--remove", "gpu", "--state", "state")
    header, _, line = fedsim.ended("node", "ls", "--state", "state")[0].splitlines()[:3]
    assert header.split("  ")[0] == "name"
    assert line[header.index("device") :].split() == ["-", "never", "site=a"]
    (row,) = fedsim("node", "ls", "--state", "state", "--format", "json").document["data"]["nodes"]
    assert (row["name"], row["state"], row["labels"]) == ("site-a", "approved", {"site": "a"})
    assert row["fingerprint"] == key.fingerprint
    assert "revoked" in fedsim.ended("node", "revoke", key.node_id, "--state", "state")[0]
    assert "FS-SEC-009" in fedsim.ended("node", "approve", "site-a", "--state", "state", code=2)[1]
    assert "FS-SEC-006" in fedsim.ended("node", "revoke", "site-b", "--state", "state", code=2)[1]
    log = (state / "audit.jsonl").read_text()
    assert log.count('"by":"local"') == 4
    assert verify(state / "audit.jsonl").seq == 4


def test_a_coordinator_is_also_found_by_its_settings(fedsim: Program, tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('[server]\nstate = "state"\ninsecure = true\n')
    fedsim.ended("node", "invite", "--config", "server.toml", "--server", "localhost:1", "--name", "x")
    assert (tmp_path / "state" / "identity.key").exists()

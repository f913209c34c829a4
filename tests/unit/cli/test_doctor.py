"""`fedsim doctor`: each check, right and wrong."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedsim.cli import doctor_checks, doctor_server
from fedsim.cli.doctor_checks import FAILED, OK, SKIPPED, WARNING, Finding
from fedsim.connections import Connection
from fedsim.identity import Key
from fedsim.server.audit import Audit
from fedsim.server.certificates import issue, make_ca
from fedsim.server.database import open_database
from fedsim.server.state_keys import server_key
from tests.unit.cli.invoked import Program


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state folder of a coordinator that has run."""
    folder = tmp_path / "state"
    database = open_database("", folder)
    server_key(folder, database)
    audit = Audit(folder / "audit.jsonl")
    for number in range(3):
        audit.write("test", number=number)
    audit.close()
    database.close()
    return folder


def found(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_a_sound_machine_and_folder_pass(fedsim: Program, state: Path) -> None:
    called = fedsim("doctor", "--state", str(state), "--format", "json")
    checks = {c["check"]: c["state"] for c in called.document["data"]["checks"]}
    assert checks.pop("disk") in (OK, WARNING)
    assert checks == dict.fromkeys(["versions", "clock", "modes", "identity.key", "database", "audit"], OK)
    assert called.code == 0
    assert "torch" in fedsim.ended("doctor")[0]


def test_what_has_failed_is_printed_with_its_repair(fedsim: Program, state: Path) -> None:
    (state / "identity.key").chmod(0o644)
    out, err = fedsim.ended("doctor", "--state", str(state), code=6)
    assert "FAIL  identity.key" in out
    assert f"repair: chmod 600 {state / 'identity.key'}" in out
    assert "FS-SEC-012" in err
    called = fedsim("doctor", "--state", str(state), "--format", "json")
    assert called.document["data"]["code"] == "FS-SEC-012"
    states = {c["check"]: c["state"] for c in called.document["data"]["checks"]}
    assert states["identity.key"] == FAILED
    assert states["audit"] == OK


def test_a_folder_that_is_open_to_everybody_is_found(state: Path) -> None:
    state.chmod(0o755)
    finding = found(doctor_checks.state_folder(state))["modes"]
    assert (finding.state, finding.repair) == (FAILED, f"chmod 700 {state}")


def test_a_damaged_database_and_a_forged_log_are_found(state: Path) -> None:
    database = state / "fedsim.db"
    content = bytearray(database.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    database.write_bytes(content)
    log = state / "audit.jsonl"
    log.write_text(log.read_text().replace('"number":1', '"number":7'))
    checks = found(doctor_checks.state_folder(state))
    assert checks["database"].state == checks["audit"].state == FAILED
    assert "backup-" in checks["database"].repair
    assert "line 3" in checks["audit"].text


def test_a_coordinator_that_runs_is_left_alone(state: Path) -> None:
    database = open_database("", state)
    try:
        assert found(doctor_checks.state_folder(state))["database"].state == SKIPPED
    finally:
        database.close()
    assert found(doctor_checks.state_folder(state))["database"].state == OK


def test_an_identity_that_is_gone_is_found(state: Path) -> None:
    (state / "identity.key").unlink()
    assert found(doctor_checks.state_folder(state))["identity.key"].state == FAILED


def test_looking_changes_nothing(state: Path) -> None:
    before = {p: p.read_bytes() for p in state.rglob("*") if p.is_file()}
    list(doctor_checks.state_folder(state))
    after = {p: p.read_bytes() for p in state.rglob("*") if p.is_file()}
    assert after.keys() >= before.keys()
    assert {p for p in before if after[p] != before[p]} == set()


def test_the_folder_of_a_client_is_known_by_its_key(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert found(doctor_checks.state_folder(tmp_path))["state"].state == FAILED
    assert found(doctor_checks.state_folder(tmp_path / "none"))["state"].state == FAILED
    Key.new().save(tmp_path / "node.key")
    assert {c: f.state for c, f in found(doctor_checks.state_folder(tmp_path)).items()} == {
        "modes": OK,
        "node.key": OK,
    }


def test_a_clock_that_was_never_set_is_found() -> None:
    assert doctor_checks.clock(lambda: 0.0).state == FAILED
    assert doctor_checks.clock().state == OK


def test_a_disk_is_judged_by_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 0

    monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda place: Usage)
    for free, state in ((0, FAILED), (2 * 1024**3, WARNING), (11 * 1024**3, OK)):
        Usage.free = free
        assert doctor_checks.disk(tmp_path / "not" / "yet").state == state


def test_a_certificate_is_judged_by_its_dates(tmp_path: Path) -> None:
    make_ca(tmp_path)
    path = issue(tmp_path, ["example.org"])
    now = datetime.now(UTC)
    assert doctor_checks.certificate(path).state == OK
    assert "example.org" in doctor_checks.certificate(path).text
    assert doctor_checks.certificate(path, now + timedelta(days=25)).state == WARNING
    assert doctor_checks.certificate(path, now + timedelta(days=31)).state == FAILED
    assert doctor_checks.certificate(tmp_path / "none.pem").state == FAILED
    assert doctor_checks.certificate(tmp_path / "server.key").state == FAILED


# ---------------------------------------------------------------- the way to a coordinator


@contextmanager
def listener(folder: Path | None) -> Iterator[int]:
    """A port that answers TLS handshakes with the certificate in `folder`, or says plain nonsense."""
    context = None
    if folder is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        context.set_alpn_protocols(["h2"])
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def serve() -> None:
            while not ended.is_set():
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    continue
                with peer:
                    peer.settimeout(30)
                    try:
                        if context is None:
                            peer.recv(100)
                            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        else:
                            with context.wrap_socket(peer, server_side=True) as secure:
                                secure.recv(1)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield int(server.getsockname()[1])
        finally:
            ended.set()
            thread.join()


def way(port: int, ca: Path | None, host: str = "127.0.0.1") -> dict[str, Finding]:
    return found(doctor_server.server(Connection(f"{host}:{port}", ca), seconds=10.0))


def test_every_trouble_with_tls_is_named(tmp_path: Path) -> None:
    make_ca(tmp_path / "good")
    issue(tmp_path / "good", ["127.0.0.1"])
    make_ca(tmp_path / "other")
    make_ca(tmp_path / "name")
    issue(tmp_path / "name", ["fedsim.example.org"])
    past = datetime.now(UTC) - timedelta(days=60)
    make_ca(tmp_path / "old", now=past)
    issue(tmp_path / "old", ["127.0.0.1"], now=past)
    cases = (
        ("good", "good", "valid until"),
        ("good", "other", "was not issued by"),
        ("name", "name", "made out to fedsim.example.org, not to 127.0.0.1"),
        ("old", "old", "expired on"),
    )
    for server, ca, said in cases:
        with listener(tmp_path / server) as port:
            checks = way(port, tmp_path / ca / "ca.pem")
        assert said in checks["tls"].text, server
        if server == ca == "good":
            assert checks["tls"].state == OK
            assert checks["protocol"].state == FAILED  # it speaks TLS, and no gRPC
        else:
            assert checks["tls"].state == FAILED
            assert checks["tls"].repair
            assert "protocol" not in checks
    with listener(None) as port:
        checks = way(port, tmp_path / "good" / "ca.pem")
    assert checks["tls"].state == FAILED
    assert "--insecure" in checks["tls"].repair


def test_a_name_that_means_nothing_and_a_port_where_nobody_listens(tmp_path: Path) -> None:
    assert way(1, None, "no-such-host.invalid")["dns"].state == FAILED
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    checks = way(port, None)
    assert (checks["dns"].state, checks["port"].state) == (OK, FAILED)
    assert list(found(doctor_server.server(Connection("nowhere")))) == ["address"]


def test_a_coordinator_that_answers_is_asked_for_version_and_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.client import hello
    from fedsim.pb import federation_pb2 as pb

    key = Key.new()

    async def greet(fleet: object, connection: Connection) -> pb.HelloReply:
        now = time.time()
        return pb.HelloReply(major=1, minor=0, build="9.9", server_id=key.public, server_time=now - 600)

    monkeypatch.setattr(hello, "greet", greet)
    with listener(None) as port:
        connection = Connection(f"127.0.0.1:{port}", insecure=True)
        checks = found(doctor_server.server(connection, seconds=5.0))
    assert checks["tls"].state == WARNING
    assert "fedsim 9.9, protocol 1.0" in checks["protocol"].text
    assert checks["skew"].state == WARNING
    assert "-600 s" in checks["skew"].text
    beyond = found(doctor_server.server(Connection(f"127.0.0.1:{port}", insecure=True), seconds=1.0))
    assert beyond["port"].state == FAILED

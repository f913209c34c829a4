"""What changes under a running federation, and who else is connected to it; each test names its rows."""

from __future__ import annotations

import hashlib
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from fedsim.client.health import check_health
from fedsim.connections import Connection
from fedsim.errors import FedsimError
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import FleetStub
from fedsim.wire import MAJOR, MINOR
from tests.deployed import Deployment, Member, held, stopped, until
from tests.deployed_values import values_of

pytestmark = pytest.mark.slow


def shown_certificate(fleet: Deployment) -> str:
    """SHA-256 of the certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", fleet.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return hashlib.sha256(secure.getpeercert(binary_form=True) or b"").hexdigest()


def test_a_certificate_is_replaced_under_a_run(fleet: Deployment) -> None:
    """R21: new connections see the new one, those that exist and their leases go on."""
    fleet.ready(3)
    values = values_of("scaffold", rounds=6)
    before = shown_certificate(fleet)
    expired = fleet.metric("fedsim_lease_expired_total")  # of the process, so of earlier runs too
    with stopped(*fleet.members["client-3"].children):
        run = fleet.submit(values)
        until(lambda: held(fleet, "client-3"), "a task in hand")
        fleet.certify()
        fleet.coordinator.signal(signal.SIGHUP)
        until(lambda: shown_certificate(fleet) != before, "the new certificate")
        fleet.proxy.cut()  # client 1 comes back over a new connection
    run.assert_as_simulated(values)
    assert fleet.metric("fedsim_lease_expired_total") == expired


def test_an_expired_certificate_is_refused_in_so_many_words(fleet: Deployment) -> None:
    """R21: a running coordinator does not take it, one that starts ends, and who is shown one is told why."""
    fleet.ready(2)
    values = values_of("fedavg", clients=2)
    before = shown_certificate(fleet)
    fleet.certify(days=1, now=datetime.now(UTC) - timedelta(days=40))
    try:
        assert shown_certificate(fleet) == before
        assert "the new certificate is not used" in fleet.coordinator.said
        fleet.submit(values).assert_as_simulated(values)
        fleet.coordinator.stop()
        assert fleet.launch_coordinator().ended() == 6
        assert "FS-SEC-005" in fleet.coordinator.said
        assert "expired" in fleet.coordinator.said
        with shower(fleet) as address, pytest.raises(FedsimError) as caught:
            check_health(Connection(address, ca=fleet.ca))
        assert caught.value.code == "FS-CLI-007"
        assert "expired" in str(caught.value)
    finally:
        fleet.certify()


@contextmanager
def shower(fleet: Deployment) -> Iterator[str]:
    """Something that shows the coordinator's certificate to whoever connects; its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(fleet.tls / "server.pem", fleet.tls / "server.key")
    context.set_alpn_protocols(["h2"])
    listening = socket.create_server(("127.0.0.1", 0))

    def show() -> None:
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            with suppress(OSError):
                context.wrap_socket(plain, server_side=True).close()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(30)


def test_other_versions_are_negotiated_or_refused_with_both_numbers(fleet: Deployment) -> None:
    """R24: a newer minor speaks as ours does, what it adds is ignored; another major is refused."""
    fleet.ready(2)
    credentials = grpc.ssl_channel_credentials(fleet.ca.read_bytes())
    with grpc.secure_channel(fleet.address, credentials) as channel:
        stub = FleetStub(channel)  # type: ignore[no-untyped-call]  # generated code
        newer = pb.HelloRequest(major=MAJOR, minor=MINOR + 1, build="9.9", capabilities=["telepathy"])
        # Field 200 of type string, which nobody knows.
        newer.MergeFromString(b"\xc2\x0c\x05later")
        reply = stub.Hello(newer, timeout=30)
        assert (reply.major, reply.minor) == (MAJOR, MINOR)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Hello(pb.HelloRequest(major=MAJOR + 1, build="9.9"), timeout=30)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert f"{MAJOR}.{MINOR}" in caught.value.details()
        assert f"{MAJOR + 1}.0" in caught.value.details()


def test_who_watches_and_does_not_read_slows_nobody(fleet: Deployment) -> None:
    """R25: a watcher that stands still, readers of metrics that ask and do not listen."""
    fleet.ready(3)
    values = values_of("scaffold", rounds=40, run={"seed": 3, "rounds": 40})
    with stopped(*fleet.members["client-3"].children):
        run = fleet.submit(values)
        key = str(fleet.state / "admin.key")
        words = ("watch", run.run_id, "--connect", fleet.address, "--ca", str(fleet.ca), "--key", key)
        watcher = Member(words, fleet.folder / "watcher.log", environ={"FEDSIM_HOME": str(fleet.folder)})
        fleet.extra.append(watcher)
        until(lambda: watcher.said, "a watcher at work")
    watcher.signal(signal.SIGSTOP)
    hanging = [socket.create_connection(("127.0.0.1", fleet.http), timeout=30) for _ in range(20)]
    try:
        for number, reader in enumerate(hanging):
            reader.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + (b"\r\n" if number % 2 else b""))
        run.assert_as_simulated(values)
        assert fleet.operator.get(run.run_id).state == "ok"
    finally:
        for reader in hanging:
            reader.close()
    watcher.signal(signal.SIGCONT)
    # What it has missed it is told when it listens again.
    assert watcher.ended() == 0, watcher.said

"""Who is let in and who is not: logins, certificates, and everything that must not work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.identity import LOGIN, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server import audit as audit_log
from fedsim.server.attempts import Attempts
from fedsim.server.auth import FAILURES_PER_MINUTE, Denied, Peer, certificate_names
from tests.gate import HERE, Clock, Gate, refused


def test_a_login_gives_a_ticket_for_the_key_and_session(gate: Gate) -> None:
    key = gate.member("site-a")
    reply = gate.auth.login(gate.login_body(key), HERE)
    assert (len(reply.ticket), reply.ticket_seconds) == (32, 900)
    assert (reply.lease_seconds, reply.heartbeat_seconds) == (90, 20)
    peer = gate.peer(reply.ticket)
    assert peer == Peer(key.node_id, "site-a", "client", key.public, b"s" * 16)
    node = gate.nodes.get("site-a")
    assert (node.last_seen, node.address, node.build) == (gate.clock(), HERE, "1.0")


def test_a_signed_request_that_is_sent_again_is_refused(gate: Gate) -> None:
    key = gate.member()
    call = gate.login_body(key)
    gate.auth.login(call, HERE)
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.auth.login(call, HERE))
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.auth.login(call, "10.9.9.9"))


def test_an_old_nonce_is_refused(gate: Gate, clock: Clock) -> None:
    call = gate.login_body(gate.member())
    clock.now += 61
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.auth.login(call, HERE))


def test_what_was_signed_for_another_coordinator_is_refused(make_gate: Callable[..., Gate]) -> None:
    gate, other = make_gate(), make_gate()
    key = gate.member()
    other.nodes.bootstrap_admin(key.public)
    relayed = gate.login_body(key)  # signed for `gate`, sent to `other`
    assert "another coordinator" in refused(
        StatusCode.UNAUTHENTICATED, lambda: other.auth.login(relayed, HERE)
    )
    foreign_nonce = gate.login_body(key, nonce=other.auth.nonce())
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.auth.login(foreign_nonce, HERE))


def test_a_body_that_was_changed_after_signing_is_refused(gate: Gate) -> None:
    key = gate.member()
    call = gate.login_body(key)
    body = pb.LoginBody.FromString(call.body)
    body.session = b"t" * 16
    changed = pb.Signed(body=body.SerializeToString(), signature=call.signature)
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.auth.login(changed, HERE))
    enrolment = gate.enrolment(Key.new(), gate.nodes.invite())
    as_login = pb.Signed(body=enrolment.body, signature=enrolment.signature)
    with pytest.raises(Denied):
        gate.auth.login(as_login, HERE)
    gate.auth.login(call, HERE)  # the nonce was not used up by the forgery


def test_a_key_cannot_log_in_as_another(gate: Gate) -> None:
    victim, thief = gate.member(), gate.member()
    body = gate.login_body(victim).body
    forged = pb.Signed(body=body, signature=thief.sign(LOGIN, body))
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.auth.login(forged, HERE))


def test_unknown_and_revoked_keys_get_one_answer_after_the_same_work(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    revoked, unknown = gate.member(), Key.new()
    gate.nodes.revoke(revoked.node_id)
    steps: list[str] = []

    def watched(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            steps.append(name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watched(gate.database, "read")
    watched(gate.audit, "write")
    watched(gate.auth, "_check_proof")
    watched(gate.auth._failures, "failed")
    texts, work = [], []
    for key in (revoked, unknown):
        steps.clear()
        texts.append(refused(StatusCode.PERMISSION_DENIED, lambda key=key: gate.login(key)))
        work.append(list(steps))
    assert texts[0] == texts[1]
    assert work[0] == work[1] == ["_check_proof", "read", "write", "failed"]


def test_failures_are_counted_by_key_and_address_and_successes_are_not(gate: Gate, clock: Clock) -> None:
    key, stranger = gate.member(), Key.new()
    for session in range(3 * FAILURES_PER_MINUTE):
        gate.login(key, session.to_bytes(16, "big"))
    for _ in range(FAILURES_PER_MINUTE):
        refused(StatusCode.PERMISSION_DENIED, lambda: gate.login(stranger))
    refused(StatusCode.RESOURCE_EXHAUSTED, lambda: gate.login(stranger))
    gate.login(key)  # behind the same address
    clock.now += 61
    refused(StatusCode.PERMISSION_DENIED, lambda: gate.login(stranger))


def test_who_failed_is_remembered_within_bounds(clock: Clock) -> None:
    attempts = Attempts(2, 60, clock=clock)
    for who in range(30_000):
        attempts.failed(who)
    assert len(attempts._failures) <= 10_000
    assert attempts.wait(29_999) == 0
    attempts.failed(29_999)
    assert attempts.wait(29_999) == 60
    clock.now += 61
    assert attempts.wait(29_999) == 0


def test_a_wrong_clock_is_no_obstacle_and_is_mentioned(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    key = gate.member("site-a")
    for skew in (600.0, -600.0, float("nan")):
        with caplog.at_level(logging.WARNING):
            gate.auth.login(gate.login_body(key, client_time=gate.clock() + skew), HERE)
    assert caplog.text.count("clock_seconds") == 3


@pytest.mark.parametrize("session", [b"", b"x" * 15, b"x" * 17])
def test_a_session_has_sixteen_bytes(gate: Gate, session: bytes) -> None:
    key = gate.member()
    refused(StatusCode.INVALID_ARGUMENT, lambda: gate.login(key, session))


@given(body=st.binary(max_size=200), signature=st.binary(max_size=70))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_get_in_or_break_anything(gate: Gate, body: bytes, signature: bytes) -> None:
    call = pb.Signed(body=body, signature=signature)
    for method in (gate.auth.enrol, gate.auth.login):
        with pytest.raises(Denied):
            method(call, HERE)


def test_a_body_is_bounded(gate: Gate) -> None:
    call = pb.Signed(body=b"\0" * 1_000_000)
    assert "at most" in refused(StatusCode.INVALID_ARGUMENT, lambda: gate.auth.login(call, HERE))


def test_with_client_certificates_a_key_needs_the_one_with_its_name(make_gate: Callable[..., Gate]) -> None:
    gate = make_gate(bind_certificates=True)
    key = Key.new()
    token = gate.nodes.invite(name="site-a")
    for names in (None, frozenset(), frozenset({"site-b"})):
        refused(
            StatusCode.PERMISSION_DENIED,
            lambda names=names: gate.auth.enrol(gate.enrolment(key, token), HERE, names),
        )
    gate.auth.enrol(gate.enrolment(key, token), HERE, {"site-a"})
    refused(StatusCode.PERMISSION_DENIED, lambda: gate.auth.login(gate.login_body(key), HERE, {"site-b"}))
    gate.auth.login(gate.login_body(key), HERE, {key.node_id})
    context = {"x509_common_name": [b"site-a"], "x509_subject_alternative_name": [b"other"], "more": [b"x"]}
    assert certificate_names(context) == {"site-a", "other"}
    assert certificate_names({}) == frozenset()


def test_every_act_is_in_the_audit_log_and_no_secret(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = gate.nodes.invite(name="site-a")
    key = Key.new()
    gate.auth.enrol(gate.enrolment(key, token), HERE)
    ticket = gate.login(key)
    gate.nodes.label("site-a", {"gpu": "true"})
    gate.nodes.revoke("site-a")
    refused(StatusCode.PERMISSION_DENIED, lambda: gate.login(key))
    for action in ("node.invite", "node.enrol", "session.login", "node.label", "node.revoke", "login.denied"):
        assert gate.audited(action) == 1, action
    assert audit_log.verify(gate.folder / "audit.jsonl").seq == 6
    shown = caplog.text + (gate.folder / "audit.jsonl").read_text() + repr(gate.auth) + repr(gate.nodes)
    shown += repr(gate.auth._tickets) + repr(gate.nodes.get("site-a"))
    for secret in (token, ticket.hex(), repr(ticket), key._private.private_bytes_raw().hex()):
        assert secret not in shown

"""Who is let in and who is not: enrolment, logins, tickets, and everything that must not work."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from fedsim.identity import ENROL, LOGIN, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server import audit as audit_log
from fedsim.server import tables
from fedsim.server.attempts import Attempts
from fedsim.server.audit import Audit
from fedsim.server.auth import FAILURES_PER_MINUTE, Auth, Denied, Peer, certificate_names
from fedsim.server.database import open_database
from fedsim.server.nodes import Nodes
from fedsim.server.nonces import Nonces
from fedsim.transport import TICKET

HERE = "10.0.0.7"


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """A coordinator's security on a real database, and callers in front of it.

    Args:
        options: of `Auth`.
    """

    def __init__(self, folder: Path, clock: Clock, **options: Any) -> None:
        self.folder, self.clock, self.options = folder, clock, options
        self.key = Key.new()
        self.open()

    def open(self) -> None:
        self.database = open_database("", self.folder)
        self.audit = Audit(self.folder / "audit.jsonl", wall=self.clock)
        self.nodes = Nodes(self.database, self.audit, wall=self.clock)
        self.auth = Auth(
            self.database, self.audit, self.nodes, self.key,
            lease_seconds=90, heartbeat_seconds=20, clock=self.clock, wall=self.clock, **self.options,
        )  # fmt: skip

    def close(self) -> None:
        self.audit.close()
        self.database.close()

    def restart(self) -> None:
        self.close()
        self.open()

    def enrolment(self, key: Key, token: str = "", name: str = "", **more: Any) -> pb.Signed:
        body = pb.EnrolBody(
            server_id=self.key.public, nonce=self.auth.nonce(), public_key=key.public, token=token, name=name
        )
        return signed(key, ENROL, body, more)

    def login_body(self, key: Key, session: bytes = b"s" * 16, **more: Any) -> pb.Signed:
        body = pb.LoginBody(
            server_id=self.key.public, nonce=self.auth.nonce(), public_key=key.public, build="1.0",
            client_time=self.clock(), session=session,
        )  # fmt: skip
        return signed(key, LOGIN, body, more)

    def member(self, name: str = "", role: str = "client") -> Key:
        """A key that has enrolled."""
        key = Key.new()
        self.auth.enrol(self.enrolment(key, self.nodes.invite(role), name), HERE)
        return key

    def login(self, key: Key, session: bytes = b"s" * 16) -> bytes:
        return self.auth.login(self.login_body(key, session), HERE).ticket

    def peer(self, ticket: bytes) -> Peer:
        return self.auth.peer(((TICKET, ticket),))

    def audited(self, action: str) -> int:
        return (self.folder / "audit.jsonl").read_text().count(f'"action":"{action}"')


def signed(key: Key, context: bytes, body: Any, more: dict[str, Any]) -> pb.Signed:
    for name, value in more.items():
        if isinstance(value, dict):
            getattr(body, name).update(value)
        else:
            setattr(body, name, value)
    content = body.SerializeToString()
    return pb.Signed(body=content, signature=key.sign(context, content))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Gate]]:
    """Makes gates, and closes them."""
    made: list[Gate] = []

    def gate(**options: Any) -> Gate:
        made.append(Gate(tmp_path / f"state-{len(made)}", clock, **options))
        return made[-1]

    yield gate
    for each in made:
        each.close()


@pytest.fixture
def gate(make: Callable[..., Gate]) -> Gate:
    return make()


def refused(status: StatusCode, attempt: Callable[[], Any]) -> str:
    """The text of a refusal with this status."""
    with pytest.raises(Denied) as caught:
        attempt()
    assert caught.value.status == status, caught.value.text
    return caught.value.text


# ---------------------------------------------------------------- nonces


def test_a_nonce_serves_once_and_for_a_minute(clock: Clock) -> None:
    nonces = Nonces(clock=clock)
    first, second, third = nonces.new(), nonces.new(), nonces.new()
    assert len({first, second, third}) == 3
    assert nonces.use(first)
    assert not nonces.use(first)
    clock.now += 60
    assert nonces.use(second)
    clock.now += 1
    assert not nonces.use(third)


def test_a_nonce_of_another_process_or_a_changed_one_is_worth_nothing(clock: Clock) -> None:
    nonces, other = Nonces(clock=clock), Nonces(clock=clock)
    nonce = nonces.new()
    assert not other.fresh(nonce)
    for place in range(len(nonce)):
        changed = bytearray(nonce)
        changed[place] ^= 1
        assert not nonces.fresh(bytes(changed))
    assert not nonces.fresh(nonce[:-1])
    assert not nonces.fresh(b"")
    assert nonces.fresh(nonce)


def test_used_nonces_are_forgotten_when_they_would_be_refused_anyway(clock: Clock) -> None:
    nonces = Nonces(clock=clock)
    for _ in range(200):
        assert nonces.use(nonces.new())
        clock.now += 1
    assert len(nonces._used) <= 62


def test_of_two_callers_with_one_nonce_one_gets_through() -> None:
    nonces = Nonces()
    for _ in range(20):
        nonce, start = nonces.new(), threading.Barrier(4)

        def use(nonce: bytes = nonce, start: threading.Barrier = start) -> bool:
            start.wait()
            return nonces.use(nonce)

        with ThreadPoolExecutor(4) as pool:
            assert sum(f.result() for f in [pool.submit(use) for _ in range(4)]) == 1


# ---------------------------------------------------------------- enrolment


def test_an_invitation_lets_one_key_in_once(gate: Gate) -> None:
    token = gate.nodes.invite("client", labels={"site": "a"}, name="site-a")
    key, other = Key.new(), Key.new()
    reply = gate.auth.enrol(gate.enrolment(key, token, labels={"site": "forged", "gpu": "true"}), HERE)
    assert (reply.node_id, reply.state, reply.name) == (key.node_id, pb.APPROVED, "site-a")
    assert gate.nodes.get("site-a").labels == {"site": "a", "gpu": "true"}
    text = refused(StatusCode.PERMISSION_DENIED, lambda: gate.auth.enrol(gate.enrolment(other, token), HERE))
    never = refused(
        StatusCode.PERMISSION_DENIED,
        lambda: gate.auth.enrol(gate.enrolment(other, "fedsim-token-" + "0" * 32), HERE),
    )
    assert text == never
    # The first key may ask again: its answer may have been lost.
    again = gate.auth.enrol(gate.enrolment(key, token), HERE)
    assert again == reply
    assert gate.audited("node.enrol") == 1
    assert gate.audited("enrol.denied") == 2


def test_the_name_of_an_invitation_counts_and_not_the_one_asked_for(gate: Gate) -> None:
    token = gate.nodes.invite("operator", name="lab")
    reply = gate.auth.enrol(gate.enrolment(Key.new(), token, "somebody-else"), HERE)
    assert reply.name == "lab"
    assert gate.nodes.get("lab").role == "operator"


def test_an_invitation_expires(gate: Gate, clock: Clock) -> None:
    token = gate.nodes.invite(valid_seconds=3600)
    clock.now += 3601
    refused(StatusCode.PERMISSION_DENIED, lambda: gate.auth.enrol(gate.enrolment(Key.new(), token), HERE))


def test_no_token_is_kept_that_could_be_used(gate: Gate, tmp_path: Path) -> None:
    token = gate.nodes.invite()
    ticket = gate.login(gate.member())
    gate.close()
    content = b"".join(p.read_bytes() for p in gate.folder.rglob("*") if p.is_file())
    assert len(content) > 1000
    for secret in (token.encode(), token.removeprefix("fedsim-token-").encode(), ticket):
        assert secret not in content
        assert secret.hex().encode() not in content
    gate.open()


def test_guessing_tokens_is_stopped_and_audited_in_bounds(gate: Gate, clock: Clock) -> None:
    good = gate.nodes.invite()
    for guess in range(FAILURES_PER_MINUTE):
        refused(
            StatusCode.PERMISSION_DENIED,
            lambda guess=guess: gate.auth.enrol(
                gate.enrolment(Key.new(), f"fedsim-token-{guess:032x}"), HERE
            ),
        )
    for _ in range(5):
        refused(StatusCode.RESOURCE_EXHAUSTED, lambda: gate.auth.enrol(gate.enrolment(Key.new(), good), HERE))
    assert gate.audited("enrol.denied") == FAILURES_PER_MINUTE
    elsewhere = gate.auth.enrol(gate.enrolment(Key.new(), gate.nodes.invite()), "10.0.0.8")
    assert elsewhere.state == pb.APPROVED
    clock.now += 61
    assert gate.auth.enrol(gate.enrolment(Key.new(), good), HERE).state == pb.APPROVED


def test_two_keys_at_once_cannot_share_a_token(gate: Gate) -> None:
    token = gate.nodes.invite()
    calls = [gate.enrolment(Key.new(), token) for _ in range(6)]

    def enrol(call: pb.Signed) -> bool:
        try:
            gate.auth.enrol(call, HERE)
        except Denied:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(enrol, calls)) == 1


@pytest.mark.parametrize("taken", ["site-a", "SITE-A"])
def test_a_name_is_one_nodes_alone(gate: Gate, taken: str) -> None:
    gate.member("site-a")
    token = gate.nodes.invite()
    refused(StatusCode.ALREADY_EXISTS, lambda: gate.auth.enrol(gate.enrolment(Key.new(), token, taken), HERE))
    # The token is still good.
    assert gate.auth.enrol(gate.enrolment(Key.new(), token, "site-b"), HERE).name == "site-b"


def test_a_name_is_kept_for_whom_it_was_promised(gate: Gate, clock: Clock) -> None:
    promised, other = gate.nodes.invite(name="site-a", valid_seconds=60), gate.nodes.invite()
    refused(
        StatusCode.ALREADY_EXISTS, lambda: gate.auth.enrol(gate.enrolment(Key.new(), other, "site-a"), HERE)
    )
    clock.now += 61
    assert gate.auth.enrol(gate.enrolment(Key.new(), other, "site-a"), HERE).name == "site-a"
    refused(StatusCode.PERMISSION_DENIED, lambda: gate.auth.enrol(gate.enrolment(Key.new(), promised), HERE))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../etc"}, {"name": "a b"}, {"name": "a\0"}, {"name": "a\r\nb"}, {"name": "🙂"},
        {"name": "x" * 10_000}, {"name": "0123456789abcdef"}, {"labels": {"a b": "c"}},
        {"labels": {"a": "c\n"}}, {"labels": {"name": "x"}},
        {"labels": {f"k{i}": "v" for i in range(65)}}, {"public_key": b"short"},
        {"public_key": b"\x01" + bytes(31)},
    ],
)  # fmt: skip
def test_names_and_labels_that_could_do_harm_are_refused(gate: Gate, wrong: dict[str, Any]) -> None:
    call = gate.enrolment(Key.new(), gate.nodes.invite(), **wrong)
    refused(StatusCode.INVALID_ARGUMENT, lambda: gate.auth.enrol(call, HERE))
    assert gate.nodes.list() == []


def test_without_a_token_a_key_comes_in_only_where_that_is_allowed(make: Callable[..., Gate]) -> None:
    closed, opened, careful = (
        make(),
        make(allow_anonymous=True),
        make(allow_anonymous=True, manual_approval=True),
    )
    refused(StatusCode.PERMISSION_DENIED, lambda: closed.auth.enrol(closed.enrolment(Key.new()), HERE))
    key = Key.new()
    reply = opened.auth.enrol(opened.enrolment(key), HERE)
    assert (reply.state, reply.name) == (pb.APPROVED, f"node-{key.node_id[:8]}")
    assert opened.nodes.get(reply.name).role == "client"
    # A wrong token is not an invitation to come in without one.
    bad = opened.enrolment(Key.new(), "fedsim-token-" + "0" * 32)
    refused(StatusCode.PERMISSION_DENIED, lambda: opened.auth.enrol(bad, HERE))
    waiting = Key.new()
    assert careful.auth.enrol(careful.enrolment(waiting), HERE).state == pb.PENDING
    text = refused(StatusCode.PERMISSION_DENIED, lambda: careful.login(waiting))
    assert "waits for approval" in text
    careful.nodes.approve(waiting.node_id)
    assert careful.auth.enrol(careful.enrolment(waiting), HERE).state == pb.APPROVED
    assert careful.peer(careful.login(waiting)).node_id == waiting.node_id


# ---------------------------------------------------------------- login


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


def test_what_was_signed_for_another_coordinator_is_refused(make: Callable[..., Gate]) -> None:
    gate, other = make(), make()
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


# ---------------------------------------------------------------- tickets


@pytest.mark.parametrize(
    "metadata",
    [
        None, (), (("x", "y"),), ((TICKET, b""),), ((TICKET, b"\0" * 32),), ((TICKET, "text"),),
        ((TICKET, b"a"), (TICKET, b"b")),
    ],
)  # fmt: skip
def test_without_a_ticket_nobody_is_known(gate: Gate, metadata: Any) -> None:
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.auth.peer(metadata))


def test_a_ticket_expires_and_is_renewed_before(gate: Gate, clock: Clock) -> None:
    ticket = gate.login(gate.member())
    peer = gate.peer(ticket)
    assert gate.auth.renew(peer) is None
    clock.now += 301
    renewed = gate.auth.renew(peer)
    assert renewed is not None
    assert renewed[1] == 900
    assert gate.auth.renew(peer) is None
    clock.now += 600  # the first one is over
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.peer(ticket))
    assert gate.peer(renewed[0]) == peer


def test_tickets_outlive_a_restart(gate: Gate, clock: Clock) -> None:
    key = gate.member()
    ticket = gate.login(key)
    clock.now += 301
    renewed = gate.auth.renew(gate.peer(ticket))
    assert renewed is not None
    gate.restart()
    assert gate.peer(ticket).node_id == gate.peer(renewed[0]).node_id == key.node_id
    with gate.database.read() as connection:
        digests = connection.scalars(select(tables.tickets.c.digest)).all()
    assert len(digests) == 2
    assert ticket not in digests
    clock.now += 900
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.peer(renewed[0]))


def test_a_second_process_supersedes_the_first_which_does_not_come_back(gate: Gate, clock: Clock) -> None:
    key = gate.member()
    old, new = b"a" * 16, b"b" * 16
    first = gate.login(key, old)
    peer = gate.peer(first)
    second = gate.login(key, new)

    def check() -> None:
        text = refused(StatusCode.FAILED_PRECONDITION, lambda: gate.peer(first))
        assert text.startswith("superseded")
        refused(StatusCode.FAILED_PRECONDITION, lambda: gate.login(key, old))
        assert gate.peer(second).session == new

    check()
    assert gate.auth.renew(peer) is None
    gate.restart()
    check()
    # The first one wakes up when all its tickets are over: it is still the older one.
    clock.now += 3600
    gate.login(gate.member())  # sweeps
    refused(StatusCode.FAILED_PRECONDITION, lambda: gate.login(key, old))
    gate.login(key, new)


def test_which_session_is_the_newest_does_not_depend_on_the_clock(gate: Gate, clock: Clock) -> None:
    key = gate.member()
    first = gate.login(key, b"a" * 16)
    clock.now -= 500
    second = gate.login(key, b"b" * 16)
    gate.restart()
    refused(StatusCode.FAILED_PRECONDITION, lambda: gate.peer(first))
    assert gate.peer(second).session == b"b" * 16


def test_people_may_run_several_commands_at_a_time(gate: Gate) -> None:
    key = gate.member(role="operator")
    tickets = [gate.login(key, bytes([n]) * 16) for n in range(5)]
    gate.restart()
    assert [gate.peer(t).session[0] for t in tickets] == [0, 1, 2, 3, 4]


def test_old_sessions_do_not_pile_up(gate: Gate) -> None:
    client, person = gate.member(), gate.member(role="viewer")
    for key in (client, person):
        for _ in range(80):
            gate.login(key, os.urandom(16))
    with gate.database.read() as connection:
        rows = connection.scalars(select(tables.tickets.c.node_id)).all()
    assert rows.count(client.node_id) == 16
    assert rows.count(person.node_id) == 64
    assert len(gate.auth._tickets._by_digest) == 80


def test_a_session_that_said_goodbye_is_over(gate: Gate) -> None:
    key = gate.member()
    ticket = gate.login(key)
    gate.auth.drop(gate.peer(ticket))
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.peer(ticket))
    gate.restart()
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.peer(ticket))
    gate.login(key, b"n" * 16)


def test_a_revoked_key_is_out_at_once_and_for_good(gate: Gate) -> None:
    key = gate.member("site-a")
    ticket = gate.login(key)
    told: list[str] = []
    gate.nodes.on_revoke.append(told.append)
    gate.nodes.revoke("site-a", by="somebody")
    assert told == [key.node_id]
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.peer(ticket))
    refused(StatusCode.PERMISSION_DENIED, lambda: gate.login(key))
    refused(
        StatusCode.PERMISSION_DENIED,
        lambda: gate.auth.enrol(gate.enrolment(key, gate.nodes.invite()), HERE),
    )
    gate.restart()
    refused(StatusCode.UNAUTHENTICATED, lambda: gate.peer(ticket))
    assert gate.audited("node.revoke") == 1


def test_a_revocation_between_the_check_and_the_ticket_wins(gate: Gate) -> None:
    key = gate.member()
    inner = gate.auth._tickets.issue

    def late(*args: Any, **kwargs: Any) -> bytes:
        gate.nodes.revoke(key.node_id)
        return inner(*args, **kwargs)

    gate.auth._tickets.issue = late  # type: ignore[method-assign]
    refused(StatusCode.PERMISSION_DENIED, lambda: gate.login(key))
    with gate.database.read() as connection:
        assert connection.scalars(select(tables.tickets.c.digest)).all() == []
    assert gate.auth._tickets._by_digest == {}


# ---------------------------------------------------------------- certificates, audit, secrets


def test_with_client_certificates_a_key_needs_the_one_with_its_name(make: Callable[..., Gate]) -> None:
    gate = make(bind_certificates=True)
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

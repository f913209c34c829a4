"""How a key comes in and how it does not: nonces, invitations, names."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server.auth import FAILURES_PER_MINUTE, Denied
from fedsim.server.nonces import Nonces
from tests.gate import HERE, Clock, Gate, refused


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


def test_without_a_token_a_key_comes_in_only_where_that_is_allowed(make_gate: Callable[..., Gate]) -> None:
    closed, opened, careful = (
        make_gate(),
        make_gate(allow_anonymous=True),
        make_gate(allow_anonymous=True, manual_approval=True),
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

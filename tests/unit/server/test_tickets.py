"""Sessions and their tickets: renewed, superseded, revoked, over."""

from __future__ import annotations

import os
from typing import Any

import pytest
from grpc import StatusCode
from sqlalchemy import select

from fedsim.server import tables
from fedsim.transport import TICKET
from tests.gate import HERE, Clock, Gate, refused


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

"""How a key comes in: invitations, and what becomes of them.

An invitation is a token of 128 random bits that works once and for a time; the database holds its SHA-256.
What it states (role, name, labels) counts, whatever the applicant asks for. Everything here happens inside
one transaction of the ledger, so a token cannot be used twice.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, func, insert, select, update

from fedsim.identity import node_id_of
from fedsim.server import tables
from fedsim.server.node_rows import CLIENT, REVOKED, Node, labels_text, named, one_node, select_node

TOKEN_PREFIX = "fedsim-token-"
"""What tokens begin with, so that programs which look for leaked secrets find them."""
_TOKEN_BYTES = 16


class Applicant(NamedTuple):
    """A key that has proved itself and wants to come in.

    Args:
        token: empty where it has none.
        name, labels: that it asks for, checked; the name may be empty.
    """

    public_key: bytes
    token: str
    name: str
    labels: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Applicant({node_id_of(self.public_key)})"


class Enrolled(NamedTuple):
    """A node, and whether it came in just now."""

    node: Node
    new: bool


class NameTaken(Exception):
    """Another node has this name, or an invitation keeps it for one."""


def token_digest(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).digest()


def write_invitation(
    connection: Connection, role: str, name: str, labels: Mapping[str, str], *, now: float, expires: float
) -> str:
    """The token of a new invitation."""
    token = TOKEN_PREFIX + secrets.token_hex(_TOKEN_BYTES)
    connection.execute(
        insert(tables.enrol_tokens).values(
            digest=token_digest(token),
            role=role,
            labels=labels_text(labels),
            name=name,
            created=now,
            expires=expires,
        )
    )
    return token


def enrol(
    connection: Connection,
    applicant: Applicant,
    *,
    anonymous: bool,
    state: str,
    check: Callable[[str, str], None],
    now: float,
) -> Enrolled | None:
    """Let a key in, or say that it is in already; None where it may not come in.

    Args:
        anonymous: whether a key without a token becomes a client.
        state: of a new node, pending or approved.
        check: called with identifier and name before anything is written; may refuse by raising.

    Raises:
        NameTaken: nothing was written, the invitation is still good.
    """
    node_id = node_id_of(applicant.public_key)
    known = select_node(connection, tables.nodes.c.node_id == node_id)
    if known is not None:
        # Asked again, as after an answer that was lost: the token was used up by this very key.
        same = known.public_key == applicant.public_key and known.state != REVOKED
        return Enrolled(known, False) if same else None
    invitation = _open_invitation(connection, applicant.token, now)
    if invitation is None and (applicant.token or not anonymous):
        return None
    role, name, labels = CLIENT, applicant.name, dict(applicant.labels)
    if invitation is not None:
        role = invitation.role
        labels |= json.loads(invitation.labels)
        name = invitation.name or name
    name = name or f"node-{node_id[:8]}"
    check(node_id, name)
    if named(connection, name) is not None or _kept(connection, name, applicant.token, now):
        raise NameTaken(name)
    connection.execute(
        insert(tables.nodes).values(
            node_id=node_id,
            public_key=applicant.public_key,
            name=name,
            role=role,
            state=state,
            labels=labels_text(labels),
            created=now,
        )
    )
    if invitation is not None:
        t = tables.enrol_tokens
        connection.execute(
            update(t).where(t.c.digest == invitation.digest).values(used_by=node_id, used_at=now)
        )
    return Enrolled(one_node(connection, node_id), True)


def _open_invitation(connection: Connection, token: str, now: float) -> Row[Any] | None:
    t = tables.enrol_tokens
    query = select(t).where(t.c.digest == token_digest(token), t.c.used_by.is_(None), t.c.expires > now)
    return connection.execute(query).first()


def _kept(connection: Connection, name: str, token: str, now: float) -> bool:
    """Whether an invitation other than the applicant's keeps this name for somebody."""
    t = tables.enrol_tokens
    others = (func.lower(t.c.name) == name.lower()) & (t.c.digest != token_digest(token))
    query = select(t.c.digest).where(others, t.c.used_by.is_(None), t.c.expires > now).limit(1)
    return connection.scalar(query) is not None

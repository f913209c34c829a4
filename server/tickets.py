"""Tickets: what a caller shows after it has logged in, until it logs in anew.

A ticket is 32 random bytes, bound to a key and to the session of one process. The coordinator keeps the
SHA-256 alone, in memory for every call and in the database so that a restart throws nobody out. A client has
one voice: a login with another session supersedes the older one, which is told so and does not come back.
People run several commands at a time, so their sessions stand side by side.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from grpc import StatusCode
from sqlalchemy import Connection, delete, insert, select, update

from fedsim.server import tables
from fedsim.server.database import Database
from fedsim.server.denied import Denied
from fedsim.server.node_rows import APPROVED, CLIENT

TICKET_BYTES = 32
TICKET_SECONDS = 900.0
_RENEW_AFTER = 1 / 3  # of its time; then two heartbeats in a row may be lost
_MOST_TICKETS = {CLIENT: 16}  # of one key, old sessions among them
_MOST_TICKETS_OF_PEOPLE = 64
_SWEEP_SECONDS = 60.0

log = logging.getLogger(__name__)


class Peer(NamedTuple):
    """Who calls.

    Args:
        role: client, viewer, operator or admin.
        public_key: 32 bytes.
        session: 16 random bytes of the calling process.
    """

    node_id: str
    name: str
    role: str
    public_key: bytes
    session: bytes


class _Ticket(NamedTuple):
    peer: Peer
    issued: float
    expires: float


class Tickets:
    """All tickets in force; any thread.

    Args:
        seconds: for which a ticket is valid.
        wall: seconds since 1970, as tickets outlive the process.
    """

    def __init__(
        self, database: Database, *, seconds: float = TICKET_SECONDS, wall: Callable[[], float] = time.time
    ) -> None:
        self.seconds = seconds
        self._database = database
        self._wall = wall
        self._door = threading.RLock()
        self._by_digest: dict[bytes, _Ticket] = {}
        self._of_node: dict[str, dict[bytes, _Ticket]] = {}
        self._current: dict[str, bytes] = {}  # node -> newest session of a client
        self._swept = wall()
        self._load()

    def find(self, ticket: bytes) -> Peer:
        """Whose ticket this is.

        Raises:
            Denied: UNAUTHENTICATED, nobody's; FAILED_PRECONDITION, of a client that was superseded.
        """
        with self._door:
            found = self._by_digest.get(_digest(ticket))
            if found is None:
                raise Denied(StatusCode.UNAUTHENTICATED, "the ticket is not valid: log in")
            if self._superseded(found.peer.node_id, found.peer.session):
                raise superseded()
            if found.expires <= self._wall():
                raise Denied(StatusCode.UNAUTHENTICATED, "the ticket has expired: log in")
            return found.peer

    def issue(self, peer: Peer, *, address: str = "", build: str = "") -> bytes:
        """A ticket for a session that has proved its key; waits for the disk.

        Raises:
            Denied: FAILED_PRECONDITION, a newer session has superseded this one; PERMISSION_DENIED, the
                key is not approved (any more).
        """
        with self._door:
            sessions = {t.peer.session for t in self._of_node.get(peer.node_id, {}).values()}
            if peer.session in sessions and self._superseded(peer.node_id, peer.session):
                raise superseded()
        facts: dict[str, object] = {"address": address, "build": build}
        ticket, future = self._write(peer, facts)
        future.result()
        return ticket

    def renew(self, peer: Peer) -> tuple[bytes, float] | None:
        """A new ticket and its seconds where the newest of this session is getting old; waits for nothing."""
        with self._door:
            if self._superseded(peer.node_id, peer.session):
                return None
            of_node = self._of_node.get(peer.node_id, {}).values()
            newest = max((t.issued for t in of_node if t.peer.session == peer.session), default=None)
            if newest is None or self._wall() - newest < self.seconds * _RENEW_AFTER:
                return None
            ticket, future = self._write(peer, {}, ahead=True)
        future.add_done_callback(_report)
        return ticket, self.seconds

    def drop(self, peer: Peer) -> None:
        """The session is over: its tickets are worth nothing any more."""
        t = tables.tickets
        mine = (t.c.node_id == peer.node_id) & (t.c.session == peer.session)
        self._database.writer.run(
            lambda connection: connection.execute(delete(t).where(mine)),
        )
        with self._door:
            for digest, ticket in list(self._of_node.get(peer.node_id, {}).items()):
                if ticket.peer.session == peer.session:
                    self._forget(digest)

    def revoke(self, node_id: str) -> None:
        """No ticket of this node is valid any more; whoever revoked the node removed them from the disk."""
        with self._door:
            for digest in list(self._of_node.get(node_id, {})):
                self._forget(digest)
            self._current.pop(node_id, None)

    def __repr__(self) -> str:
        return f"Tickets({len(self._by_digest)})"

    def _write(
        self, peer: Peer, facts: dict[str, object], *, ahead: bool = False
    ) -> tuple[bytes, Future[None]]:
        """Put a new ticket into database and memory; `ahead`: into memory at once."""
        ticket = secrets.token_bytes(TICKET_BYTES)
        digest = _digest(ticket)
        with self._door:
            now = self._wall()
            of_node = self._of_node.get(peer.node_id, {})
            # Which session is the newest must not depend on a clock that was set back.
            last = max((t.issued for t in of_node.values()), default=0.0)
            entry = _Ticket(peer, max(now, last + 0.001), now + self.seconds)

        def write(connection: Connection) -> None:
            n = tables.nodes
            state = connection.scalar(select(n.c.state).where(n.c.node_id == peer.node_id))
            if state != APPROVED:
                raise not_let_in()
            connection.execute(update(n).where(n.c.node_id == peer.node_id).values(last_seen=now, **facts))
            connection.execute(
                insert(tables.tickets).values(
                    digest=digest,
                    node_id=peer.node_id,
                    session=peer.session,
                    issued=entry.issued,
                    expires=entry.expires,
                )
            )
            _trim(connection, peer, now)

        def remember(_: object = None) -> None:
            with self._door:
                self._sweep()
                self._keep(digest, entry)
                if peer.role == CLIENT and not ahead:
                    self._current[peer.node_id] = peer.session

        if ahead:
            remember()
            return ticket, self._database.writer.submit(write)
        # In the order of the commits, also against a revocation.
        return ticket, self._database.writer.submit(write, remember)

    def _load(self) -> None:
        n, t = tables.nodes, tables.tickets
        columns = (
            n.c.node_id,
            n.c.name,
            n.c.role,
            n.c.public_key,
            t.c.session,
            t.c.digest,
            t.c.issued,
            t.c.expires,
        )
        query = (
            select(*columns).join_from(t, n, t.c.node_id == n.c.node_id)
            .where(n.c.state == APPROVED).order_by(t.c.issued)
        )  # fmt: skip
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        for *who, digest, issued, expires in rows:
            peer = Peer(*who)
            self._keep(digest, _Ticket(peer, issued, expires))
            if peer.role == CLIENT:
                self._current[peer.node_id] = peer.session

    def _superseded(self, node_id: str, session: bytes) -> bool:
        return self._current.get(node_id, session) != session

    def _keep(self, digest: bytes, ticket: _Ticket) -> None:
        self._by_digest[digest] = ticket
        of_node = self._of_node.setdefault(ticket.peer.node_id, {})
        of_node[digest] = ticket
        while len(of_node) > _most(ticket.peer.role):
            self._forget(min(of_node, key=lambda d: of_node[d].issued))

    def _forget(self, digest: bytes) -> None:
        ticket = self._by_digest.pop(digest)
        of_node = self._of_node[ticket.peer.node_id]
        del of_node[digest]
        if not of_node:
            del self._of_node[ticket.peer.node_id]

    def _sweep(self) -> None:
        """Forget what has expired, but for sessions that were superseded: they must not come back."""
        now = self._wall()
        if now - self._swept < _SWEEP_SECONDS:
            return
        self._swept = now
        for digest, ticket in list(self._by_digest.items()):
            peer = ticket.peer
            if ticket.expires <= now and not self._superseded(peer.node_id, peer.session):
                self._forget(digest)


def superseded() -> Denied:
    """A newer process uses the same key."""
    text = "superseded: a newer process has logged in with the same key"
    return Denied(StatusCode.FAILED_PRECONDITION, text)


def not_let_in() -> Denied:
    """One text for keys that nobody knows and for those that were revoked."""
    return Denied(StatusCode.PERMISSION_DENIED, "this key may not take part: it is not known, or was revoked")


def _digest(ticket: bytes) -> bytes:
    return hashlib.sha256(ticket).digest()


def _most(role: str) -> int:
    return _MOST_TICKETS.get(role, _MOST_TICKETS_OF_PEOPLE)


def _trim(connection: Connection, peer: Peer, now: float) -> None:
    """Remove what is of no use: expired tickets of this session, and the oldest beyond a number."""
    t = tables.tickets
    mine = t.c.node_id == peer.node_id
    connection.execute(delete(t).where(mine, t.c.session == peer.session, t.c.expires <= now))
    newest = select(t.c.digest).where(mine).order_by(t.c.issued.desc()).offset(_most(peer.role))
    surplus = connection.scalars(newest).all()
    if surplus:
        connection.execute(delete(t).where(t.c.digest.in_(surplus)))


def _report(future: Future[None]) -> None:
    error = future.exception()
    if error is not None and not isinstance(error, Denied):
        log.warning("a renewed ticket is not on the disk, a restart will ask for a login: %s", error)

"""Keys that are known: who was invited, who waits, who may take part, who was shut out.

A key comes in with an invitation (a token that works once), by an administrator's hand, or, on loopback, by
itself. Names are unique whatever their case, labels that an invitation sets are not the client's to change,
and a revoked key stays revoked. Every act is written to the audit log.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future

from sqlalchemy import Connection, delete, insert, select

from fedsim.errors import ConfigError
from fedsim.identity import node_id_of
from fedsim.schema import shown
from fedsim.server import enrolment, tables
from fedsim.server.audit import Audit
from fedsim.server.database import Database
from fedsim.server.enrolment import Applicant, Enrolled
from fedsim.server.labels import check_labels, check_name, labels_with_name, parse
from fedsim.server.members import Candidate
from fedsim.server.node_rows import (
    ADMIN,
    APPROVED,
    CLIENT,
    REVOKED,
    ROLES,
    Node,
    change,
    labels_text,
    note_seen,
    one_node,
    refuse_taken,
    select_node,
    select_nodes,
    unusable,
)

Candidates = list[Candidate]

log = logging.getLogger(__name__)

TOKEN_SECONDS = 86_400.0
MOST_TOKEN_SECONDS = 30 * 86_400.0
LOCAL = "local"
"""In the audit log: whoever owns the state folder."""


class Nodes:
    """Who is known; any thread. What changes something waits for the disk.

    `by` of its methods names who did it, for the audit log: a node's identifier, or `LOCAL`.

    Args:
        wall: seconds since 1970.
    """

    def __init__(self, database: Database, audit: Audit, *, wall: Callable[[], float] = time.time) -> None:
        self.on_revoke: list[Callable[[str], None]] = []
        """Called with the node's id, in the writer's thread, as soon as a revocation is on the disk."""
        self._database = database
        self._audit = audit
        self._wall = wall
        self._door = threading.Lock()
        self._clients: Sequence[Node] | None = None  # approved ones, until something changes
        self._changes = 0

    def invite(
        self,
        role: str = CLIENT,
        valid_seconds: float = TOKEN_SECONDS,
        labels: Mapping[str, str] | None = None,
        name: str = "",
        *,
        by: str = "",
    ) -> str:
        """A token that lets one unknown key in; only its digest is kept.

        Args:
            labels: that the node gets and cannot replace.
            name: that the node gets; empty for the one it asks for.

        Raises:
            ConfigError: FS-SEC-007, name, labels, role or time cannot be used.
        """
        if role not in ROLES:
            raise unusable("there is no such role", shown(role), f"roles are {', '.join(ROLES)}")
        if not 0 < valid_seconds <= MOST_TOKEN_SECONDS:
            why = f"an invitation is valid for at most {MOST_TOKEN_SECONDS / 86_400:g} days"
            raise unusable("an invitation cannot be valid for so long", f"{valid_seconds:g} s", why)
        given = check_labels(labels or {})
        if name:
            check_name(name)
        now = self._wall()
        expires = now + valid_seconds

        def write(connection: Connection) -> str:
            if name:
                refuse_taken(connection, name)
            return enrolment.write_invitation(connection, role, name, given, now=now, expires=expires)

        token = self._database.writer.run(write)
        self._audit.write("node.invite", by=by, role=role, name=name, labels=given, expires=expires)
        return token

    def enrol(
        self, applicant: Applicant, *, anonymous: bool, state: str, check: Callable[[str, str], None]
    ) -> Enrolled | None:
        """See `enrolment.enrol`; the caller writes to the audit log."""
        now = self._wall()
        found = self._database.writer.run(
            lambda connection: enrolment.enrol(
                connection, applicant, anonymous=anonymous, state=state, check=check, now=now
            )
        )
        self._forget_clients()
        return found

    def approve(self, node: str, *, by: str = "") -> Node:
        """Let a node take part that waits for it.

        Raises:
            ConfigError: FS-SEC-006, there is none; FS-SEC-009, it was revoked.
        """

        def write(connection: Connection) -> Node:
            found = one_node(connection, node)
            if found.state == REVOKED:
                raise _revoked(found)
            return change(connection, found, state=APPROVED)

        return self._changed("node.approve", write, by)

    def revoke(self, node: str, *, by: str = "") -> Node:
        """Shut a node out, at once and for good: its tickets are gone when this returns.

        Raises:
            ConfigError: FS-SEC-006, there is none.
        """

        def write(connection: Connection) -> Node:
            found = one_node(connection, node)
            connection.execute(delete(tables.tickets).where(tables.tickets.c.node_id == found.node_id))
            return change(connection, found, state=REVOKED, revoked=self._wall())

        def after(revoked: Node) -> None:
            for callback in self.on_revoke:
                callback(revoked.node_id)

        return self._changed("node.revoke", write, by, after)

    def label(
        self, node: str, labels: Mapping[str, str], remove: Collection[str] = (), *, by: str = ""
    ) -> Node:
        """Set and remove labels.

        Raises:
            ConfigError: FS-SEC-006, there is no such node; FS-SEC-007, a label cannot be used.
        """
        given = check_labels(labels)

        def write(connection: Connection) -> Node:
            found = one_node(connection, node)
            kept = {key: value for key, value in found.labels.items() if key not in remove}
            return change(connection, found, labels=labels_text(check_labels(kept | given)))

        return self._changed("node.label", write, by)

    def bootstrap_admin(self, public_key: bytes, name: str = ADMIN) -> Node:
        """Make a key an administrator by the hand of whoever owns the state folder.

        Raises:
            ConfigError: FS-SEC-007, another node has that name; FS-SEC-009, the key was revoked.
        """
        node_id = node_id_of(public_key)
        check_name(name)

        def write(connection: Connection) -> Node:
            known = select_node(connection, tables.nodes.c.node_id == node_id)
            if known is not None:
                if known.state == REVOKED:
                    raise _revoked(known)
                return change(connection, known, role=ADMIN, state=APPROVED)
            refuse_taken(connection, name)
            connection.execute(
                insert(tables.nodes).values(
                    node_id=node_id,
                    public_key=public_key,
                    name=name,
                    role=ADMIN,
                    state=APPROVED,
                    created=self._wall(),
                )
            )
            return one_node(connection, node_id)

        return self._changed("node.bootstrap_admin", write, LOCAL)

    def has_admin(self) -> bool:
        """Whether an approved administrator is known."""
        n = tables.nodes
        query = select(n.c.node_id).where(n.c.role == ADMIN, n.c.state == APPROVED).limit(1)
        with self._database.read() as connection:
            return connection.scalar(query) is not None

    def seen(self, devices: Mapping[str, str]) -> None:
        """Note which nodes were there just now, and what each computes on; waits for nothing.

        Args:
            devices: node identifier -> device; one that is empty leaves what is known.
        """
        now = self._wall()
        future = self._database.writer.submit(lambda connection: note_seen(connection, devices, now))
        future.add_done_callback(_report)

    def candidates(self, expression: str, node_ids: Collection[str]) -> Candidates:
        """Those of `node_ids` that are approved clients and that a label expression selects.

        Raises:
            ConfigError: FS-SEC-008, the expression cannot be understood.
        """
        return [
            Candidate(node.node_id, node.name, dict(node.labels))
            for node in self._selected(expression)
            if node.node_id in node_ids
        ]

    def get(self, node: str) -> Node:
        """The node of this identifier or name.

        Raises:
            ConfigError: FS-SEC-006, there is none.
        """
        with self._database.read() as connection:
            return one_node(connection, node)

    def list(self) -> Sequence[Node]:
        """Every key, in the order of the names."""
        with self._database.read() as connection:
            return select_nodes(connection)

    def _changed(
        self,
        action: str,
        write: Callable[[Connection], Node],
        by: str,
        after: Callable[[Node], None] | None = None,
    ) -> Node:
        node = self._database.writer.submit(write, after).result()
        self._forget_clients()
        labels = dict(node.labels)
        self._audit.write(action, by=by, node=node.node_id, name=node.name, role=node.role, labels=labels)
        return node

    def _selected(self, expression: str) -> Sequence[Node]:
        test = parse(expression)
        return [node for node in self._approved() if test(labels_with_name(node.labels, node.name))]

    def _approved(self) -> Sequence[Node]:
        with self._door:
            found, changes = self._clients, self._changes
        if found is None:
            n = tables.nodes
            with self._database.read() as connection:
                found = select_nodes(connection, n.c.state == APPROVED, n.c.role == CLIENT)
            with self._door:
                if changes == self._changes:
                    self._clients = found
        return found

    def _forget_clients(self) -> None:
        with self._door:
            self._clients = None
            self._changes += 1


def _report(future: Future[None]) -> None:
    error = future.exception()
    if error is not None:
        log.warning("when nodes were seen last is not on the disk: %s", error)


def _revoked(node: Node) -> ConfigError:
    return ConfigError(
        "a revoked node is not let in again",
        code="FS-SEC-009",
        where=node.name,
        why="its key is known to be lost, or its owner to have left",
        hint="let it make a new key and invite that one: fedsim node invite",
    )

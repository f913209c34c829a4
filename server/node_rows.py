"""The rows of `nodes`: read into values, found by identifier or name, changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, bindparam, func, select, update

from fedsim.errors import ConfigError
from fedsim.identity import fingerprint_of
from fedsim.schema import shown
from fedsim.server import tables

PENDING, APPROVED, REVOKED = "pending", "approved", "revoked"
CLIENT, ADMIN = "client", "admin"
ROLES = (CLIENT, "viewer", "operator", ADMIN)


@dataclass(frozen=True, slots=True)
class Node:
    """A key that the coordinator knows.

    Args:
        public_key: 32 bytes.
        state: pending, approved or revoked.
        role: client, viewer, operator or admin.
        created, last_seen: seconds since 1970; 0 for never.
        build, device: what it said of itself.
    """

    node_id: str
    public_key: bytes
    name: str
    role: str
    state: str
    labels: Mapping[str, str]
    created: float
    last_seen: float
    address: str
    build: str
    device: str

    @property
    def fingerprint(self) -> str:
        """Of its key, for people to compare."""
        return fingerprint_of(self.public_key)


def select_nodes(connection: Connection, *where: ColumnElement[bool]) -> Sequence[Node]:
    """The nodes that fulfil all conditions, in the order of their names."""
    n = tables.nodes
    return [_node(row) for row in connection.execute(select(n).where(*where).order_by(n.c.name))]


def select_node(connection: Connection, condition: ColumnElement[bool]) -> Node | None:
    """The node that fulfils a condition, if there is one."""
    found = connection.execute(select(tables.nodes).where(condition)).first()
    return None if found is None else _node(found)


def named(connection: Connection, name: str) -> Node | None:
    """The node of this name, whatever its case."""
    return select_node(connection, func.lower(tables.nodes.c.name) == name.lower())


def one_node(connection: Connection, node: str) -> Node:
    """The node of this identifier or name.

    Raises:
        ConfigError: FS-SEC-006, there is none.
    """
    found = select_node(connection, tables.nodes.c.node_id == node.lower()) or named(connection, node)
    if found is None:
        raise ConfigError(
            f"no node is called {shown(node[:80])}",
            code="FS-SEC-006",
            where="node",
            why="it is neither an identifier nor a name that this coordinator knows",
            hint="fedsim node ls lists them",
        )
    return found


def refuse_taken(connection: Connection, name: str) -> None:
    """Raise where a node has this name: FS-SEC-007."""
    taken = named(connection, name)
    if taken is not None:
        why = f"node {taken.node_id} ({taken.state}) has it"
        raise unusable("this name is taken", shown(name), why)


def change(connection: Connection, node: Node, **values: object) -> Node:
    """The node after its row was given these values."""
    n = tables.nodes
    connection.execute(update(n).where(n.c.node_id == node.node_id).values(values))
    return one_node(connection, node.node_id)


def note_seen(connection: Connection, devices: Mapping[str, str], now: float) -> None:
    """These nodes were there at `now`; a device that is empty leaves what is known."""
    n = tables.nodes
    device = func.coalesce(func.nullif(bindparam("said"), ""), n.c.device)
    one = update(n).where(n.c.node_id == bindparam("of")).values(device=device, last_seen=bindparam("now"))
    rows = [{"of": node_id, "said": said, "now": now} for node_id, said in devices.items()]
    connection.execute(one, rows)


def _node(row: Row[Any]) -> Node:
    return Node(
        node_id=row.node_id,
        public_key=row.public_key,
        name=row.name,
        role=row.role,
        state=row.state,
        labels=json.loads(row.labels),
        created=row.created,
        last_seen=row.last_seen or 0.0,
        address=row.address,
        build=row.build,
        device=row.device,
    )


def labels_text(labels: Mapping[str, str]) -> str:
    """Labels as the database holds them."""
    return json.dumps(dict(labels), sort_keys=True)


def unusable(what: str, where: str, why: str) -> ConfigError:
    """FS-SEC-007: a name, label, role or time cannot be used."""
    return ConfigError(what, code="FS-SEC-007", where=where, why=why, hint="choose another one")

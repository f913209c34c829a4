"""The keys in a coordinator's state folder: its own identity, and that of the first administrator.

Clients know a coordinator by its key. So a new one is made for a new folder alone: where the database knows
an identity, its key must be there.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fedsim.errors import EnvironmentProblem
from fedsim.identity import Key, node_id_of
from fedsim.server.database import Database
from fedsim.server.node_rows import ADMIN, REVOKED
from fedsim.server.nodes import Nodes

IDENTITY, ADMIN_KEY, AUDIT = "identity.key", "admin.key", "audit.jsonl"
_FACT = "server_id"

log = logging.getLogger(__name__)


def server_key(folder: Path, database: Database) -> Key:
    """The coordinator's key, made where the folder is new.

    Raises:
        EnvironmentProblem: FS-SEC-011, it is gone or is another one than clients know; FS-SEC-001, FS-SEC-002
            and those of files.
    """
    path = folder / IDENTITY
    known = database.fact(_FACT)
    if known is not None and not path.exists():
        raise _lost(path, f"clients know this coordinator as {node_id_of(bytes.fromhex(known))}")
    if path.exists():
        key = Key.load(path)
    else:
        key = Key.new()
        key.save(path)
    if known is None:
        database.remember(_FACT, key.public.hex())
    elif known != key.public.hex():
        expected = node_id_of(bytes.fromhex(known))
        raise _lost(path, f"it is the key of {key.node_id}, clients know this coordinator as {expected}")
    return key


def first_admin(folder: Path, nodes: Nodes) -> Path | None:
    """Where nobody administers the coordinator yet: make ``admin.key`` and let it in; else None.

    A key that was revoked is neither let in again nor replaced, and no reason not to start: whoever owns
    the folder can invite somebody.

    Raises:
        EnvironmentProblem: the key cannot be made or read.
    """
    if nodes.has_admin():
        return None
    path = folder / ADMIN_KEY
    if path.exists():
        key = Key.load(path)
    else:
        key = Key.new()
        key.save(path)
    known = nodes.list()
    if any(node.node_id == key.node_id and node.state == REVOKED for node in known):
        log.warning("nobody administers this coordinator: fedsim node invite --role admin --state %s", folder)
        return None
    taken = any(node.name.lower() == ADMIN and node.node_id != key.node_id for node in known)
    nodes.bootstrap_admin(key.public, f"{ADMIN}-{key.node_id[:8]}" if taken else ADMIN)
    return path


def _lost(path: Path, why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        "the coordinator's own key is not the one that its clients know",
        code="FS-SEC-011",
        where=str(path),
        why=why,
        hint="restore the file from a copy; with another key every client would have to be invited anew",
    )

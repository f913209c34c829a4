"""The coordinator's tables, in SQLAlchemy Core: one definition for SQLite and PostgreSQL.

Times are seconds since 1970 (``REAL``), identifiers of the wire are bytes, identifiers that people
read (node, run) are hexadecimal text, and what only the code reads is JSON text. The tables as they
are created lie in ``migrations/versions``; a test holds the two equal.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeEngine

# Without names PostgreSQL and SQLite choose different ones, and a later migration could not drop them.
NAMES = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
}
metadata = MetaData(naming_convention=NAMES)

# SQLite counts up only a column that is exactly INTEGER; there it has 64 bits all the same.
_revision: TypeEngine[int] = BigInteger().with_variant(Integer(), "sqlite")


def _run(*, primary_key: bool = False) -> Column[str]:
    return Column("run_id", String(12), ForeignKey("runs.run_id"), nullable=False, primary_key=primary_key)


meta = Table(
    "meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)
"""``schema``, ``server_id`` (hex), ``incarnation``, ``created``."""

nodes = Table(
    "nodes",
    metadata,
    Column("node_id", String(16), primary_key=True),
    Column("public_key", LargeBinary, nullable=False, unique=True),
    Column("name", Text, nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("labels", Text, nullable=False, server_default="{}"),
    Column("created", Double, nullable=False),
    Column("last_seen", Double),
    Column("address", Text, nullable=False, server_default=""),
    Column("build", Text, nullable=False, server_default=""),
    Column("device", Text, nullable=False, server_default=""),
    Column("strikes", Integer, nullable=False, server_default="0"),
    Column("revoked", Double),
    Column("detail", Text, nullable=False, server_default=""),
)
"""Keys that asked to take part; ``state`` is pending, approved or revoked."""

enrol_tokens = Table(
    "enrol_tokens",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("role", String(16), nullable=False),
    Column("labels", Text, nullable=False, server_default="{}"),
    Column("name", Text, nullable=False, server_default=""),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False),
    Column("used_by", String(16)),
    Column("used_at", Double),
)
"""One-time invitations; only the SHA-256 of a token is kept."""

tickets = Table(
    "tickets",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("node_id", String(16), nullable=False, index=True),
    Column("session", LargeBinary, nullable=False),
    Column("issued", Double, nullable=False),
    Column("expires", Double, nullable=False),
)
"""Tickets in force, hashed: they stay valid over a restart."""

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(12), primary_key=True),
    Column("name", Text, nullable=False),
    Column("run_key", Text, unique=True),
    Column("content_digest", LargeBinary, nullable=False),
    Column("config", Text, nullable=False),
    Column("nodes", Text, nullable=False),
    Column("state", String(32), nullable=False),
    Column("detail", Text, nullable=False, server_default=""),
    Column("created", Double, nullable=False),
    Column("folder", Text, nullable=False),
    Column("rounds_done", Integer, nullable=False, server_default="0"),
    Column("recoveries", Integer, nullable=False, server_default="0"),
    Column("bytes_down", BigInteger, nullable=False, server_default="0"),
    Column("bytes_up", BigInteger, nullable=False, server_default="0"),
    Column("client_seconds", Double, nullable=False, server_default="0"),
)
"""``config`` is TOML; ``run_key`` makes submitting a run idempotent."""

run_members = Table(
    "run_members",
    metadata,
    _run(primary_key=True),
    Column("client", Integer, primary_key=True, autoincrement=False),
    Column("node_id", String(16), nullable=False),
    Column("strikes", Integer, nullable=False, server_default="0"),
    Column("excluded", Text),
    UniqueConstraint("run_id", "node_id"),
)
"""Stable client indices of a run; ``excluded`` is the reason, NULL where the client takes part."""

windows = Table(
    "windows",
    metadata,
    _run(primary_key=True),
    Column("window", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("outcome", String(32), nullable=False),
    Column("record", Text, nullable=False),
    Column("state_name", Text, nullable=False, server_default=""),
    Column("state_digest", LargeBinary),
    Column("journal_seq", BigInteger, nullable=False, server_default="0"),
    Column("clock", Double, nullable=False, server_default="0"),
    Column("committed_at", Double, nullable=False),
)
"""One row per committed (or failed) window; its presence is the commit."""

tasks = Table(
    "tasks",
    metadata,
    Column("task_id", LargeBinary, primary_key=True),
    _run(),
    Column("window", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("client", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("round_index", Integer, nullable=False),
    Column("round_attempt", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("dispatched", Double, nullable=False),
    Column("local", Text, nullable=False, server_default=""),
    Column("steps", Integer, nullable=False, server_default="0"),
    Column("message_digest", LargeBinary),
    Column("lent_digest", LargeBinary),
    Column("folded_in", Integer),
    Index(None, "run_id", "client"),
)
"""The plan: persisted before any offer. ``folded_in`` is the version that contains the update."""

submissions = Table(
    "submissions",
    metadata,
    Column("task_id", LargeBinary, primary_key=True),
    _run(),
    Column("client", Integer, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("verdict", Integer, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("digest", LargeBinary),
    Column("size", BigInteger, nullable=False, server_default="0"),
    Column("place", Text, nullable=False, server_default=""),
    Column("examples", BigInteger, nullable=False, server_default="0"),
    Column("local_steps", BigInteger, nullable=False, server_default="0"),
    Column("normaliser", Double),  # NULL where the optimiser has none
    Column("train_seconds", Double, nullable=False, server_default="0"),
    Column("metrics", Text, nullable=False, server_default="{}"),
    Column("body", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("received", Double, nullable=False),
    UniqueConstraint("run_id", "key"),
    Index(None, "run_id", "seq"),
)
"""The ledger of answers: one row per task, whatever the verdict."""

journal = Table(
    "journal",
    metadata,
    _run(primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("window", Integer, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("now", Double, nullable=False),
    Column("payload", Text, nullable=False, server_default="{}"),
)
"""What happened in a run, in order: enough to replay it."""

uploads = Table(
    "uploads",
    metadata,
    Column("node_id", String(16), primary_key=True),
    Column("upload_id", LargeBinary, primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("task_id", LargeBinary, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("offset", BigInteger, nullable=False, server_default="0"),
    Column("strikes", Integer, nullable=False, server_default="0"),
    Column("complete", Boolean, nullable=False),
    Column("updated", Double, nullable=False),
    Index(None, "node_id", "task_id"),
)
"""Uploads in progress; ``offset`` counts bytes that are safe on the disk."""

events = Table(
    "events",
    metadata,
    Column("revision", _revision, primary_key=True, autoincrement=True),
    Column("run_id", String(12), nullable=False),
    Column("type", String(64), nullable=False),
    Column("data", Text, nullable=False, server_default="{}"),
    Column("time", Double, nullable=False),
    Index(None, "run_id", "revision"),
    sqlite_autoincrement=True,
)
"""What watchers are told; a revision is never used twice. ``run_id`` is empty for the whole server."""

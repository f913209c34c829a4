"""What can go wrong with the ledger, told apart from what is wrong with one operation.

A full disk, a damaged file or a database that is gone concerns whoever asked at that moment, and the
answer to a client is "later". A broken constraint concerns one operation alone and stays the exception
that SQLAlchemy raised.
"""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

from sqlalchemy.exc import DBAPIError, OperationalError, TimeoutError

from fedsim.errors import EnvironmentProblem


class LedgerProblem(EnvironmentProblem):
    """The database, not the operation, is the reason.

    Args:
        unknown: the connection broke during a commit, so whether it happened is not known; operations
            can be repeated, which settles it.
    """

    default_code = "FS-LED-002"
    unknown = False


class StorageFull(LedgerProblem):
    """No space is left for the ledger or for what it refers to; nothing was written."""

    default_code = "FS-LED-001"


class LedgerUnavailable(LedgerProblem):
    """The database cannot be reached or written now; a later try may succeed."""

    default_code = "FS-LED-002"


class LedgerDamaged(LedgerProblem):
    """The database contradicts itself; nobody repairs it silently."""

    default_code = "FS-LED-003"


class LedgerInUse(LedgerProblem):
    """Another coordinator holds the state folder or the database."""

    default_code = "FS-LED-007"


class LedgerClosed(LedgerProblem):
    """The coordinator is shutting down and takes no further operation."""

    default_code = "FS-LED-010"


def full(said: str, where: str) -> StorageFull:
    """The error for a ledger that has no space left."""
    return StorageFull(
        "no space left in the coordinator's state folder",
        where=where,
        why=said,
        hint="free some space on that disk; clients repeat what was not accepted",
    )


def unavailable(said: str, where: str) -> LedgerUnavailable:
    """The error for a database that does not answer, or not as it should."""
    return LedgerUnavailable(
        "the coordinator's state cannot be written or read now",
        where=where,
        why=said,
        hint="check the disk or the database server; clients repeat what was not accepted",
    )


def broken(said: str, where: str) -> LedgerDamaged:
    """The error for a database that is no database, or contradicts itself."""
    return LedgerDamaged(
        "the coordinator's database is damaged",
        where=where,
        why=said,
        hint="stop the coordinator and restore the newest copy backup-*.db; nothing was changed",
    )


def closed() -> LedgerClosed:
    """The error for whoever comes after the end."""
    return LedgerClosed("the coordinator is shutting down", why="its ledger is closed")


def file_trouble(error: OSError, path: Path) -> LedgerProblem:
    """The error for a file of the state folder that could not be written."""
    said = error.strerror or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return full(said, str(path))
    return unavailable(said, str(path))


# Primary result codes, the low byte of what SQLite reports.
_FULL, _DAMAGED = {sqlite3.SQLITE_FULL}, {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_UNUSABLE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM,
}  # fmt: skip
# PostgreSQL: the space ran out; the classes of connections, of resources, of an operator's hand, of the
# system and of damaged data.
_STATE_FULL = "53100"
_STATES_DAMAGED = ("XX001", "XX002")
_STATES_UNUSABLE = ("08", "53", "57", "58", "25006")


def trouble(error: BaseException, where: str) -> LedgerProblem | None:
    """What an exception says about the database, or None where it concerns the operation alone.

    Args:
        where: the database, for the user; without a password.
    """
    if isinstance(error, LedgerProblem):
        return error
    if isinstance(error, TimeoutError):
        return unavailable("no connection was free in time", where)
    # SQLAlchemy wraps what the driver raises in execute and commit; SQLite's own come from the copy.
    driver = error.orig if isinstance(error, DBAPIError) else error
    said = str(driver)
    code = getattr(driver, "sqlite_errorcode", None)
    if isinstance(code, int):
        primary = code & 0xFF
        if primary in _FULL:
            return full(said, where)
        if primary in _DAMAGED:
            return broken(said, where)
        return unavailable(said, where) if primary in _UNUSABLE else None
    state = getattr(driver, "sqlstate", None)
    if state == _STATE_FULL:
        return full(said, where)
    if state in _STATES_DAMAGED:
        return broken(said, where)
    if isinstance(state, str) and state.startswith(_STATES_UNUSABLE):
        return unavailable(said, where)
    # A server that refuses connections or went away often has no state to tell.
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    if lost or (state is None and isinstance(error, OperationalError)):
        return unavailable(said, where)
    return None

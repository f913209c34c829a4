"""What is special to SQLite: its settings, the checks of its file, the copy, and how it is made.

Python's driver starts transactions by itself, too late and not before a SAVEPOINT; it is told not to,
and ``BEGIN`` is sent here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, QueuePool

from fedsim.errors import EnvironmentProblem
from fedsim.server import mounts
from fedsim.server.ledger_errors import broken, file_trouble, trouble, unavailable
from fedsim.storage import sync_file, sync_folder

FILE = "fedsim.db"
USED = ("objects", "runs", "segments", "uploads")
"""Folders beside the database that are filled only once it exists."""
BUSY_MILLISECONDS = 5000
_READERS = 8
# The log and its index; SQLite finds them by name.
_BESIDE = ("-wal", "-shm", "-journal")


def address(folder: Path) -> URL:
    """The URL of the database in a state folder."""
    return URL.create("sqlite", database=str(folder / FILE))


def is_sqlite(url: URL) -> bool:
    """Whether the URL is one of SQLite."""
    return url.get_backend_name() == "sqlite"


def engines(file: Path) -> tuple[Engine, Engine]:
    """One engine to write with, one to read with."""
    url = URL.create("sqlite", database=str(file))
    # The writer keeps one connection; after a failure it wants a new one and not the old from a pool.
    writing = create_engine(url, poolclass=NullPool)
    reading = create_engine(url, poolclass=QueuePool, pool_size=_READERS, max_overflow=-1)

    @event.listens_for(writing, "connect")
    def prepare(driver: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        _settings(driver)

    @event.listens_for(reading, "connect")
    def prepare_to_read(driver: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        _settings(driver)
        driver.execute("PRAGMA query_only=ON")  # sqlite3's own shortcut

    @event.listens_for(writing, "begin")
    def begin(connection: Connection) -> None:
        # Taking the lock at once, instead of at the first statement that writes, cannot deadlock.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    @event.listens_for(reading, "begin")
    def begin_to_read(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return writing, reading


def _settings(driver: DBAPIConnection) -> None:
    driver.isolation_level = None  # transactions are begun above
    for setting in (
        f"busy_timeout={BUSY_MILLISECONDS}",
        "journal_mode=WAL",
        # NORMAL would lose the last commits when the power fails.
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        driver.execute(f"PRAGMA {setting}")


def check_place(file: Path) -> None:
    """Refuse a network file system.

    Raises:
        EnvironmentProblem: FS-LED-006.
    """
    kind = mounts.shared_file_system(file.parent, mounts.mounts())
    if kind is not None:
        raise EnvironmentProblem(
            f"the state folder lies on a network file system ({kind})",
            code="FS-LED-006",
            where=str(file.parent),
            why="SQLite's write-ahead log needs memory that all its users share; there it damages the file",
            hint="choose a local disk with --state DIR, or a PostgreSQL database by URL",
        )


def exists(file: Path, folder: Path) -> bool:
    """Whether the database is there; False only where the state folder was never used.

    Raises:
        EnvironmentProblem: FS-LED-008, it is gone from a folder that was in use.
    """
    if file.exists() or file.is_symlink():
        return True
    remains = [name for name in USED if _holds_anything(folder / name)]
    remains += sorted(path.name for path in file.parent.glob("backup-*.db"))
    remains += [beside.name for beside in _beside(file) if beside.exists()]
    if remains:
        raise EnvironmentProblem(
            "the coordinator's database is gone from a state folder that was in use",
            code="FS-LED-008",
            where=str(file),
            why=f"still there: {', '.join(remains)}; an empty database would forget all runs and clients",
            hint="restore the database from a copy, or name an empty folder with --state DIR",
        )
    return False


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _beside(file: Path) -> list[Path]:
    return [file.with_name(file.name + ending) for ending in _BESIDE]


def check(file: Path) -> None:
    """Refuse a file that cannot be read, is no database, is damaged, or is held by another program.

    Raises:
        EnvironmentProblem: FS-LED-002, 003 or 005.
    """
    try:
        if file.stat().st_size == 0:
            raise broken("the file is empty", str(file))
        # mode=rw: never creates.
        with closing(_connect(file, "rw")) as connection:
            connection.execute("BEGIN IMMEDIATE")
            said = [row[0] for row in connection.execute("PRAGMA quick_check(5)")]
            connection.execute("ROLLBACK")
    except OSError as error:
        raise unavailable(error.strerror or type(error).__name__, str(file)) from error
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise _locked(file, str(error)) from error
        raise trouble(error, str(file)) or broken(str(error), str(file)) from error
    if said != ["ok"]:
        raise broken("; ".join(" ".join(line.split()) for line in said), str(file))


def _locked(file: Path, said: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        "another program holds the coordinator's database",
        code="FS-LED-005",
        where=str(file),
        why=f"{said}, for more than {BUSY_MILLISECONDS / 1000:.0f} s",
        hint="close the program that has the file open for writing, such as a sqlite3 shell",
    )


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{file.resolve().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        timeout=BUSY_MILLISECONDS / 1000,
    )


def copy(file: Path, target: Path) -> None:
    """Write a whole, consistent copy of the database, by SQLite's own means.

    Raises:
        LedgerProblem: it could not be written; nothing is left under the name of `target`.
    """
    new = target.with_name(f".new-{target.name}")
    try:
        new.unlink(missing_ok=True)
        new.touch(mode=0o600)
        with closing(_connect(file, "rw")) as source, closing(_connect(new, "rw")) as copied:
            source.backup(copied)
            # A copy is one file: without a log beside it.
            copied.execute("PRAGMA journal_mode=DELETE")
        sync_file(new)
        new.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        _remove(new)
        raise file_trouble(error, target) from error
    except sqlite3.Error as error:
        _remove(new)
        raise trouble(error, str(target)) or unavailable(str(error), str(target)) from error


def _remove(file: Path) -> None:
    for path in (file, *_beside(file)):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def discard_unfinished(file: Path) -> None:
    """Remove what a start that was cut short left: no coordinator ever worked with it."""
    _remove(_new_name(file))


def _new_name(file: Path) -> Path:
    return file.with_name(f".new-{file.name}")


@contextmanager
def unfinished(file: Path) -> Iterator[Path]:
    """A name to make a database under; it gets its own name when the block ends well.

    Raises:
        LedgerProblem: it cannot be written; nothing is left.
    """
    new = _new_name(file)
    try:
        new.touch(mode=0o600)
        yield new
        sync_file(new)
        new.rename(file)
        sync_folder(file.parent)
    except OSError as error:
        _remove(new)
        raise file_trouble(error, file) from error
    except BaseException:
        _remove(new)
        raise


def write_back(engine: Engine) -> None:
    """Move the log into the file, so that the file alone is the database."""
    with suppress(Exception), engine.connect() as connection:
        # Outside a transaction; a failure costs nothing, the next start reads the log.
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")

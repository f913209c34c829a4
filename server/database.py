"""The coordinator's database: opened with care, written by one thread, read by any.

Opening never repairs and never creates anew where something was: a damaged file, a schema that this
program does not know, a database that is gone from a folder in use, a second coordinator and a network
file system each end the start with a sentence. SQLite lies in the state folder; PostgreSQL is given by
a URL. What only one of the two can do is in ``sqlite_file`` and ``postgres``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, delete, insert, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from fedsim.errors import ConfigError, EnvironmentProblem
from fedsim.server import migrate, postgres, sqlite_file
from fedsim.server.ledger_errors import file_trouble, trouble
from fedsim.server.state_lock import StateLock
from fedsim.server.tables import meta
from fedsim.server.writer import Writer

SCHEMA, INCARNATION, CREATED = "schema", "incarnation", "created"


def open_database(url: str, folder: Path) -> Database:
    """Open the database of a coordinator, make it where the folder is new, migrate it where it is older.

    Args:
        url: ``sqlite`` or empty for the file ``fedsim.db`` in `folder`, or ``postgresql://…``.
        folder: the state folder; made with mode 0700 where it does not exist.

    Raises:
        EnvironmentProblem: FS-LED-001 … 009, one for each reason to refuse; FS-ENV-060, the extra for
            PostgreSQL is missing.
        ConfigError: FS-LED-013, the URL is of no known kind.
    """
    address = _address(url, folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise file_trouble(error, folder) from error
    lock = StateLock.take(folder)
    writing = reading = None
    try:
        if sqlite_file.is_sqlite(address):
            file = Path(str(address.database))
            sqlite_file.check_place(file)
            sqlite_file.discard_unfinished(file)
            if not sqlite_file.exists(file, folder):
                _make(file)
            sqlite_file.check(file)
            writing, reading = sqlite_file.engines(file)
            _migrate(writing, file)
            where = str(file)
        else:
            writing, reading = postgres.engines(address)
            _migrate(writing, None)
            where = address.render_as_string(hide_password=True)
        database = Database(writing, reading, where, lock)
        # The connection that writes is what holds a database server's lock: taken at once, and kept.
        database.writer.submit(lambda connection: None).result()
        return database
    except BaseException:
        for engine in (writing, reading):
            if engine is not None:
                engine.dispose()
        lock.release()
        raise


class Database:
    """An open database; made by `open_database`, closed once.

    Args:
        writer: carries out what changes it.
        where: the database, for messages; without a password.
    """

    def __init__(self, writing: Engine, reading: Engine, where: str, lock: StateLock) -> None:
        self.where = where
        self._writing = writing
        self._reading = reading
        self._lock = lock
        self.writer = Writer(writing, where)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction, for any thread: what it sees does not change while it lasts.

        Keep it short: the log of SQLite grows as long as somebody looks at an old state.

        Raises:
            LedgerProblem: the database cannot be read.
        """
        try:
            with self._reading.connect() as connection, connection.begin():
                yield connection
        except SQLAlchemyError as error:
            found = trouble(error, self.where)
            if found is None:
                raise
            raise found from error

    def fact(self, key: str) -> str | None:
        """What ``meta`` holds under a key."""
        with self.read() as connection:
            return connection.scalar(select(meta.c.value).where(meta.c.key == key))

    def remember(self, key: str, value: str) -> None:
        """Write a fact, durable when this returns."""
        self.writer.run(lambda connection: _write_fact(connection, key, value))

    @property
    def incarnation(self) -> int:
        """Grows when a copy is restored; clients refuse a server whose number went back."""
        return int(self.fact(INCARNATION) or 0)

    def next_incarnation(self) -> int:
        """Count one up, after a copy was restored; returns the new number."""

        def operation(connection: Connection) -> int:
            number = int(connection.scalar(select(meta.c.value).where(meta.c.key == INCARNATION)) or 0) + 1
            _write_fact(connection, INCARNATION, str(number))
            return number

        return self.writer.run(operation)

    def close(self) -> None:
        """Carry out what was submitted, write the log back into the file, let the folder go."""
        self.writer.close()
        self._reading.dispose()
        if self._writing.dialect.name == "sqlite":
            sqlite_file.write_back(self._writing)
        self._writing.dispose()
        self._lock.release()


def _address(url: str, folder: Path) -> URL:
    if url in ("", "sqlite"):
        return sqlite_file.address(folder)
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise _unusable("", "it cannot be parsed") from error
    if sqlite_file.is_sqlite(address):
        if address.database in (None, "", ":memory:") or address.drivername not in (
            "sqlite",
            "sqlite+pysqlite",
        ):
            raise _unusable(address.drivername, "a coordinator's state has to outlive it, in a plain file")
        return address
    if address.get_backend_name() == "postgresql":
        return address
    raise _unusable(address.drivername, "neither sqlite nor postgresql")


def _unusable(kind: str, why: str) -> ConfigError:
    # The URL may hold a password: no more than its beginning is shown.
    return ConfigError(
        f"the database URL {kind and kind + ':… '}cannot be used",
        code="FS-LED-013",
        why=why,
        hint="leave it out for a file in the state folder, or write postgresql://user@host/name",
    )


def _make(file: Path) -> None:
    """A new database: complete under another name first, so that a crash leaves none rather than half."""
    with sqlite_file.unfinished(file) as new:
        writing, reading = sqlite_file.engines(new)
        try:
            _migrate(writing, None)
            sqlite_file.write_back(writing)
        finally:
            reading.dispose()
            writing.dispose()


def _migrate(engine: Engine, file: Path | None) -> None:
    """Bring the schema up to date; `file` is copied before, where there is one."""
    where = str(file) if file else engine.url.render_as_string(hide_password=True)
    try:
        with engine.connect() as connection:
            present = migrate.found(connection)
            tables = inspect(connection).get_table_names()
    except SQLAlchemyError as error:
        raise trouble(error, where) or error from error
    if present == migrate.newest():
        return
    if (present is None and tables) or (present is not None and present not in migrate.known()):
        raise _unknown_schema(present, where)
    if file is not None and present is not None:
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        sqlite_file.copy(file, file.with_name(f"backup-{present}-{moment}.db"))
    try:
        with engine.begin() as connection:
            migrate.upgrade(connection)
            _write_fact(connection, SCHEMA, migrate.newest())
            if present is None:
                _write_fact(connection, INCARNATION, "1")
                _write_fact(connection, CREATED, repr(time.time()))
    except DBAPIError as error:
        raise trouble(error, where) or EnvironmentProblem(
            f"the database could not be brought from schema {present or 'none'} to {migrate.newest()}",
            code="FS-LED-009",
            where=where,
            why=str(error.orig),
            hint="nothing was changed; go on with the version of fedsim that wrote it, and report this",
        ) from error


def _unknown_schema(present: str | None, where: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the database has a schema that this version of fedsim does not know: {present or 'not ours'}",
        code="FS-LED-004",
        where=where,
        why=f"known are {', '.join(sorted(migrate.known()))}; nothing was changed",
        hint="use the newer version of fedsim that wrote it, or restore the copy made before its migration",
    )


def _write_fact(connection: Connection, key: str, value: str) -> None:
    connection.execute(delete(meta).where(meta.c.key == key))
    connection.execute(insert(meta).values(key=key, value=value))

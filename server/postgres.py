"""What is special to PostgreSQL: its driver, connections that break, and one coordinator per database."""

from __future__ import annotations

import time
from importlib.util import find_spec

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, QueuePool

from fedsim.errors import EnvironmentProblem
from fedsim.server.ledger_errors import LedgerInUse

DRIVER = "postgresql+psycopg"
# Any number that is the same for every coordinator: "fedsim" in ASCII.
_LOCK = int.from_bytes(b"fedsim", "big")
_LOCK_SECONDS, _LOCK_DELAY_SECONDS = 5.0, 0.1
_READERS = 8


def engines(url: URL) -> tuple[Engine, Engine]:
    """One engine to write with, one to read with.

    Raises:
        EnvironmentProblem: FS-ENV-060, the driver is not installed.
    """
    if find_spec("psycopg") is None:
        raise EnvironmentProblem(
            "the extra for PostgreSQL is missing",
            code="FS-ENV-060",
            why="the database URL needs the package psycopg",
            hint="pip install 'fedsim[postgres]'",
        )
    url = url.set(drivername=DRIVER)
    # The writer keeps one connection, and wants a new one after a failure.
    writing = create_engine(url, poolclass=NullPool)
    # A server that restarted leaves dead connections behind; each is tried before it is lent.
    reading = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=_READERS,
        max_overflow=-1,
        pool_pre_ping=True,
        isolation_level="REPEATABLE READ",
    )

    @event.listens_for(writing, "connect")
    def hold(driver: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        """The state folder's lock does not keep a second folder from using this database."""
        # A connection that was just closed keeps it until the server has noticed.
        tries = 1 + round(_LOCK_SECONDS / _LOCK_DELAY_SECONDS)
        for left in reversed(range(tries)):
            if _taken(driver):
                return
            if left:
                time.sleep(_LOCK_DELAY_SECONDS)
        driver.close()
        raise LedgerInUse(
            "another coordinator uses this database",
            where=url.render_as_string(hide_password=True),
            hint="stop that one first, or give this one a database of its own",
        )

    @event.listens_for(writing, "begin")
    def try_out(connection: Connection) -> None:
        # The driver begins at the first statement. A dead connection is found by this one, before
        # anything was done on it: the writer takes a new one and nobody notices.
        connection.exec_driver_sql("SELECT 1")

    return writing, reading


def _taken(driver: DBAPIConnection) -> bool:
    cursor = driver.cursor()
    cursor.execute("SELECT pg_try_advisory_lock(%s)", (_LOCK,))
    row = cursor.fetchone()
    cursor.close()
    driver.commit()
    return bool(row and row[0])

"""The ledger on a PostgreSQL server of its own, started here; skipped where none is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert, select

from fedsim.errors import EnvironmentProblem
from fedsim.server import migrate
from fedsim.server.database import open_database
from fedsim.server.ledger_errors import LedgerUnavailable
from fedsim.server.tables import meta, metadata

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(shutil.which(name) is None for name in ("initdb", "pg_ctl", "psql")),
        reason="no PostgreSQL server is installed",
    ),
]
needs_driver = pytest.mark.skipif(find_spec("psycopg") is None, reason="needs the extra: fedsim[postgres]")
NOBODY = 65534


class Server:
    """A PostgreSQL server that listens in its folder only. It refuses to run as root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self._do("initdb", "-D", str(self.data), "-U", "fedsim", "-A", "trust", "-E", "UTF8", "--no-sync")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://fedsim@/postgres?host={self.folder}"

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses=''"
        self._do("pg_ctl", "-D", str(self.data), "-o", options, "-w", "-l", str(self.folder / "log"), "start")

    def stop(self) -> None:
        self._do("pg_ctl", "-D", str(self.data), "-w", "-m", "immediate", "stop")

    def psql(self, text: str) -> str:
        return self._do(
            "psql", "-h", str(self.folder), "-U", "fedsim", "-d", "postgres", "-qAt", "-v", "ON_ERROR_STOP=1",
            text=text,
        )  # fmt: skip

    def _do(self, *command: str, text: str = "") -> str:
        user = NOBODY if os.geteuid() == 0 else None
        # A file and no pipe: the server inherits it and would keep a pipe open.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                command, input=text, stdout=output, stderr=subprocess.STDOUT, text=True, check=False,
                user=user, group=user, extra_groups=None if user is None else [], cwd=self.folder,
            )  # fmt: skip
            output.seek(0)
            said = output.read()
        assert done.returncode == 0, said
        return said


@pytest.fixture
def server() -> Iterator[Server]:
    # Not tmp_path: only its owner may enter that, and a socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    try:
        started = Server(folder)
        yield started
        if (started.data / "postmaster.pid").exists():
            started.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_schema_is_one_that_postgresql_accepts(server: Server) -> None:
    server.psql(migrate.as_sql("postgresql"))
    tables = server.psql("SELECT tablename FROM pg_tables WHERE schemaname = 'public';").split()
    assert set(tables) == {*metadata.tables, "alembic_version"}
    assert server.psql("SELECT version_num FROM alembic_version;").strip() == migrate.newest()


def test_the_writers_savepoints_mean_the_same_there(server: Server) -> None:
    """Its statements are sent as they are: one that fails undoes itself, not the group."""
    server.psql(migrate.as_sql("postgresql"))
    server.psql(
        "BEGIN; SAVEPOINT operation; INSERT INTO meta VALUES ('a', '1'); RELEASE SAVEPOINT operation;"
        "SAVEPOINT operation; \\set ON_ERROR_STOP 0\n"
        "INSERT INTO meta VALUES ('a', '2');\n"
        "\\set ON_ERROR_STOP 1\n"
        "ROLLBACK TO SAVEPOINT operation; RELEASE SAVEPOINT operation;"
        "SAVEPOINT operation; INSERT INTO meta VALUES ('b', '3'); RELEASE SAVEPOINT operation; COMMIT;"
    )
    assert server.psql("SELECT key, value FROM meta ORDER BY key;").split() == ["a|1", "b|3"]


@needs_driver
def test_a_restart_between_two_operations_is_not_noticed(server: Server, tmp_path: Path) -> None:
    """R28."""
    database = open_database(server.url, tmp_path)
    database.remember("before", "1")
    server.stop()
    starting = threading.Timer(1.0, server.start)
    starting.start()
    database.remember("after", "2")  # waits, tries again, succeeds
    starting.join()
    assert database.fact("before") == "1"
    assert database.fact("after") == "2"
    database.close()


@needs_driver
def test_an_operation_in_flight_while_it_restarts_fails_and_can_be_repeated(
    server: Server, tmp_path: Path
) -> None:
    """R28: the service answers UNAVAILABLE, the client repeats."""
    database = open_database(server.url, tmp_path)

    def operation(connection: Connection) -> None:
        connection.execute(insert(meta).values(key="flight", value="1"))
        if not repeated:
            server.stop()
            connection.execute(select(meta))

    repeated = False
    with pytest.raises(LedgerUnavailable):
        database.writer.run(operation)
    server.start()
    repeated = True
    database.writer.run(operation)
    assert database.fact("flight") == "1"
    database.close()


@needs_driver
def test_one_coordinator_per_database_whatever_the_folder(server: Server, tmp_path: Path) -> None:
    """R22."""
    database = open_database(server.url, tmp_path / "a")
    with pytest.raises(EnvironmentProblem) as caught:
        open_database(server.url, tmp_path / "b")
    assert caught.value.code == "FS-LED-007"
    database.close()
    open_database(server.url, tmp_path / "b").close()

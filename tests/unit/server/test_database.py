"""Opening the coordinator's database: what is made, what is migrated, and every reason to refuse."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, func, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from fedsim.errors import ConfigError, EnvironmentProblem
from fedsim.server import migrate, mounts, sqlite_file
from fedsim.server.database import Database, open_database
from fedsim.server.ledger_errors import LedgerDamaged, LedgerUnavailable, StorageFull, trouble
from fedsim.server.tables import events, journal, meta, metadata, nodes

STEP = '''"""A later schema."""

from alembic import op
import sqlalchemy as sa

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("nodes", sa.Column("shoe_size", sa.Integer))
    {more}
'''


def add_event(text: str) -> Callable[[Connection], int]:
    def operation(connection: Connection) -> int:
        row = {"run_id": "", "type": "test", "data": json.dumps(text), "time": 0.0}
        return int(connection.execute(insert(events).values(row)).inserted_primary_key[0])

    return operation


def told(database: Database) -> list[str]:
    with database.read() as connection:
        return [json.loads(data) for data in connection.scalars(select(events.c.data))]


def refused(url: str, folder: Path) -> EnvironmentProblem:
    with pytest.raises(EnvironmentProblem) as caught:
        open_database(url, folder)
    assert caught.value.exit_code == 6
    assert caught.value.hint
    return caught.value


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A state folder whose database holds one event."""
    folder = tmp_path / "state"
    database = open_database("", folder)
    database.writer.run(add_event("kept"))
    database.close()
    return folder


@pytest.fixture
def later_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this program one that knows a second schema."""

    def install(more: str = "") -> None:
        steps = tmp_path / "migrations"
        shutil.copytree(migrate._STEPS, steps, ignore=shutil.ignore_patterns("__pycache__"))
        (steps / "versions" / "0002_later.py").write_text(STEP.format(more=more))
        monkeypatch.setattr(migrate, "_STEPS", steps)

    return install


# ------------------------------------------------------------ opening


def test_a_new_folder_gets_a_database_with_every_table(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    database = open_database("", folder)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    assert database.fact("schema") == migrate.newest()
    assert database.incarnation == 1
    database.close()
    assert sorted(contents(folder)) == ["fedsim.db", "lock"]
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "fedsim.db").stat().st_mode & 0o077 == 0


def test_what_was_committed_is_there_when_opened_again(used: Path) -> None:
    database = open_database("sqlite", used)
    assert told(database) == ["kept"]
    database.close()


def test_the_settings_are_those_of_a_ledger(used: Path) -> None:
    database = open_database("", used)

    def asked(connection: Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert database.writer.run(asked) == ["wal", 2, 1, 5000]
    with database.read() as connection:
        assert asked(connection) == ["wal", 2, 1, 5000]
    database.close()


def test_a_row_without_its_run_is_refused(used: Path) -> None:
    database = open_database("", used)
    row = {"run_id": "0" * 12, "seq": 1, "window": 0, "kind": "x", "now": 0.0}
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        database.writer.run(lambda connection: connection.execute(insert(journal).values(row)))
    database.close()


def test_a_reader_sees_one_state_and_cannot_write(used: Path) -> None:
    database = open_database("", used)
    with database.read() as connection:
        count = select(func.count()).select_from(events)
        assert connection.scalar(count) == 1
        database.writer.run(add_event("meanwhile"))
        assert connection.scalar(count) == 1
    assert told(database) == ["kept", "meanwhile"]
    with pytest.raises(LedgerUnavailable, match="readonly"), database.read() as connection:
        connection.execute(insert(meta).values(key="a", value="b"))
    database.close()


def test_many_threads_read_at_once(used: Path) -> None:
    database = open_database("", used)
    together = threading.Barrier(24)
    found: list[list[str]] = []

    def read() -> None:
        with database.read() as connection:
            together.wait(60)
            found.append([json.loads(d) for d in connection.scalars(select(events.c.data))])

    threads = [threading.Thread(target=read) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [["kept"]] * 24
    database.close()


def test_a_revision_is_never_used_twice(used: Path) -> None:
    database = open_database("", used)
    first = database.writer.run(add_event("a"))
    database.writer.run(lambda c: c.execute(events.delete().where(events.c.revision == first)).close())
    assert database.writer.run(add_event("b")) == first + 1
    database.close()


def test_facts_are_kept_and_the_incarnation_only_grows(used: Path) -> None:
    database = open_database("", used)
    database.remember("server_id", "ab" * 32)
    database.remember("server_id", "cd" * 32)
    assert database.next_incarnation() == 2
    database.close()
    database = open_database("", used)
    assert database.fact("server_id") == "cd" * 32
    assert database.incarnation == 2
    assert database.fact("unheard of") is None
    database.close()


# ------------------------------------------------------------ a process that dies (R29)


def test_a_process_killed_after_a_commit_loses_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from sqlalchemy import insert\n"
        "from fedsim.server.database import open_database\n"
        "from fedsim.server.tables import meta\n"
        "w = open_database('', Path(sys.argv[1])).writer\n"
        "w.run(lambda c: c.execute(insert(meta).values(key='safe', value='1')) and None)\n"
        "def half(c):\n"
        "    c.execute(insert(meta).values(key='half', value='1')); os.kill(os.getpid(), signal.SIGKILL)\n"
        "w.run(half)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode != 0
    database = open_database("", tmp_path)
    assert database.fact("safe") == "1"
    assert database.fact("half") is None
    database.close()


def test_the_folder_copied_between_any_two_commits_opens_with_what_was_committed(used: Path) -> None:
    """R29: a power loss leaves the files as they were at some moment, the log among them."""
    database = open_database("", used)
    for number in range(4):
        database.writer.run(add_event(f"event {number}"))
        shutil.copytree(used, used.with_name(f"moment{number}"))
    database.close()
    for number in range(4):
        copy = open_database("", used.with_name(f"moment{number}"))
        assert told(copy) == ["kept", *[f"event {n}" for n in range(number + 1)]]
        copy.close()


def test_a_log_torn_by_a_power_loss_loses_the_last_commit_at_most(used: Path) -> None:
    database = open_database("", used)
    for number in range(3):
        database.writer.run(add_event(f"event {number}"))
    torn = used.with_name("torn")
    shutil.copytree(used, torn)
    database.close()
    log = torn / "fedsim.db-wal"
    os.truncate(log, log.stat().st_size - 100)
    copy = open_database("", torn)
    assert told(copy) == ["kept", "event 0", "event 1"]
    copy.close()


def test_a_first_start_that_was_cut_short_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(connection: Connection) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(migrate, "upgrade", killed)
        with pytest.raises(KeyboardInterrupt):
            open_database("", tmp_path)
    (tmp_path / ".new-fedsim.db").write_bytes(b"half a database")  # and one that could not clean up
    database = open_database("", tmp_path)
    assert database.incarnation == 1
    database.close()
    assert sorted(contents(tmp_path)) == ["fedsim.db", "lock"]


# ------------------------------------------------------------ R9: locked, corrupt, newer, gone


@pytest.mark.parametrize("damage", ["overwritten", "empty", "cut", "page"])
def test_a_damaged_file_is_refused_and_left_alone(used: Path, damage: str) -> None:
    file = used / "fedsim.db"
    content = bytearray(file.read_bytes())
    match damage:
        case "overwritten":
            content[:] = b"not a database " * 1000
        case "empty":
            content.clear()
        case "cut":
            del content[len(content) // 2 :]
        case "page":
            content[3 * 4096 : 4 * 4096] = b"\xff" * 4096
    file.write_bytes(content)
    error = refused("", used)
    assert error.code == "FS-LED-003"
    assert error.where == str(file)
    assert file.read_bytes() == content
    assert sorted(p.name for p in used.iterdir()) == ["fedsim.db", "lock"]


def test_a_newer_schema_is_refused_and_left_alone(used: Path, later_schema: Callable[[], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrate, "_STEPS", migrate._STEPS)
        later_schema()
        open_database("", used).close()
    before = (used / "fedsim.db").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrate, "_STEPS", Path(migrate.__file__).parent / "migrations")
        error = refused("", used)
    assert error.code == "FS-LED-004"
    assert "0002" in error.what
    assert (used / "fedsim.db").read_bytes() == before


def test_a_database_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "fedsim.db")) as foreign:
        foreign.execute("CREATE TABLE photographs (name)")
    assert refused("", tmp_path).code == "FS-LED-004"


def test_a_database_held_by_another_program_is_refused(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_MILLISECONDS", 20)
    with closing(sqlite3.connect(used / "fedsim.db", isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        assert refused("", used).code == "FS-LED-005"
    open_database("", used).close()


def test_a_database_that_may_not_be_read_is_refused(used: Path) -> None:
    file = used / "fedsim.db"
    file.unlink()
    file.mkdir()
    assert refused("", used).code == "FS-LED-002"


@pytest.mark.parametrize("rest", ["objects/ab/cd", "runs/r/config.toml", "backup-0001-x.db", "fedsim.db-wal"])
def test_a_database_that_is_gone_from_a_folder_in_use_is_not_made_anew(used: Path, rest: str) -> None:
    (used / "fedsim.db").unlink()
    (used / rest).parent.mkdir(parents=True, exist_ok=True)
    (used / rest).write_bytes(b"x")
    assert refused("", used).code == "FS-LED-008"
    assert not (used / "fedsim.db").exists()


def test_a_refusal_lets_the_folder_go(used: Path) -> None:
    content = (used / "fedsim.db").read_bytes()
    (used / "fedsim.db").write_bytes(b"")
    refused("", used)
    (used / "fedsim.db").write_bytes(content)
    open_database("", used).close()


# ------------------------------------------------------------ migrations


def test_an_older_schema_is_copied_and_brought_up(used: Path, later_schema: Callable[[], None]) -> None:
    later_schema()
    database = open_database("", used)
    assert told(database) == ["kept"]
    assert database.fact("schema") == "0002"
    with database.read() as connection:
        connection.exec_driver_sql("SELECT shoe_size FROM nodes").close()
    database.close()
    (copy,) = used.glob("backup-0001-*.db")
    assert copy.stat().st_mode & 0o077 == 0
    with closing(sqlite3.connect(copy)) as old:
        assert old.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        assert old.execute("SELECT data FROM events").fetchall() == [('"kept"',)]


def test_a_migration_that_fails_changes_nothing(used: Path, later_schema: Callable[[str], None]) -> None:
    later_schema('op.execute("INSERT INTO nowhere VALUES (1)")')
    error = refused("", used)
    assert error.code == "FS-LED-009"
    assert "nowhere" in str(error.why)
    with closing(sqlite3.connect(used / "fedsim.db")) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        columns = [row[1] for row in database.execute("PRAGMA table_info(nodes)")]
        assert "shoe_size" not in columns
        assert columns == [column.name for column in nodes.columns]


# ------------------------------------------------------------ R22: one coordinator per folder


def test_a_second_coordinator_is_refused_by_name(used: Path) -> None:
    first = open_database("", used)
    error = refused("", used)
    assert error.code == "FS-LED-007"
    assert f"process {os.getpid()} on {socket.gethostname()}, since 2" in str(error.why)
    first.close()
    open_database("", used).close()


def test_another_process_is_refused_until_the_first_is_killed(used: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fedsim.server.state_lock import StateLock\n"
        "lock = StateLock.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(used)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert f"process {other.pid} on" in str(refused("", used).why)
        other.kill()
    open_database("", used).close()


# ------------------------------------------------------------ network file systems


MOUNTS = """/dev/sda1 / ext4 rw 0 0
server:/export /srv/lab nfs4 rw 0 0
/dev/sdb1 /srv/lab/local xfs rw 0 0
me@host:/ /mnt/my\\040disk fuse.sshfs rw 0 0
overlay /var/lib/app overlay rw 0 0
//host/share /var/lib/app cifs rw 0 0
/dev/sdc1 /mnt/usb fuseblk rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/srv/lab/state", "nfs4"), ("/srv/laboratory", None), ("/srv/lab/local/state", None),
        ("/mnt/my disk/a", "fuse.sshfs"), ("/var/lib/app/x", "cifs"), ("/mnt/usb/x", None), ("/home", None),
    ],
)  # fmt: skip
def test_the_file_system_of_a_folder_is_that_of_its_innermost_mount(folder: str, kind: str | None) -> None:
    assert mounts.shared_file_system(Path(folder), MOUNTS) == kind


def test_no_mounts_are_known_is_no_reason_to_refuse(tmp_path: Path) -> None:
    assert mounts.shared_file_system(tmp_path, "") is None


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "mounts", lambda: f"server:/x {tmp_path.resolve()} nfs rw 0 0\n")
    error = refused("", tmp_path / "state")
    assert error.code == "FS-LED-006"
    assert not (tmp_path / "state" / "fedsim.db").exists()


# ------------------------------------------------------------ URLs, PostgreSQL


@pytest.mark.parametrize(
    "url", ["mysql://u:secret@h/x", "sqlite://", "sqlite:///:memory:", "nonsense:secret"]
)
def test_other_urls_are_refused_without_showing_a_password(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_database(url, tmp_path)
    assert caught.value.code == "FS-LED-013"
    assert "secret" not in str(caught.value)


@pytest.mark.skipif(find_spec("psycopg") is not None, reason="psycopg is installed")
def test_postgresql_without_its_driver_names_the_extra(tmp_path: Path) -> None:
    error = refused("postgresql://u:secret@localhost/fedsim", tmp_path)
    assert error.code == "FS-ENV-060"
    assert "fedsim[postgres]" in str(error.hint)


def test_a_database_that_is_lost_while_reading_is_told_as_such(used: Path) -> None:
    database = open_database("", used)
    gone = sqlite3.OperationalError("disk I/O error")
    gone.sqlite_errorcode = sqlite3.SQLITE_IOERR
    with pytest.raises(LedgerUnavailable), database.read():
        raise OperationalError("SELECT", {}, gone)
    database.close()


class PostgresError(Exception):
    """What the driver raises, as far as it is looked at."""

    def __init__(self, sqlstate: str | None) -> None:
        super().__init__("said by the server")
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("53100", StorageFull), ("57P01", LedgerUnavailable), ("08006", LedgerUnavailable),
        ("XX001", LedgerDamaged), (None, LedgerUnavailable), ("42P01", None),
    ],
)  # fmt: skip
def test_what_postgresql_says_is_told_apart(state: str | None, kind: type[Exception] | None) -> None:
    found = trouble(OperationalError("INSERT", {}, PostgresError(state)), "postgresql://host/name")
    assert found is None if kind is None else isinstance(found, kind)
    assert trouble(IntegrityError("INSERT", {}, PostgresError("23505")), "here") is None
    assert trouble(ValueError("the operation's own"), "here") is None


def test_a_connection_that_broke_is_the_databases_problem() -> None:
    gone = DBAPIError("INSERT", {}, PostgresError("XX999"), connection_invalidated=True)
    assert isinstance(trouble(gone, "here"), LedgerUnavailable)

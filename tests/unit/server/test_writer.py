"""The writer: order, groups, savepoints, and what fails together."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert, select
from sqlalchemy.exc import IntegrityError, OperationalError

from fedsim.server import writer as writer_module
from fedsim.server.database import Database, open_database
from fedsim.server.ledger_errors import LedgerClosed, LedgerUnavailable, StorageFull
from fedsim.server.tables import meta
from tests.state_folders import new_database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = new_database(tmp_path)
    yield opened
    opened.close()


def put(key: str, value: str = "x") -> Callable[[Connection], str]:
    def operation(connection: Connection) -> str:
        connection.execute(insert(meta).values(key=key, value=value))
        return key

    return operation


def keys(database: Database) -> set[str]:
    with database.read() as connection:
        return set(connection.scalars(select(meta.c.key))) - {"schema", "incarnation", "created"}


class Hold:
    """Keeps the writer busy, so that what is submitted meanwhile becomes one group."""

    def __init__(self, database: Database) -> None:
        self._go = threading.Event()
        begun = threading.Event()

        def operation(connection: Connection) -> None:
            begun.set()
            assert self._go.wait(60)

        self.future = database.writer.submit(operation)
        assert begun.wait(60)

    def release(self) -> None:
        self._go.set()


def commits(database: Database) -> list[str]:
    """Grows by one with each commit."""
    seen: list[str] = []
    event.listen(database._writing, "commit", lambda connection: seen.append("commit"))
    return seen


class DriverError(sqlite3.OperationalError):
    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.sqlite_errorcode = code


def driver_error(code: int, text: str = "database or disk is full") -> OperationalError:
    return OperationalError("INSERT", {}, DriverError(text, code))


def test_an_operation_gives_its_value_once_it_is_durable(database: Database) -> None:
    assert database.writer.run(put("a")) == "a"
    assert keys(database) == {"a"}


def test_operations_that_wait_share_one_commit_and_keep_their_order(database: Database) -> None:
    seen = commits(database)
    hold = Hold(database)
    futures = [database.writer.submit(put(f"{i:03}")) for i in range(writer_module.GROUP + 5)]
    hold.release()
    assert [f.result(60) for f in futures] == [f"{i:03}" for i in range(writer_module.GROUP + 5)]
    assert len(seen) == 3  # the one that held, a full group, the rest


def test_an_operation_that_fails_undoes_only_itself(database: Database) -> None:
    def half(connection: Connection) -> None:
        put("half")(connection)
        raise ValueError("no")

    hold = Hold(database)
    seen = commits(database)
    before, failed, twice, after = [database.writer.submit(o) for o in (put("a"), half, put("a"), put("b"))]
    hold.release()
    assert before.result(60) == "a"
    with pytest.raises(ValueError, match="no"):
        failed.result(60)
    with pytest.raises(IntegrityError):
        twice.result(60)
    assert after.result(60) == "b"
    assert keys(database) == {"a", "b"}
    assert len(seen) == 2


def test_what_follows_runs_in_order_after_the_commit_and_before_any_future_is_done(
    database: Database,
) -> None:
    told: list[tuple[str, set[str], list[bool]]] = []
    futures: list[Future[str]] = []

    def after(key: str) -> None:
        told.append((key, keys(database), [f.done() for f in futures]))
        assert threading.current_thread() is database.writer._thread

    hold = Hold(database)
    futures += [database.writer.submit(put(key), after) for key in "abc"]
    hold.release()
    wait(futures, 60)
    assert [(key, there) for key, there, _ in told] == [(key, {"a", "b", "c"}) for key in "abc"]
    assert all(done == [False] * 3 for _, _, done in told)


def test_what_follows_is_not_called_for_what_failed(database: Database) -> None:
    told: list[str] = []
    database.writer.run(put("a"))
    with pytest.raises(IntegrityError):
        database.writer.submit(put("a"), told.append).result(60)
    assert told == []


def test_a_mistake_in_what_follows_is_told_and_the_writer_goes_on(database: Database) -> None:
    def after(key: str) -> None:
        raise KeyError(key)

    with pytest.raises(KeyError):
        database.writer.submit(put("a"), after).result(60)
    assert database.writer.run(put("b")) == "b"
    assert keys(database) == {"a", "b"}


def test_a_file_is_synced_once_per_group_before_the_commit(database: Database) -> None:
    class File:
        calls = 0

        def sync(self) -> None:
            File.calls += 1
            assert keys(database) == set(), "a row was visible before its bytes were safe"

    file = File()

    def operation(key: str) -> Callable[[Connection], None]:
        def insert_and_ask(connection: Connection) -> None:
            put(key)(connection)
            database.writer.before_commit(file)

        return insert_and_ask

    hold = Hold(database)
    futures = [database.writer.submit(operation(key)) for key in "abc"]
    hold.release()
    wait(futures, 60)
    assert File.calls == 1
    assert keys(database) == {"a", "b", "c"}
    database.writer.run(put("d"))
    assert File.calls == 1, "a file was synced for a group that did not ask"


def test_a_sync_that_fails_fails_the_whole_group_and_leaves_no_row(database: Database) -> None:
    class Full:
        def sync(self) -> None:
            raise StorageFull("no space")

    def operation(connection: Connection) -> None:
        put("b")(connection)
        database.writer.before_commit(Full())

    told: list[str] = []
    hold = Hold(database)
    futures: list[Future[Any]] = [database.writer.submit(put("a"), told.append)]
    futures.append(database.writer.submit(operation))
    hold.release()
    for future in futures:
        with pytest.raises(StorageFull):
            future.result(60)
    assert keys(database) == set()
    assert told == []
    assert database.writer.run(put("c")) == "c"


def test_a_full_disk_fails_the_group_and_the_writer_goes_on_when_there_is_space(tmp_path: Path) -> None:
    """R8: the real thing, by a bound on the pages of the file."""
    database = open_database("", tmp_path)
    try:
        database.writer.run(lambda c: c.exec_driver_sql("PRAGMA max_page_count=60").close())
        with pytest.raises(StorageFull) as caught:
            database.writer.run(put("large", "x" * 1_000_000))
        assert caught.value.code == "FS-LED-001"
        assert caught.value.exit_code == 6
        # The connection was replaced, and with it the bound went: there is space again.
        assert database.writer.run(put("small")) == "small"
        assert keys(database) == {"small"}
    finally:
        database.close()


def test_a_full_disk_found_by_one_operation_concerns_its_whole_group(database: Database) -> None:
    def operation(connection: Connection) -> None:
        raise driver_error(sqlite3.SQLITE_FULL)

    hold = Hold(database)
    futures: list[Future[Any]] = [database.writer.submit(o) for o in (put("a"), operation)]
    hold.release()
    for future in futures:
        with pytest.raises(StorageFull):
            future.result(60)
    assert keys(database) == set()


def test_a_full_disk_beside_the_database_concerns_one_operation(database: Database) -> None:
    def operation(connection: Connection) -> None:
        raise StorageFull("no space for this update")

    hold = Hold(database)
    fine, full = database.writer.submit(put("a")), database.writer.submit(operation)
    hold.release()
    assert fine.result(60) == "a"
    with pytest.raises(StorageFull, match="for this update"):
        full.result(60)


@pytest.mark.parametrize(
    ("code", "kind", "unknown"),
    [(sqlite3.SQLITE_FULL, StorageFull, False), (sqlite3.SQLITE_IOERR, LedgerUnavailable, True)],
)
def test_a_commit_that_fails_fails_everybody_and_keeps_nothing(
    database: Database, code: int, kind: type[Exception], unknown: bool
) -> None:
    def refuse(connection: Connection) -> None:
        raise driver_error(code)

    def arm(connection: Connection) -> None:
        event.listen(database._writing, "commit", refuse, once=True)

    told: list[str] = []
    hold = Hold(database)
    futures: list[Future[Any]] = [database.writer.submit(put(key), told.append) for key in "ab"]
    futures.append(database.writer.submit(arm))
    hold.release()
    # The operation that holds is a group of its own, committed before `arm` runs.
    hold.future.result(60)
    for future in futures:
        with pytest.raises(kind) as caught:
            future.result(60)
        assert getattr(caught.value, "unknown", None) is unknown
    assert told == []
    assert keys(database) == set()
    assert database.writer.run(put("a")) == "a"


def test_beginning_is_tried_again_while_the_database_does_not_answer(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_FIRST_DELAY", 0.001)
    failures = iter([True, True, True])
    begun: list[str] = []

    def refuse(connection: Connection) -> None:
        begun.append("begin")
        if next(failures, False):
            raise driver_error(sqlite3.SQLITE_BUSY, "database is locked")

    event.listen(database._writing, "begin", refuse)
    assert database.writer.run(put("a")) == "a"
    assert len(begun) == 4
    assert keys(database) == {"a"}


def test_after_some_patience_what_waits_is_refused(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_FIRST_DELAY", 0.001)
    database.writer._patience_seconds = 0.01

    def refuse(connection: Connection) -> None:
        raise driver_error(sqlite3.SQLITE_CANTOPEN, "unable to open database file")

    event.listen(database._writing, "begin", refuse)
    with pytest.raises(LedgerUnavailable, match="cannot be written or read now") as caught:
        database.writer.run(put("a"))
    assert not caught.value.unknown
    event.remove(database._writing, "begin", refuse)
    assert database.writer.run(put("b")) == "b"
    assert keys(database) == {"b"}


def test_an_operation_that_ends_the_shared_transaction_is_found_out(database: Database) -> None:
    with pytest.raises(RuntimeError, match="shares with others"):
        database.writer.run(lambda connection: connection.rollback())
    assert database.writer.run(put("a")) == "a"


def test_nobody_waits_for_the_writer_where_that_would_hang(database: Database) -> None:
    with pytest.raises(RuntimeError, match="wait for itself"):
        database.writer.run(lambda connection: database.writer.run(put("a")))

    async def in_a_loop() -> None:
        with pytest.raises(RuntimeError, match="event loop"):
            database.writer.run(put("a"))
        assert await asyncio.wrap_future(database.writer.submit(put("b"))) == "b"

    asyncio.run(in_a_loop())


def test_what_was_cancelled_while_waiting_is_left_out(database: Database) -> None:
    hold = Hold(database)
    cancelled, kept = database.writer.submit(put("a")), database.writer.submit(put("b"))
    assert cancelled.cancel()
    hold.release()
    assert kept.result(60) == "b"
    assert keys(database) == {"b"}


def test_closing_carries_out_what_was_submitted_and_refuses_the_rest(tmp_path: Path) -> None:
    database = open_database("", tmp_path)
    hold = Hold(database)
    futures = [database.writer.submit(put(f"{i:03}")) for i in range(200)]
    closing = threading.Thread(target=database.close)
    closing.start()
    hold.release()
    closing.join(60)
    assert [f.result(0) for f in futures] == [f"{i:03}" for i in range(200)]
    with pytest.raises(LedgerClosed):
        database.writer.submit(put("late"))
    again = open_database("", tmp_path)
    assert len(keys(again)) == 200
    again.close()


def test_many_threads_submit_at_once(database: Database) -> None:
    def submit(name: str) -> None:
        for i in range(50):
            database.writer.run(put(f"{name}{i}"))

    threads = [threading.Thread(target=submit, args=(name,)) for name in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(keys(database)) == 400


class Puts:
    """Puts keys; an empty one is a mistake, and so is one too many results."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.told: list[list[str]] = []
        self.too_many = False

    def carry_out(self, connection: Connection, items: Sequence[str]) -> list[str]:
        self.calls.append(list(items))
        for key in items:
            put(key)(connection)
            if not key:
                raise ValueError("no key")
        return [key.upper() for key in items]

    def announce(self, found: Sequence[str]) -> list[str]:
        self.told.append(list(found))
        return [*found, "more"] if self.too_many else list(found)


def test_requests_of_one_kind_that_wait_are_carried_out_together(database: Database) -> None:
    kind, hold = Puts(), Hold(database)
    seen = commits(database)
    futures: list[Future[Any]] = [database.writer.submit_item(kind, key) for key in "ab"]
    futures.append(database.writer.submit(put("c")))  # in between: the order is kept
    futures += [database.writer.submit_item(kind, key) for key in "de"]
    hold.release()
    assert [future.result(60) for future in futures] == ["A", "B", "c", "D", "E"]
    assert kind.calls == [["a", "b"], ["d", "e"]]
    assert kind.told == [["A", "B"], ["D", "E"]]
    assert keys(database) == set("abcde")
    assert len(seen) == 2


def test_a_request_that_fails_is_undone_alone(database: Database) -> None:
    kind, hold = Puts(), Hold(database)
    futures = [database.writer.submit_item(kind, key) for key in ("a", "", "b", "a")]
    hold.release()
    assert [futures[i].result(60) for i in (0, 2)] == ["A", "B"]
    with pytest.raises(ValueError, match="no key"):
        futures[1].result(60)
    with pytest.raises(IntegrityError):
        futures[3].result(60)
    assert keys(database) == {"a", "b"}
    assert kind.told == [["A"], ["B"]]


def test_results_that_do_not_fit_their_requests_are_a_mistake_and_the_writer_goes_on(
    database: Database,
) -> None:
    kind, hold = Puts(), Hold(database)
    kind.too_many = True
    futures = [database.writer.submit_item(kind, key) for key in "ab"]
    futures.append(database.writer.submit(put("c")))
    hold.release()
    for future in futures[:2]:
        with pytest.raises(ValueError, match="longer"):
            future.result(60)
    assert futures[2].result(60) == "c"
    assert keys(database) == set("abc")

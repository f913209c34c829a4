"""Updates that are accepted together: each has its own verdict, and a mistake in one touches no other."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, insert, select
from sqlalchemy.exc import IntegrityError

from fedsim.journal import Entry
from fedsim.pb import federation_pb2 as pb
from fedsim.server.accepting import Accepting, Decision, Handed, Place
from fedsim.server.board import ANSWERED, OPEN
from fedsim.server.database import Database
from fedsim.server.run_ledger import RunLedger
from fedsim.server.segments import Segments, Window
from fedsim.server.tables import journal, runs, submissions, tasks
from tests.state_folders import new_database

RUN = "0123456789ab"


class Engine:
    """What of a run's engine is asked for."""

    def __init__(self, ledger: RunLedger) -> None:
        self.ledger = ledger
        self.accepting = True
        self.window, self.attempt = 2, 1
        self.real_now = 7.5
        self.answers: dict[tuple[int, int], Any] = {}
        self.delivered: list[list[Entry]] = []

    def deliver(self, entries: list[Entry]) -> None:
        self.delivered.append(entries)


class Task:
    def __init__(self, client: int) -> None:
        self.task_id = os.urandom(16)
        self.client, self.version, self.dispatched = client, 4, 5.0
        self.status = OPEN


class Run:
    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        row = {
            "run_id": RUN, "name": "run", "content_digest": b"", "config": "", "nodes": "",
            "state": "running", "created": 0.0, "folder": "run",
        }  # fmt: skip
        database.writer.run(lambda connection: connection.execute(insert(runs), row).rowcount)
        self.engine: Any = Engine(RunLedger(database, RUN))
        self.segments = Segments(folder / "segments")
        self.kind = Accepting(self.engine, self.segments)

    def tasks(self, count: int) -> list[Any]:
        made = [Task(client) for client in range(count)]
        rows = [
            {
                "task_id": task.task_id, "run_id": RUN, "window": 2, "attempt": 1, "client": task.client,
                "version": 4, "round_index": 2, "round_attempt": 1, "state": "open", "dispatched": 5.0,
            }
            for task in made
        ]  # fmt: skip
        self.database.writer.run(lambda connection: connection.execute(insert(tasks), rows).rowcount)
        return made

    def submit(self, handed: list[Handed]) -> list[Future[Decision]]:
        """All of them in one group of the writer."""
        go, begun = threading.Event(), threading.Event()

        def hold(connection: object) -> None:
            begun.set()
            assert go.wait(60)

        self.database.writer.submit(hold)
        assert begun.wait(60)
        futures = [self.database.writer.submit_item(self.kind, item) for item in handed]
        go.set()
        return futures

    def rows(self) -> list[Any]:
        with self.database.read() as connection:
            return list(connection.execute(select(submissions).order_by(submissions.c.seq)).mappings())

    def lines(self) -> int:
        with self.database.read() as connection:
            return len(connection.execute(select(journal.c.seq)).all())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    database = new_database(tmp_path)
    yield Run(database, tmp_path)
    database.close()


def handed(task: Any, content: bytes = b"", *, key: bytes = b"") -> Handed:
    content = content or os.urandom(50)
    body = pb.SubmitBody(task_id=task.task_id, key=key or os.urandom(16), examples=task.client + 1)
    place = Place(os.urandom(32), len(content), content)
    return Handed(task, body, pb.SubmitRequest(body=b"body", signature=b"signature"), place)


def verdicts(futures: list[Future[Decision]]) -> list[int]:
    return [future.result(60).verdict for future in futures]


def test_many_updates_share_their_statements_and_each_has_its_bytes(run: Run) -> None:
    made = run.tasks(20)
    statements: list[str] = []
    event.listen(run.database._writing, "before_cursor_execute", lambda *of: statements.append(of[2]))
    items = [handed(task) for task in made]
    assert verdicts(run.submit(items)) == [pb.ACCEPTED] * 20
    assert sum(text.startswith(("INSERT", "SELECT")) for text in statements) == 3
    assert [row["client"] for row in run.rows()] == list(range(20))
    segment = run.segments.of(Window(RUN, 2, 1))
    for row, item in zip(run.rows(), items, strict=True):
        offset = int(row["place"].removeprefix("2/1/"))
        assert bytes(segment.read(offset, row["size"])) == item.place.content
    assert all(task.status == ANSWERED for task in made)
    (entries,) = run.engine.delivered
    assert [entry.payload["client"] for entry in entries] == list(range(20))
    assert [entry.seq for entry in entries] == [row["seq"] for row in run.rows()]
    assert {key[0] for key in run.engine.answers} == set(range(20))


def test_the_same_task_twice_in_one_group_counts_once(run: Run) -> None:
    first, second = run.tasks(2)
    futures = run.submit([handed(first), handed(first), handed(second)])
    assert verdicts(futures) == [pb.ACCEPTED, pb.DUPLICATE, pb.ACCEPTED]
    assert futures[1].result().first == pb.ACCEPTED
    assert len(run.rows()) == run.lines() == 2


def test_an_unknown_task_in_a_group_is_late_and_the_others_count(run: Run) -> None:
    known = run.tasks(2)
    futures = run.submit([handed(known[0]), handed(Task(9)), handed(known[1])])
    assert verdicts(futures) == [pb.ACCEPTED, pb.LATE, pb.ACCEPTED]


def test_a_closing_round_asks_to_send_again_and_keeps_nothing(run: Run) -> None:
    made = run.tasks(3)
    run.engine.accepting = False
    found = [future.result(60) for future in run.submit([handed(task) for task in made])]
    assert [decision.verdict for decision in found] == [pb.RETRY] * 3
    assert all(decision.delay > 0 for decision in found)
    assert run.rows() == []
    assert run.lines() == 0
    assert run.engine.answers == {}


def test_a_key_that_was_used_before_fails_alone(run: Run) -> None:
    made = run.tasks(3)
    items = [handed(made[0], key=b"k" * 16), handed(made[1], key=b"k" * 16), handed(made[2])]
    good, bad, other = run.submit(items)
    assert verdicts([good, other]) == [pb.ACCEPTED] * 2
    with pytest.raises(IntegrityError):
        bad.result(60)
    assert [row["client"] for row in run.rows()] == [0, 2]
    assert run.lines() == 2
    assert made[1].status == OPEN
    assert set(run.engine.answers) == {(0, 4), (2, 4)}


def test_uploads_and_inline_updates_can_be_in_one_group(run: Run) -> None:
    made = run.tasks(3)
    items = [handed(task) for task in made]
    items[1] = items[1]._replace(place=Place(b"d" * 32, 10_000_000))
    assert verdicts(run.submit(items)) == [pb.ACCEPTED] * 3
    places = [row["place"] for row in run.rows()]
    assert places == ["2/1/0", "object", "2/1/50"]

"""What is durable of one run: its journal, its plan, the verdicts on answers, its windows.

Functions that take a connection run inside the writer's transaction. An answer, its verdict and its line
in the journal are one transaction, and a task has one verdict: at-least-once delivery counts once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, case, delete, func, insert, select, update

from fedsim.journal import DECISIONS, Entry
from fedsim.server.board import OpenTask
from fedsim.server.database import Database
from fedsim.server.tables import events, journal, run_members, runs, submissions, tasks, windows

FOR_GOOD = frozenset({"ok", "target", "early_stop"})
"""States of a run that has come to its end: it cannot be resumed."""
FINISHED = FOR_GOOD | {"stopped", "failed"}
"""States of a run that does not go on by itself."""
STOPPING = "stopping", "after the open round"
"""State and detail of a run that an operator has told to end."""


class Stop(Exception):
    """The run stops where it is, with this state of the run; everything is in the ledger."""

    def __init__(self, state: str, detail: str = "") -> None:
        super().__init__(detail)
        self.state, self.detail = state, detail


class Forgotten(NamedTuple):
    """What rows were named that are gone.

    Args:
        tasks: their names.
        objects: digests that they named; other rows may name them too.
    """

    tasks: Sequence[bytes] = ()
    objects: Sequence[bytes] = ()


class Window(NamedTuple):
    """A committed or failed window, as a row."""

    window: int
    attempt: int
    version: int
    outcome: str
    record: str
    state_name: str
    state_digest: bytes | None
    journal_seq: int
    clock: float


class Standing(NamedTuple):
    """What the ledger says of a task.

    Args:
        state: open, failed, rejected or closed.
        verdict: on its answer, None without one; reason: of the verdict.
    """

    state: str
    verdict: int | None
    reason: str | None


class RunLedger:
    """The rows of one run.

    Args:
        database: of the coordinator.
        run_id: whose.
    """

    def __init__(self, database: Database, run_id: str) -> None:
        self.database = database
        self.run_id = run_id
        with database.read() as connection:
            last = connection.execute(
                select(func.max(journal.c.seq)).where(journal.c.run_id == run_id)
            ).scalar()
            passed = connection.execute(
                select(func.max(windows.c.journal_seq)).where(windows.c.run_id == run_id)
            ).scalar()
        self.seq = max(last or 0, passed or 0)  # only the writer thread counts on

    # ------------------------------------------------------------ inside the writer's transaction

    def note(
        self, connection: Connection, lines: Iterable[tuple[int, str, float, Mapping[str, Any]]]
    ) -> list[Entry]:
        """Write lines (window, kind, now, payload) into the journal."""
        entries: list[Entry] = []
        for window, kind, now, payload in lines:
            self.seq += 1
            entries.append(Entry(self.seq, window, kind, now, dict(payload)))
        if entries:
            connection.execute(
                insert(journal),
                [
                    {
                        "run_id": self.run_id, "seq": e.seq, "window": e.window, "kind": e.kind,
                        "now": e.now, "payload": json.dumps(e.payload, separators=(",", ":")),
                    }
                    for e in entries
                ],
            )  # fmt: skip
        return entries

    def plan(self, connection: Connection, window: int, attempt: int, planned: Sequence[OpenTask]) -> None:
        """Write the tasks of a dispatch, before any is offered."""
        connection.execute(
            insert(tasks),
            [
                {
                    "task_id": t.task_id, "run_id": self.run_id, "window": window, "attempt": attempt,
                    "client": t.client, "version": t.version, "round_index": t.round_index,
                    "round_attempt": t.round_attempt, "state": "open", "dispatched": t.dispatched,
                    "local": t.local, "steps": t.steps, "message_digest": t.message.object.digest,
                    "lent_digest": None if t.lent is None else t.lent.object.digest,
                }
                for t in planned
            ],
        )  # fmt: skip

    def submit(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the verdicts on tasks, of the same columns; the caller has seen that there are none."""
        more = {"run_id": self.run_id, "received": time.time()}
        connection.execute(insert(submissions), [{**more, **row} for row in rows])

    def standing(self, connection: Connection, task_id: bytes) -> Standing | None:
        """Where a task stands; None where it is not known, or not any more."""
        return self.standings(connection, [task_id]).get(task_id)

    def standings(self, connection: Connection, ids: Sequence[bytes]) -> dict[bytes, Standing]:
        """Where tasks stand; those that are not known, or not any more, are left out."""
        found: dict[bytes, Standing] = {}
        for start in range(0, len(ids), 500):
            rows = connection.execute(
                select(tasks.c.task_id, tasks.c.state, submissions.c.verdict, submissions.c.reason)
                .select_from(tasks.outerjoin(submissions, tasks.c.task_id == submissions.c.task_id))
                .where(tasks.c.task_id.in_(ids[start : start + 500]), tasks.c.run_id == self.run_id)
            )
            found |= {task_id: Standing(*known) for task_id, *known in rows}
        return found

    def strike(self, connection: Connection, client: int, most: int) -> bool:
        """One refused update more of this client; whether it is excluded now."""
        mine = (run_members.c.run_id == self.run_id) & (run_members.c.client == client)
        connection.execute(update(run_members).where(mine).values(strikes=run_members.c.strikes + 1))
        strikes = connection.execute(select(run_members.c.strikes).where(mine)).scalar() or 0
        if strikes < most:
            return False
        connection.execute(update(run_members).where(mine).values(excluded=f"{strikes} refused updates"))
        return True

    def commit(
        self,
        connection: Connection,
        row: Window,
        *,
        folded: Sequence[bytes],
        cancelled: Sequence[bytes],
        previous: Window | None,
        in_flight: frozenset[bytes],
        forget_before: int,
        progress: Mapping[str, Any],
    ) -> Forgotten:
        """The window is committed: its row, the run's row, and what is no longer needed goes.

        Args:
            folded: tasks whose answers the new version contains.
            cancelled: tasks that nobody answers any more.
            previous: the checkpoint before; what it was made of is kept no longer.
            in_flight: tasks that clients were at work on at that checkpoint: a return to it needs them.
            forget_before: journal number; lines below belong to states that nobody returns to.
            progress: further columns of the run's row.

        Returns:
            What is forgotten with it: tasks that a return to the checkpoint before would not need.
        """
        connection.execute(
            insert(windows), {"run_id": self.run_id, **row._asdict(), "committed_at": time.time()}
        )
        connection.execute(
            update(runs)
            .where(runs.c.run_id == self.run_id)
            .values(rounds_done=row.window + (row.outcome != "failed"), recoveries=0, **progress)
        )
        for start in range(0, len(folded), 500):
            part = folded[start : start + 500]
            connection.execute(update(tasks).where(tasks.c.task_id.in_(part)).values(folded_in=row.version))
        self.close_tasks(connection, cancelled, "closed")
        connection.execute(
            delete(journal).where(journal.c.run_id == self.run_id, journal.c.seq <= forget_before)
        )
        self.tell(connection, "round", json.loads(row.record))
        return Forgotten() if previous is None else self._forget_tasks(connection, previous, in_flight)

    def tell(self, connection: Connection, type: str, data: Mapping[str, Any]) -> None:
        """An event for watchers."""
        connection.execute(
            insert(events),
            {"run_id": self.run_id, "type": type, "data": json.dumps(data), "time": time.time()},
        )

    def set_state(self, connection: Connection, state: str, detail: str = "") -> None:
        """The run is in this state, and watchers hear of it."""
        connection.execute(
            update(runs).where(runs.c.run_id == self.run_id).values(state=state, detail=detail)
        )
        self.tell(connection, "state", {"state": state, "detail": detail})

    def _forget_tasks(
        self, connection: Connection, previous: Window, in_flight: frozenset[bytes]
    ) -> Forgotten:
        """Drop tasks and verdicts that a return to this checkpoint would not need."""
        folded = tasks.c.folded_in <= previous.version
        over = (tasks.c.state != "open") & tasks.c.folded_in.is_(None) & (tasks.c.window < previous.window)
        gone = self._named(connection, (tasks.c.run_id == self.run_id) & (folded | over), in_flight)
        for start in range(0, len(gone.tasks), 500):
            part = gone.tasks[start : start + 500]
            connection.execute(delete(submissions).where(submissions.c.task_id.in_(part)))
            connection.execute(delete(tasks).where(tasks.c.task_id.in_(part)))
        return gone

    def drop_bytes(self, connection: Connection) -> Forgotten:
        """The run has ended for good: its journal goes, which its folder has too, and what rows name.

        The verdicts of its last rounds stay for a while: a client may not have heard of its own yet.
        """
        gone = self._named(connection, tasks.c.run_id == self.run_id, frozenset())
        connection.execute(delete(journal).where(journal.c.run_id == self.run_id))
        nothing = {"message_digest": None, "lent_digest": None, "local": ""}
        connection.execute(update(tasks).where(tasks.c.run_id == self.run_id).values(nothing))
        still_open = (tasks.c.run_id == self.run_id) & (tasks.c.state == "open")
        connection.execute(update(tasks).where(still_open).values(state="closed"))
        empty = {"digest": None, "place": "", "size": 0, "body": b"", "signature": b"", "metrics": "{}"}
        connection.execute(update(submissions).where(submissions.c.run_id == self.run_id).values(empty))
        return gone

    def _named(self, connection: Connection, which: ColumnElement[bool], but: frozenset[bytes]) -> Forgotten:
        """Tasks, without those of `but`, and the objects that they and their answers name."""
        stored = case((submissions.c.place == "object", submissions.c.digest))
        rows = connection.execute(
            select(tasks.c.task_id, tasks.c.message_digest, tasks.c.lent_digest, stored)
            .select_from(tasks.outerjoin(submissions, tasks.c.task_id == submissions.c.task_id))
            .where(which)
        ).all()
        rows = [row for row in rows if row[0] not in but]
        digests = {digest for _, *named in rows for digest in named if digest}
        return Forgotten([row[0] for row in rows], sorted(digests))

    def close_tasks(self, connection: Connection, ids: Sequence[bytes], state: str) -> None:
        """Tasks that nobody has to do any more."""
        for start in range(0, len(ids), 500):
            part = ids[start : start + 500]
            connection.execute(update(tasks).where(tasks.c.task_id.in_(part)).values(state=state))

    def go_back(self, connection: Connection, last: Window) -> None:
        """The windows after `last` are open again: their states were lost, their answers were not."""
        mine = windows.c.run_id == self.run_id
        connection.execute(delete(windows).where(mine, windows.c.window > last.window))
        later = (tasks.c.run_id == self.run_id) & (tasks.c.folded_in > last.version)
        connection.execute(update(tasks).where(later).values(folded_in=None))
        self.tell(connection, "went_back", {"window": last.window, "version": last.version})

    # ------------------------------------------------------------ reading, when a run is taken up

    def committed(self, most: int = 2) -> list[Window]:
        """The last windows that moved the model on, newest first."""
        columns = [windows.c[name] for name in Window._fields]
        with self.database.read() as connection:
            rows = connection.execute(
                select(*columns)
                .where(windows.c.run_id == self.run_id, windows.c.state_name != "")
                .order_by(windows.c.version.desc(), windows.c.window.desc(), windows.c.attempt.desc())
                .limit(most)
            ).all()
        return [Window(*row) for row in rows]

    def records(self) -> list[str]:
        """JSON of every window's record in order, failed ones too."""
        with self.database.read() as connection:
            found = connection.execute(
                select(windows.c.record)
                .where(windows.c.run_id == self.run_id)
                .order_by(windows.c.window, windows.c.attempt)
            )
            return [str(record) for (record,) in found]

    def oldest_segment(self, default: int) -> int:
        """The first window in whose segment an answer lies that may still be folded, at most `default`."""
        with self.database.read() as connection:
            places = connection.execute(
                select(submissions.c.place).where(
                    submissions.c.run_id == self.run_id, submissions.c.place.contains("/")
                )
            ).scalars()
            return min([default, *(int(place.partition("/")[0]) for place in places)])

    def entries(self, decision_seq: int, event_seq: int) -> list[Entry]:
        """The journal after a checkpoint: decisions and events are counted apart."""
        with self.database.read() as connection:
            rows = connection.execute(
                select(journal.c.seq, journal.c.window, journal.c.kind, journal.c.now, journal.c.payload)
                .where(journal.c.run_id == self.run_id, journal.c.seq > min(decision_seq, event_seq))
                .order_by(journal.c.seq)
            ).all()
        found = [Entry(seq, window, kind, now, json.loads(text)) for seq, window, kind, now, text in rows]
        return [e for e in found if e.seq > (decision_seq if e.kind in DECISIONS else event_seq)]

    def task_names(self) -> list[bytes]:
        """Of every task that is not forgotten."""
        with self.database.read() as connection:
            found = select(tasks.c.task_id).where(tasks.c.run_id == self.run_id)
            return list(connection.execute(found).scalars())

    def task_rows(self) -> list[Any]:
        """Every task that is not forgotten, with its verdict where it has one (else None)."""
        answer = [c for c in submissions.c if c.name not in ("task_id", "run_id", "client")]
        with self.database.read() as connection:
            return list(
                connection.execute(
                    select(*tasks.c, *answer)
                    .select_from(tasks.outerjoin(submissions, tasks.c.task_id == submissions.c.task_id))
                    .where(tasks.c.run_id == self.run_id)
                ).mappings()
            )

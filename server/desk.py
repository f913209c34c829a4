"""Where a run takes answers: each verdict, its bytes and its line in the journal are one transaction.

Called by the service, from any thread; what is decided runs in the writer's order, so that an answer which
is acknowledged is folded, and one that comes after the round's close is told so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import NamedTuple

from sqlalchemy import Connection

from fedsim.journal import Entry
from fedsim.pb import federation_pb2 as pb
from fedsim.server.accepting import Accepting, Decision, Handed, Place, closed, line_of
from fedsim.server.board import ANSWERED, CLOSED, OPEN, Board, OpenTask
from fedsim.server.remote import RemoteEngine
from fedsim.server.segments import Segments

__all__ = ["Decision", "Desk", "Place"]


class _Taken(NamedTuple):
    decision: Decision
    entries: list[Entry]


class Desk:
    """Takes the answers of one run.

    Args:
        engine: of the run; its thread hears of what is decided here.
        board: where the tasks are offered.
        segments: files of small updates.
        max_strikes: refused updates after which a client is excluded.
        excluded: called with a client that is excluded from now on.
        max_attempts: times that a task is offered; waits: whether a task outlives its lease at all.
    """

    def __init__(
        self,
        engine: RemoteEngine,
        board: Board,
        segments: Segments,
        *,
        max_strikes: int,
        excluded: Callable[[int], None],
        max_attempts: int,
        waits: bool,
    ) -> None:
        self.engine, self.board = engine, board
        self.ledger = engine.ledger
        self._accepting = Accepting(engine, segments)
        self.max_strikes, self.excluded = max_strikes, excluded
        self.max_attempts, self.waits = max_attempts, waits

    def accept(
        self, task: OpenTask, body: pb.SubmitBody, request: pb.SubmitRequest, place: Place
    ) -> Future[Decision]:
        """A valid update: durable, and counted once, before the future is done."""

        item = Handed(task, body, request, place)
        return self.ledger.database.writer.submit_item(self._accepting, item)

    def reject(
        self, task: OpenTask, body: pb.SubmitBody, request: pb.SubmitRequest, reason: str, text: str
    ) -> Future[Decision]:
        """An update that must not count: the task is used up, and the client has a strike."""

        def operation(connection: Connection) -> _Taken:
            over = closed(task, self.ledger.standing(connection, task.task_id))
            if over is not None:
                return _Taken(over, [])
            entries = self._note(
                connection, task, "refused", self.engine.real_now, {"reason": f"{reason}: {text}"}
            )
            row = {
                "task_id": task.task_id, "client": task.client, "key": body.key, "reason": reason,
                "seq": entries[0].seq, "verdict": pb.REJECTED, "body": request.body,
                "signature": request.signature,
            }  # fmt: skip
            self.ledger.submit(connection, [row])
            self.ledger.close_tasks(connection, [task.task_id], "rejected")
            if self.ledger.strike(connection, task.client, self.max_strikes):
                self.excluded(task.client)
            return _Taken(Decision(pb.REJECTED, reason, text), entries)

        return self._decide(task, operation)

    def fail(self, task: OpenTask, reason: str) -> Future[Decision]:
        """The client cannot do the task, or is gone."""

        def operation(connection: Connection) -> _Taken:
            over = closed(task, self.ledger.standing(connection, task.task_id))
            if over is not None:
                return _Taken(over, [])
            entries = self._note(connection, task, "failed", self.engine.real_now, {"reason": reason})
            self.ledger.close_tasks(connection, [task.task_id], "failed")
            return _Taken(Decision(pb.REJECTED, "failed", reason), entries)

        return self._decide(task, operation)

    def expired(self, task: OpenTask) -> Future[Decision] | None:
        """The lease of a task is over; None where the task is offered again."""
        if self.waits and task.attempt + 1 < self.max_attempts:
            task.again()
            return None
        return self.fail(task, "its lease ended")

    def withdraw(self, task: OpenTask) -> Future[Decision]:
        """Whatever this client answered, or would answer, to the task does not count: it was revoked."""

        def operation(connection: Connection) -> _Taken:
            payload = {"reason": "the client was revoked"}
            kind = "refused" if task.status == ANSWERED else "failed"
            entries = self._note(connection, task, kind, self.engine.real_now, payload)
            self.ledger.close_tasks(connection, [task.task_id], "failed")
            return _Taken(Decision(pb.REJECTED, "revoked"), entries)

        return self._decide(task, operation)

    def withdraw_those(self, gone: Callable[[str], bool]) -> None:
        """Withdraw what nodes hold or have answered of whom `gone` says so; waits for the ledger."""
        for task in list(self.engine.tasks.values()):
            if task.status in (OPEN, ANSWERED) and gone(task.node_id):
                self.withdraw(task).result()

    def _note(
        self, connection: Connection, task: OpenTask, kind: str, now: float, more: Mapping[str, object]
    ) -> list[Entry]:
        return self.ledger.note(connection, [(self.engine.window, kind, now, line_of(task, **more))])

    def _decide(self, task: OpenTask, operation: Callable[[Connection], _Taken]) -> Future[Decision]:
        """Run the operation in the writer, and tell the run's thread once it is durable."""

        def after(taken: _Taken) -> None:
            if not taken.entries:
                return
            if task.status == OPEN:
                task.status = CLOSED
            self.engine.deliver(taken.entries)

        decided: Future[Decision] = Future()

        def finished(future: Future[_Taken]) -> None:
            error = future.exception()
            if error is None:
                decided.set_result(future.result().decision)
            else:
                decided.set_exception(error)

        self.ledger.database.writer.submit(operation, after).add_done_callback(finished)
        return decided

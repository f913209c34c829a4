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
from fedsim.server.answers import Answer, own_metrics, row_of
from fedsim.server.board import ANSWERED, CLOSED, OPEN, Board, OpenTask
from fedsim.server.failpoints import reached
from fedsim.server.remote import RemoteEngine
from fedsim.server.segments import Segments, Window

RETRY_SECONDS = 0.2
"""After which an answer is sent again that came while a round was closing."""


class Place(NamedTuple):
    """Where the bytes of an update are: inline in `content`, or among the objects under `digest`."""

    digest: bytes
    size: int
    content: bytes | None = None


class Decision(NamedTuple):
    """What a submission is answered.

    Args:
        verdict: of ``pb.Verdict``; first: that of a DUPLICATE.
        reason: one word; text: for people; delay: seconds of a RETRY.
    """

    verdict: int
    reason: str = ""
    text: str = ""
    first: int = 0
    delay: float = 0.0


class _Taken(NamedTuple):
    decision: Decision
    entries: list[Entry]
    answer: Answer | None = None


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
        self.engine, self.board, self.segments = engine, board, segments
        self.ledger = engine.ledger
        self.max_strikes, self.excluded = max_strikes, excluded
        self.max_attempts, self.waits = max_attempts, waits

    def accept(
        self, task: OpenTask, body: pb.SubmitBody, request: pb.SubmitRequest, place: Place
    ) -> Future[Decision]:
        """A valid update: durable, and counted once, before the future is done."""

        def operation(connection: Connection) -> _Taken:
            closed = self._closed(connection, task)
            if closed is not None:
                return _Taken(closed, [])
            engine = self.engine
            if not engine.accepting:
                text = "the round is closing; send it again"
                return _Taken(Decision(pb.RETRY, "closing", text, delay=RETRY_SECONDS), [])
            now = engine.real_now
            answer = Answer(
                task.task_id,
                task.client,
                task.version,
                place.digest,
                place.size,
                self._stored(place),
                body.examples,
                body.local_steps,
                body.normaliser,
                now - task.dispatched,
                own_metrics(body.metrics),
            )
            (entry,) = self._note(connection, task, "arrived", now, {"seconds": answer.seconds})
            row = {**row_of(answer, body, request), "seq": entry.seq, "verdict": pb.ACCEPTED}
            self.ledger.submit(connection, row)
            reached("before_accept")
            return _Taken(Decision(pb.ACCEPTED), [entry], answer)

        return self._decide(task, operation)

    def reject(
        self, task: OpenTask, body: pb.SubmitBody, request: pb.SubmitRequest, reason: str, text: str
    ) -> Future[Decision]:
        """An update that must not count: the task is used up, and the client has a strike."""

        def operation(connection: Connection) -> _Taken:
            closed = self._closed(connection, task)
            if closed is not None:
                return _Taken(closed, [])
            entries = self._note(
                connection, task, "refused", self.engine.real_now, {"reason": f"{reason}: {text}"}
            )
            self.ledger.submit(
                connection,
                {
                    "task_id": task.task_id, "client": task.client, "key": body.key, "reason": reason,
                    "seq": entries[0].seq, "verdict": pb.REJECTED, "body": request.body,
                    "signature": request.signature,
                },
            )  # fmt: skip
            self.ledger.close_tasks(connection, [task.task_id], "rejected")
            if self.ledger.strike(connection, task.client, self.max_strikes):
                self.excluded(task.client)
            return _Taken(Decision(pb.REJECTED, reason, text), entries)

        return self._decide(task, operation)

    def fail(self, task: OpenTask, reason: str) -> Future[Decision]:
        """The client cannot do the task, or is gone."""

        def operation(connection: Connection) -> _Taken:
            closed = self._closed(connection, task)
            if closed is not None:
                return _Taken(closed, [])
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

    def _closed(self, connection: Connection, task: OpenTask) -> Decision | None:
        """What is answered where the task has a verdict already, or its round is over."""
        known = self.ledger.standing(connection, task.task_id)
        if known is not None and known.verdict is not None:
            text = "the task was answered before"
            return Decision(pb.DUPLICATE, known.reason or "", text, first=known.verdict)
        if task.status == CLOSED or known is None or known.state != "open":
            return Decision(pb.LATE, "late", "the round closed without this answer")
        return None

    def _note(
        self, connection: Connection, task: OpenTask, kind: str, now: float, more: Mapping[str, object]
    ) -> list[Entry]:
        payload = {"client": task.client, "version": task.version, "task": task.task_id.hex(), **more}
        return self.ledger.note(connection, [(self.engine.window, kind, now, payload)])

    def _stored(self, place: Place) -> str:
        """Write an inline update into the window's segment; it is synced with the commit of its group."""
        if place.content is None:
            return "object"
        window, attempt = self.engine.window, self.engine.attempt
        segment = self.segments.of(Window(self.ledger.run_id, window, attempt))
        offset, _ = segment.append(place.content)
        reached("update_appended")
        self.ledger.database.writer.before_commit(segment)
        return f"{window}/{attempt}/{offset}"

    def _decide(self, task: OpenTask, operation: Callable[[Connection], _Taken]) -> Future[Decision]:
        """Run the operation in the writer, and tell the run's thread once it is durable."""

        def after(taken: _Taken) -> None:
            if not taken.entries:
                return
            if taken.answer is not None:
                reached("after_accept")
                self.engine.answers[task.client, task.version] = taken.answer
            if task.status == OPEN:
                task.status = ANSWERED if taken.answer is not None else CLOSED
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

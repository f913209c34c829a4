"""Valid updates become answers: bytes, verdict and line in the journal of many of them in one go.

When a thousand clients answer at once, most of what an answer costs the ledger is the statement, not the
row. So the updates that wait together share their statements; each still has its own verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection

from fedsim.journal import Entry
from fedsim.pb import federation_pb2 as pb
from fedsim.server.answers import Answer, own_metrics, row_of
from fedsim.server.board import ANSWERED, CLOSED, OPEN, OpenTask
from fedsim.server.failpoints import reached
from fedsim.server.remote import RemoteEngine
from fedsim.server.run_ledger import Standing
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


class Handed(NamedTuple):
    """A submission whose update is valid."""

    task: OpenTask
    body: pb.SubmitBody
    request: pb.SubmitRequest
    place: Place


class Taken(NamedTuple):
    """What was decided on one submission, and what is in the ledger of it."""

    task: OpenTask
    decision: Decision
    entry: Entry | None = None
    answer: Answer | None = None


class Accepting:
    """Takes valid updates of one run, see `writer_jobs.Kind`; in the writer's thread.

    Args:
        engine: of the run; its thread hears of what is decided here.
        segments: files of small updates.
    """

    def __init__(self, engine: RemoteEngine, segments: Segments) -> None:
        self.engine, self.segments = engine, segments
        self.ledger = engine.ledger

    def carry_out(self, connection: Connection, items: Sequence[Handed]) -> list[Taken]:
        """Write bytes, verdicts and lines of those that count."""
        standings = self.ledger.standings(connection, [item.task.task_id for item in items])
        open_ones: list[Handed] = []
        refused: dict[int, Decision] = {}  # position -> what is answered instead
        for position, item in enumerate(items):
            decision = closed(item.task, standings.get(item.task.task_id))
            if decision is None and not self.engine.accepting:
                text = "the round is closing; send it again"
                decision = Decision(pb.RETRY, "closing", text, delay=RETRY_SECONDS)
            if decision is None:
                open_ones.append(item)
                # The same answer twice among these items is one answer.
                standings[item.task.task_id] = Standing("open", pb.ACCEPTED, "")
            else:
                refused[position] = decision
        taken = iter(self._taken(connection, open_ones) if open_ones else ())
        return [
            Taken(item.task, refused[position]) if position in refused else next(taken)
            for position, item in enumerate(items)
        ]

    def announce(self, found: Sequence[Taken]) -> list[Decision]:
        """Tell the run's thread, now that they are durable."""
        for task, _, _, answer in found:
            if answer is not None:
                reached("after_accept")
                self.engine.answers[task.client, task.version] = answer
                if task.status == OPEN:
                    task.status = ANSWERED
        self.engine.deliver([taken.entry for taken in found if taken.entry is not None])
        return [taken.decision for taken in found]

    def _taken(self, connection: Connection, items: Sequence[Handed]) -> list[Taken]:
        engine = self.engine
        now, window = engine.real_now, engine.window
        answers = [
            Answer(
                task.task_id,
                task.client,
                task.version,
                place.digest,
                place.size,
                stored,
                body.examples,
                body.local_steps,
                body.normaliser,
                now - task.dispatched,
                own_metrics(body.metrics),
            )
            for (task, body, _, place), stored in zip(items, self._stored(items), strict=True)
        ]
        lines = [(window, "arrived", now, line_of(item.task, seconds=a.seconds))
                 for item, a in zip(items, answers, strict=True)]  # fmt: skip
        entries = self.ledger.note(connection, lines)
        rows = [
            {**row_of(answer, item.body, item.request), "seq": entry.seq, "verdict": pb.ACCEPTED}
            for answer, item, entry in zip(answers, items, entries, strict=True)
        ]
        self.ledger.submit(connection, rows)
        for _ in items:
            reached("before_accept")
        return [
            Taken(item.task, Decision(pb.ACCEPTED), entry, answer)
            for item, entry, answer in zip(items, entries, answers, strict=True)
        ]

    def _stored(self, items: Sequence[Handed]) -> list[str]:
        """Write inline updates into the window's segment; it is synced with the commit of their group."""
        contents = [item.place.content for item in items if item.place.content is not None]
        if not contents:
            return ["object"] * len(items)
        window = Window(self.ledger.run_id, self.engine.window, self.engine.attempt)
        segment = self.segments.of(window)
        offsets = iter(segment.append(contents))
        for _ in contents:
            reached("update_appended")
        self.ledger.database.writer.before_commit(segment)
        return [
            "object" if item.place.content is None else f"{window.window}/{window.attempt}/{next(offsets)}"
            for item in items
        ]


def closed(task: OpenTask, known: Standing | None) -> Decision | None:
    """What is answered where the task has a verdict already, or its round is over.

    Args:
        known: what the ledger says of the task.
    """
    if known is not None and known.verdict is not None:
        text = "the task was answered before"
        return Decision(pb.DUPLICATE, known.reason or "", text, first=known.verdict)
    if task.status == CLOSED or known is None or known.state != "open":
        return Decision(pb.LATE, "late", "the round closed without this answer")
    return None


def line_of(task: OpenTask, **more: object) -> dict[str, object]:
    """What the journal says of an event of a task."""
    return {"client": task.client, "version": task.version, "task": task.task_id.hex(), **more}

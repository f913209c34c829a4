"""The Engine of a coordinator: tasks go onto the board, answers come from the ledger, time is real.

What the federation decides and what happens to it is journalled before anything follows from it. A
coordinator that starts again gives the federation the same decisions and the same events, in the same
order and at the same times of the run's clock, up to where the journal ends; from there it goes on live.
So the run's clock shows the time of the last event, and stands still while the coordinator is down.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sqlalchemy import Connection

from fedsim.bundle import BundleError
from fedsim.engine import Arrived, Drained, Event, Failed, Weigh
from fedsim.flat import ParamSpec
from fedsim.journal import Entry, Playback, drawn, event_of
from fedsim.server import memory
from fedsim.server.answers import Answer, block_of
from fedsim.server.board import ANSWERED, CLOSED, OPEN, Board, OpenTask
from fedsim.server.failpoints import reached
from fedsim.server.inbox import Inbox
from fedsim.server.logs import fields
from fedsim.server.planning import Planner
from fedsim.server.run_ledger import RunLedger
from fedsim.server.summing import block_of_all
from fedsim.types import Ids, Task, UpdateBlock

log = logging.getLogger(__name__)

TaskKey = tuple[int, int]  # client, version that it started from


@dataclass(slots=True, eq=False)
class Counts:
    """What of each client's answers was folded into committed versions.

    Args:
        folded: [N] int64, how many.
        last: client -> task id of the last.
    """

    folded: Ids
    last: dict[int, bytes] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Past:
    """What a run is taken up from.

    Args:
        playback: what was journalled after the checkpoint.
        answers: accepted, by task; over: tasks that failed or were refused.
        clock: seconds of the run's clock at the checkpoint.
        decision_seq, event_seq: last entries of the journal that the checkpoint knows of.
    """

    playback: Playback = field(default_factory=Playback)
    answers: dict[bytes, Answer] = field(default_factory=dict)
    over: set[bytes] = field(default_factory=set)
    clock: float = 0.0
    decision_seq: int = 0
    event_seq: int = 0


class RemoteEngine:
    """Real clients behind the Engine protocol; used by the run's thread, where nothing else is said.

    Args:
        ledger, board: where things are written and offered.
        planner: makes tasks of a dispatch.
        spec: layout of the model; device: where answers are folded.
        counts: of what was folded.
        past: what the run is taken up from.
        together: arrivals that wait may come as one event: only where a window closes with the last answer,
            so that it does not matter how they were grouped.
    """

    def __init__(
        self,
        *,
        ledger: RunLedger,
        board: Board,
        planner: Planner,
        spec: ParamSpec,
        device: torch.device,
        counts: Counts,
        past: Past,
        together: bool = False,
    ) -> None:
        self.ledger, self.board, self.planner = ledger, board, planner
        self.spec, self.device = spec, device
        self.counts = counts
        self.past = past
        self.together = together
        self.playback = past.playback
        self.now = past.clock
        self.decision_seq, self.event_seq = past.decision_seq, past.event_seq
        self.window = self.attempt = 0
        self.closed_at = 0.0  # when the window's answers were first asked for, of time.perf_counter
        self.tasks: dict[TaskKey, OpenTask] = {}
        self.answers: dict[TaskKey, Answer] = {}
        self.folded: list[bytes] = []  # tasks whose answers no checkpoint contains yet
        self.cancelled: list[bytes] = []  # tasks of rounds that are over, likewise
        # Set by the run's thread, but for `settle`; read within the writer's order.
        self.accepting = not any(e.kind == "settle" for e in self.playback.decisions)
        self.on_caught_up: Callable[[], None] = lambda: None  # what was decided before is decided again
        self._settled: set[bytes] = set()  # tasks whose answers went into the open window's version
        self._announced: dict[TaskKey, None] = {}  # told to the federation, in that order
        self._unsaved: list[tuple[int, str, float, Mapping[str, Any]]] = []
        known = (e.now for e in (*self.playback.decisions, *self.playback.events))
        self.inbox = Inbox(ledger, max((past.clock, *known)))

    # ------------------------------------------------------------ called from any thread

    @property
    def real_now(self) -> float:
        """Seconds of the run's clock at this moment."""
        return self.inbox.now

    def deliver(self, entries: Sequence[Entry]) -> None:
        """Events that were just committed; called in the writer's thread, in order."""
        self.inbox.put(entries)

    def stop(self, reason: BaseException) -> None:
        """The run's thread raises `reason` at its next event."""
        self.inbox.stop(reason)

    # ------------------------------------------------------------ decisions

    def open_window(self, index: int, attempt: int) -> None:
        """A window opens; until its first event its time is the run's clock now."""
        self.window, self.attempt, self.closed_at = index, attempt, 0.0
        entry = self._decided("window")
        self.now = max(self.now, self.real_now if entry is None else entry.now)
        if entry is None:
            self._unsaved.append((index, "window", self.now, {"attempt": attempt}))

    def draw(self, sample: Callable[[], Ids]) -> Ids:
        """The clients that were drawn here when this was decided, or a new draw."""
        entry = self._decided("draw")
        if entry is not None:
            return drawn(entry)
        ids = sample()
        self._unsaved.append((self.window, "draw", self.now, {"ids": ids.tolist()}))
        return ids

    def submit(self, task: Task) -> None:
        entry = self._decided("dispatch")
        names = [] if entry is None else [bytes.fromhex(name) for name in entry.payload["tasks"]]
        planned = self.planner.tasks(task, names, last=self.counts.last, now=self.now)
        if entry is None:
            payload = {
                "version": task.version,
                "clients": task.ids.tolist(),
                "tasks": [one.task_id.hex() for one in planned],
            }
            lines = [*self._unsaved, (self.window, "dispatch", self.now, payload)]
            self._unsaved = []

            def plan(connection: Connection) -> list[Entry]:
                self.ledger.plan(connection, self.window, self.attempt, planned)
                return self.ledger.note(connection, lines)

            reached("before_plan")
            self.decision_seq = self.ledger.database.writer.run(plan)[-1].seq
            reached("after_plan")
        self.planner.named()
        self.adopt(planned)

    def adopt(self, planned: Sequence[OpenTask]) -> None:
        """Offer these tasks, but for those that have a verdict from before a restart."""
        for task in planned:
            key = task.client, task.version
            self.tasks[key] = task
            if task.task_id in self.past.answers:
                self.answers[key] = self.past.answers.pop(task.task_id)
                task.status = ANSWERED
            elif task.task_id in self.past.over:
                task.status = CLOSED
        self.board.put(planned)

    def set_timer(self, name: str, at: float) -> None:
        self.inbox.timers[name] = at

    def settle(self) -> list[Event]:
        entry = self._decided("settle")
        if entry is None:
            self._catch_up()

            def close(connection: Connection) -> list[Entry]:
                self.accepting = False
                return self.ledger.note(connection, [(self.window, "settle", self.now, {})])

            self._flush()
            entry = self.ledger.database.writer.run(close)[0]
            self.decision_seq = entry.seq
            reached("after_settle")
        before = [*self.playback.before(entry.seq), *self.inbox.emptied()]
        return [event for entry in before if (event := self._taken(entry)) is not None]

    # ------------------------------------------------------------ events

    def next_event(self) -> Event:
        self._flush()
        while True:
            entry = self.playback.event()
            if entry is None:
                self._catch_up()
                self.accepting = True
                entry = self.inbox.next(self.window, self._nothing_out)
            if entry is None:
                return Drained()
            event = self._taken(entry)
            if isinstance(event, Arrived) and self.together:
                return self._joined(event)
            if event is not None:
                return event

    def _joined(self, first: Arrived) -> Arrived:
        """The arrivals that are there already, as one event."""
        ids, versions = [first.ids], [first.base_version]
        while True:
            source = self.playback.events or self.inbox.waiting()
            if not source or source[0].kind != "arrived":
                break
            event = self._taken(source.popleft())
            if isinstance(event, Arrived):
                ids.append(event.ids)
                versions.append(event.base_version)
        return Arrived(np.concatenate(ids), np.concatenate(versions))

    def _catch_up(self) -> None:
        """From here on things happen for the first time."""
        caught_up, self.on_caught_up = self.on_caught_up, lambda: None
        caught_up()

    def _nothing_out(self) -> bool:
        return not any(task.status == OPEN for task in self.tasks.values())

    def _taken(self, entry: Entry) -> Event | None:
        """The event of an entry; None where it is about a task that is no longer the client's."""
        self.now = max(self.now, entry.now)
        self.event_seq = entry.seq
        payload = entry.payload
        if entry.kind == "timer":
            self.inbox.timers.pop(payload["name"], None)
            return event_of(entry)
        key = payload["client"], payload["version"]
        task = self.tasks.get(key)
        if task is None or task.task_id.hex() != payload["task"]:
            return None
        if entry.kind == "arrived":
            self._announced[key] = None
        elif key not in self._announced:
            self.board.forget([self.tasks.pop(key)])
        return event_of(entry)

    # ------------------------------------------------------------ answers

    def collect(
        self, ids: Ids, base_version: Ids, weigh: Weigh | None = None
    ) -> Iterator[UpdateBlock | Failed]:
        first, self.closed_at = not self.closed_at, self.closed_at or time.perf_counter()
        self._trim()
        pairs = list(zip(ids.tolist(), base_version.tolist(), strict=True))
        # A sum that comes on top of another one would not have the bits of its parts, added one by one.
        if weigh is not None and first and self.device.type == "cpu":
            together = block_of_all(
                [self.answers[pair] for pair in pairs],
                self.spec,
                weigh,
                state_version=self.counts.folded[ids],
                run_id=self.ledger.run_id,
                segments=self.planner.segments,
            )
            if together is not None:
                yield together
                reached("one_folded")
                return
        for client, version in pairs:
            answer = self.answers[client, version]
            try:
                yield block_of(
                    answer,
                    self.spec,
                    state_version=int(self.counts.folded[client]),
                    device=self.device,
                    run_id=self.ledger.run_id,
                    objects=self.planner.objects,
                    segments=self.planner.segments,
                )
            except (BundleError, OSError) as error:
                about = fields(run=self.ledger.run_id, task=answer.task_id)
                log.error("client=%d an accepted update cannot be read: %s", client, error, extra=about)
                yield Failed(np.array([client]), "its update was lost on the disk", np.array([version]))
            reached("one_folded")

    def commit(self, ids: Ids, base_version: Ids) -> None:
        for client, version in zip(ids.tolist(), base_version.tolist(), strict=True):
            task_id = self.answers[client, version].task_id
            self.counts.folded[client] += 1
            self.counts.last[client] = task_id
            self.folded.append(task_id)
            self._settled.add(task_id)

    def _trim(self) -> None:
        """Give back what transfers of large answers took."""
        if any(answer.place == "object" for answer in self.answers.values()):
            memory.trim()

    def done(self) -> None:
        """The window is over: what was announced in it is forgotten."""
        over = [self.tasks.pop(key) for key in self._announced if key in self.tasks]
        # Refused when they were weighed: no later window looks at them.
        self.cancelled += [task.task_id for task in over if task.task_id not in self._settled]
        self._settled.clear()
        for key in self._announced:
            self.answers.pop(key, None)
        self._announced.clear()
        self.board.forget(over)

    def cancel(self) -> None:
        self.inbox.timers.clear()
        self.cancelled += [task.task_id for task in self.tasks.values()]
        self.board.forget(list(self.tasks.values()))
        self.tasks.clear()
        self.answers.clear()
        self._announced.clear()

    def close(self) -> None:
        self.cancel()

    # ------------------------------------------------------------ the journal

    def _decided(self, kind: str) -> Entry | None:
        entry = self.playback.decision(kind)
        if entry is not None:
            self.decision_seq = entry.seq
        return entry

    def _flush(self) -> None:
        """Decisions that no dispatch followed are written before anything is waited for."""
        if self._unsaved:
            lines, self._unsaved = self._unsaved, []
            written = self.ledger.database.writer.run(lambda connection: self.ledger.note(connection, lines))
            self.decision_seq = written[-1].seq

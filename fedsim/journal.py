"""The journal of a run on a coordinator: what was decided and what happened, enough to go through it again.

    decisions   window, draw, dispatch, settle      made by the federation, in the order of its program
    events      arrived, failed, refused, timer     what came from clients and from the clock

The payload of an event about a client names the client, the version that it started from and the task.

Each kind has its own order: while the federation decides, events go on arriving. A coordinator that
starts again plays its journal back from the last checkpoint; the simulator plays back a whole run.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from fedsim.engine import Arrived, Event, Failed, Refused, Timer
from fedsim.types import Ids

DECISIONS = frozenset({"window", "draw", "dispatch", "settle"})


class Entry(NamedTuple):
    """One line of a journal.

    Args:
        seq: number in the run, growing.
        window: index of the window that was open.
        kind: see above.
        now: seconds of the run's clock.
        payload: what belongs to the kind.
    """

    seq: int
    window: int
    kind: str
    now: float
    payload: dict[str, Any]

    @property
    def line(self) -> str:
        """As a line of ``journal.jsonl``."""
        return json.dumps(self._asdict(), separators=(",", ":"))


def entry_of(line: str) -> Entry:
    """The entry of a line.

    Raises:
        ValueError, KeyError: it is none.
    """
    values = json.loads(line)
    return Entry(values["seq"], values["window"], values["kind"], values["now"], values["payload"])


def event_of(entry: Entry) -> Event:
    """The event that was written down."""
    payload = entry.payload
    if entry.kind == "timer":
        return Timer(payload["name"])
    ids, versions = np.array([payload["client"]], np.int64), np.array([payload["version"]], np.int64)
    if entry.kind == "arrived":
        return Arrived(ids, versions)
    kind = Failed if entry.kind == "failed" else Refused
    return kind(ids, payload["reason"], versions)


class Playback:
    """A journal that is gone through again; empty once everything in it has happened.

    Args:
        entries: in the order of their numbers.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.decisions: deque[Entry] = deque()
        self.events: deque[Entry] = deque()
        for entry in entries:
            (self.decisions if entry.kind in DECISIONS else self.events).append(entry)

    def decision(self, kind: str) -> Entry | None:
        """The next decision, which must be of this kind; None where none is left.

        Raises:
            ValueError: the program decides otherwise than when the journal was written.
        """
        if not self.decisions:
            return None
        entry = self.decisions.popleft()
        if entry.kind != kind:
            raise ValueError(f"journal entry {entry.seq} is a {entry.kind}, the run came to a {kind}")
        return entry

    def event(self) -> Entry | None:
        """The next event; None where none is left."""
        return self.events.popleft() if self.events else None

    def before(self, seq: int) -> list[Entry]:
        """The events up to entry `seq`, taken out."""
        found: list[Entry] = []
        while self.events and self.events[0].seq < seq:
            found.append(self.events.popleft())
        return found


def drawn(entry: Entry) -> Ids:
    """[b] the clients of a draw."""
    return np.array(entry.payload["ids"], np.int64)

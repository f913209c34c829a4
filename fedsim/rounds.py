"""The round as a pure state machine: who has answered, who is late, what may be folded.

    PLANNED ──dispatch──▶ COLLECTING ──close──▶ CLOSED ──fold, apply──▶ COMMITTED
                             ▲  │ Arrived / Failed / Refused
                             └──┘               └──quorum missed──▶ FAILED ──▶ retry, skip or stop

No input, no output, no clock, no threads: events go in, a new state and a verdict per answer come
out. Duplicate, late and foreign answers leave the table as it is and are counted. A *window* is the
general case (asynchronous schedulers close one without a cohort); a synchronous round is a window
whose tasks are all cancelled when it closes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from fedsim.engine import Arrived, Event, Failed, Left, Refused
from fedsim.ids import among, ascending, distinct
from fedsim.types import Ids


class Status(IntEnum):
    """Of one task in the window's table."""

    IN_FLIGHT = 0
    RECEIVED = 1
    REFUSED = 2
    LOST = 3


class Verdict(IntEnum):
    """On one answer."""

    ACCEPTED = 0
    DUPLICATE = 1
    LATE = 2
    FOREIGN = 3


def _no_ids() -> Ids:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class WindowState:
    """One window's table. Arrays are never changed, only replaced.

    Args:
        index: of the window, from 0.
        attempt: how many times this window was retried.
        ids, base_version, status: [t] the tasks dispatched, in cohort order.
        arrival: [t] position in the order of arrival, -1 before.
        closed: no further answer is taken.
        duplicates, late, foreign: answers that were not taken.
        reasons: why clients were refused or lost, (client, reason).
    """

    index: int
    attempt: int = 0
    ids: Ids = field(default_factory=_no_ids)
    base_version: Ids = field(default_factory=_no_ids)
    status: npt.NDArray[np.int8] = field(default_factory=lambda: np.empty(0, np.int8))
    arrival: Ids = field(default_factory=_no_ids)
    closed: bool = False
    duplicates: int = 0
    late: int = 0
    foreign: int = 0
    reasons: tuple[tuple[int, str], ...] = ()

    def count(self, status: Status) -> int:
        return int((self.status == status).sum())

    def rows(self, status: Status) -> Ids:
        """Rows of the tasks with that status, in the order of dispatch."""
        return np.flatnonzero(self.status == status).astype(np.int64)

    def having(self, status: Status) -> Ids:
        """Ids with that status, in the order of dispatch."""
        chosen: Ids = self.ids[self.status == status]
        return chosen

    @property
    def received_in_order(self) -> Ids:
        """Rows of the received answers in the order of arrival."""
        rows = self.rows(Status.RECEIVED)
        return rows[np.argsort(self.arrival[rows], kind="stable")]


def begin(index: int, *, attempt: int = 0) -> WindowState:
    """An empty window."""
    return WindowState(index, attempt)


def dispatched(state: WindowState, ids: Ids, version: int) -> WindowState:
    """Add tasks for `ids` that start from `version`.

    Raises:
        ValueError: a client would have two tasks in flight.
    """
    flying = state.ids[state.status == Status.IN_FLIGHT]
    if len(distinct(ids)) != len(ids) or (len(flying) and among(ids, flying).any()):
        raise ValueError("a client has at most one task in flight")
    new = len(ids)
    return replace(
        state,
        ids=np.concatenate([state.ids, ids]),
        base_version=np.concatenate([state.base_version, np.full(new, version, np.int64)]),
        status=np.concatenate([state.status, np.full(new, Status.IN_FLIGHT, np.int8)]),
        arrival=np.concatenate([state.arrival, np.full(new, -1, np.int64)]),
    )


def _latest_rows(state: WindowState, ids: Ids, base_version: Ids | None = None) -> Ids:
    """Row of the latest task of each id (of that version, where one is given), -1 for those without one."""
    keys, wanted = state.ids, ids
    if base_version is not None:
        span = int(state.base_version.max(initial=0)) + 1
        keys = state.ids * span + state.base_version
        # A version that no task has matches nothing, whatever number a client may claim.
        wanted = np.where((base_version >= 0) & (base_version < span), ids * span + base_version, -1)
    if len(wanted) == len(keys) and np.array_equal(wanted, keys):
        return np.arange(len(wanted), dtype=np.int64)
    if len(wanted) == 1:
        same = np.flatnonzero(keys == wanted[0])
        return same[-1:].astype(np.int64) if len(same) else np.full(1, -1, np.int64)
    order = np.argsort(keys, kind="stable")
    at = np.searchsorted(keys[order], wanted, side="right") - 1
    found = (at >= 0) & (keys[order][np.maximum(at, 0)] == wanted) if len(order) else at >= 0
    return np.where(found, order[np.maximum(at, 0)] if len(order) else -1, -1).astype(np.int64)


def on_event(state: WindowState, event: Event) -> tuple[WindowState, npt.NDArray[np.int8]]:
    """The state after `event`, and for an arrival the verdict on each answer ([b] of Verdict)."""
    none = np.empty(0, np.int8)
    if isinstance(event, Arrived):
        return _arrived(state, event)
    if isinstance(event, Failed | Refused | Left):
        taken = (Status.IN_FLIGHT, Status.RECEIVED) if isinstance(event, Refused) else (Status.IN_FLIGHT,)
        versions = None if isinstance(event, Left) else event.base_version
        rows = _latest_rows(state, event.ids, versions)
        rows = rows[rows >= 0]
        rows = distinct(rows[among(state.status[rows].astype(np.int64), np.array(taken))])
        if not len(rows):
            return state, none
        status = state.status.copy()
        status[rows] = Status.REFUSED if isinstance(event, Refused) else Status.LOST
        reason = "left" if isinstance(event, Left) else event.reason
        named = tuple((int(i), reason) for i in state.ids[rows])
        return replace(state, status=status, reasons=state.reasons + named), none
    return state, none


def _arrived(state: WindowState, event: Arrived) -> tuple[WindowState, npt.NDArray[np.int8]]:
    rows = _latest_rows(state, event.ids, event.base_version)
    # Who has that very task is known; only of the others it must be asked whether they have any.
    known = rows >= 0
    if not known.all() and len(state.ids):
        known |= among(event.ids, state.ids)
    safe = np.maximum(rows, 0)
    verdict = np.full(len(rows), Verdict.FOREIGN, np.int8)
    if known.any():
        same = rows >= 0
        status = state.status[safe]
        verdict[known & ~same] = Verdict.LATE
        verdict[same & (status == Status.LOST)] = Verdict.LATE
        answered = same & ((status == Status.RECEIVED) | (status == Status.REFUSED))
        verdict[answered] = Verdict.DUPLICATE
        flying = same & (status == Status.IN_FLIGHT)
        verdict[flying] = Verdict.LATE if state.closed else Verdict.ACCEPTED
        # The same answer twice in one event is one answer.
        if not ascending(rows):
            first = np.zeros(len(rows), bool)
            first[np.unique(rows, return_index=True)[1]] = True
            verdict[(verdict == Verdict.ACCEPTED) & ~first] = Verdict.DUPLICATE
    accepted = rows[verdict == Verdict.ACCEPTED]
    new_status, arrival = state.status.copy(), state.arrival.copy()
    new_status[accepted] = Status.RECEIVED
    start = int(arrival.max(initial=-1)) + 1
    arrival[accepted] = start + np.arange(len(accepted))
    counts = np.bincount(verdict, minlength=len(Verdict))
    return (
        replace(
            state,
            status=new_status,
            arrival=arrival,
            duplicates=state.duplicates + int(counts[Verdict.DUPLICATE]),
            late=state.late + int(counts[Verdict.LATE]),
            foreign=state.foreign + int(counts[Verdict.FOREIGN]),
        ),
        verdict,
    )


def given_up(state: WindowState, event: Failed) -> WindowState:
    """The state after answers that had been announced turned out not to exist."""
    rows = _latest_rows(state, event.ids, event.base_version)
    status = state.status.copy()
    status[rows[rows >= 0]] = Status.LOST
    named = tuple((int(i), event.reason) for i in event.ids)
    return replace(state, status=status, reasons=state.reasons + named)


def closed(state: WindowState) -> WindowState:
    """The window takes no further answer."""
    return replace(state, closed=True)


def carried_over(state: WindowState, *, index: int, attempt: int = 0) -> WindowState:
    """The next window of an asynchronous run: tasks still in flight go on in it."""
    flying = state.status == Status.IN_FLIGHT
    return WindowState(
        index,
        attempt,
        state.ids[flying],
        state.base_version[flying],
        state.status[flying],
        state.arrival[flying],
    )

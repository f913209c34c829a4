"""The loop: open a window, follow its events, fold what counts, apply, commit.

The same lines serve simulation and deployment; only the engine differs. Nothing here knows a model,
a data set or a network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim import rounds
from fedsim.buffers import BufferFold, Buffers
from fedsim.engine import Arrived, Drained, Engine, Event, Failed, Left, Opened, Refused, Timer
from fedsim.folding import Folding, Moment
from fedsim.ids import among, distinct
from fedsim.local import LocalSpec
from fedsim.membership import Membership, everybody
from fedsim.outbox import Outbox
from fedsim.outcome import Outcome, failure_of
from fedsim.reduce import Pieces, Rows, Sums
from fedsim.rounds import Status, WindowState
from fedsim.rows import RowStore
from fedsim.schedulers import CloseWindow, Dispatch, Scheduler, SetTimer, View
from fedsim.strategy import Strategy
from fedsim.transform import Observer, UpdateTransform
from fedsim.types import Ids, Message, Task, WindowInfo

Sample = Callable[[int, int, int, Ids], Ids]  # (round, draw, count, busy) -> ids, ascending


class RunState(NamedTuple):
    """All of a run's server side that a checkpoint saves, a pytree (Any: the strategy's own state).

    Args:
        round_index: windows completed.
        version: updates of the model so far.
        clock: seconds of the run's clock.
        failures: consecutive failed attempts.
        strategy: its state.
        buffers: the model's buffers.
        transform: server-side state of the transforms.
    """

    round_index: int
    version: int
    clock: float
    failures: int
    strategy: Any
    buffers: Buffers
    transform: Any


class Federation:
    """A strategy, a scheduler and an engine, run window by window.

    Args:
        strategy, engine, scheduler: the three parts.
        sample: who may be asked: (round, draw, count, busy) -> at most `count` ids, none of them busy;
            `draw` counts the attempts of a round, and the draws of an asynchronous window.
        spec: local training as configured.
        state: to start or to continue from.
        rows: what the server holds for each client, for strategies that `lend`.
        population: N, the clients that are registered at any time of the run.
        membership: when they join and leave, None where all stay from beginning to end.
        transform: on the way of an update, None for none.
        observers: called with everything that a curious server sees.
        seed: of the run, for transforms.
        personal_size: values of each model-sized vector that stay on the client; they are not sent and
            not counted.
    """

    def __init__(
        self,
        strategy: Strategy,
        engine: Engine,
        scheduler: Scheduler,
        *,
        sample: Sample,
        spec: LocalSpec,
        state: RunState,
        rows: RowStore,
        population: int,
        membership: Membership | None = None,
        transform: UpdateTransform | None = None,
        observers: Sequence[Observer] = (),
        seed: int = 0,
        personal_size: int = 0,
    ) -> None:
        self.strategy = strategy
        self.engine = engine
        self.scheduler = scheduler
        self.sample = sample
        self.spec = spec
        self.state = state
        self.rows = rows
        self.population = population
        self.membership = membership or everybody(population=population)
        self.transform = transform
        self.observers = tuple(observers)
        self.seed = seed
        self._bytes_down = 0
        self._opened_at = engine.now
        self._draws = 0
        self._table = rounds.begin(state.round_index)  # of the last window; what flies is carried over
        self.outbox = Outbox(strategy, rows, transform=transform, personal_size=personal_size)

    @property
    def model(self) -> Tensor:
        """x [D], what is evaluated."""
        return self.strategy.model(self.state.strategy)

    @property
    def asynchronous(self) -> bool:
        """Whether tasks go on when a window closes."""
        return self.scheduler.mode == "async"

    @property
    def in_flight(self) -> tuple[Ids, Ids]:
        """[t] clients and base versions of the tasks that go on after the last window."""
        rows = self._table.rows(Status.IN_FLIGHT)[slice(None) if self.asynchronous else slice(0)]
        return self._table.ids[rows], self._table.base_version[rows]

    def restore(self, state: RunState, ids: Ids, base_version: Ids, messages: Mapping[int, Message]) -> None:
        """Continue after the window that `state` was saved at, with these tasks in flight.

        Args:
            ids, base_version: [t]; messages: by version.
        """
        self.state = state
        self.outbox.restore(state.version, state.strategy, messages)
        self._table = rounds.begin(state.round_index)
        for version in np.unique(base_version).tolist():
            self._table = rounds.dispatched(self._table, ids[base_version == version], version)

    def run_window(self) -> Outcome:
        """One window to its commit or its failure; `state` moves on only with the commit."""
        index, attempt = self.state.round_index, self.state.failures
        if self.asynchronous:
            window = rounds.carried_over(self._table, index=index, attempt=attempt)
        else:
            window = rounds.begin(index, attempt=attempt)
        folding = self._nothing_folded()
        self._bytes_down = self._draws = 0
        self._opened_at = self.engine.now
        event: Any = Opened()
        pending: list[Any] = []
        while True:
            close = False
            for command in self.scheduler.on_event(self._view(window), event):
                if isinstance(command, Dispatch):
                    window = self._dispatch(window, command.ids)
                elif isinstance(command, SetTimer):
                    self.engine.set_timer(command.name, command.at)
                elif isinstance(command, CloseWindow):
                    close = True
            if close:
                if not self.asynchronous and window.count(Status.IN_FLIGHT):
                    for late in self.engine.settle():
                        window, _ = rounds.on_event(window, late)
                window, troubles = self._fold_received(window, folding)
                # While others work, or could, they make up for the refused and failed.
                reopen = bool(troubles) and not self._satisfied(window)
                reopen &= not isinstance(event, Timer | Drained)
                if not reopen or not (window.count(Status.IN_FLIGHT) or self.asynchronous):
                    return self._conclude(window, folding)
                pending.extend(troubles)
            event = pending.pop(0) if pending else self._unless_gone(self.engine.next_event())
            window, _ = rounds.on_event(window, event)

    def _unless_gone(self, event: Event) -> Event:
        """An answer of a client that has left in the meantime is its leaving."""
        if not self.asynchronous or not isinstance(event, Arrived):
            return event
        gone = self.membership.left(event.ids) <= self.state.round_index
        # Asynchronous engines announce answers one by one; rounds end before anyone leaves.
        return Left(event.ids) if gone.all() and len(event.ids) else event

    def _nothing_folded(self) -> Folding:
        reduced: Sums | Pieces | Rows = Rows() if self.strategy.fold == "gather" else Sums()
        changed = self.transform is not None and self.transform.after_reduce is not None
        if self.strategy.traits.columnwise and not changed:
            reduced = Pieces(self.strategy)
        return Folding(
            self.strategy,
            self.rows,
            self.transform,
            self.observers,
            self.membership.joined,
            lambda message: self.outbox.weigh(message, self.state.strategy),
            self.asynchronous,
            reduced,
            BufferFold(self.state.buffers),
        )

    def _view(self, window: WindowState) -> View:
        registered, busy = self._registered, self._busy(window)
        gone = int((self.membership.left(busy) <= window.index).sum()) if len(busy) else 0
        return View(
            window.index,
            self.state.version,
            window.attempt,
            self.engine.now,
            registered,
            window.count(Status.IN_FLIGHT),
            window.count(Status.RECEIVED),
            registered - (len(busy) - gone),
            lambda count: self._draw(window, count, busy),
        )

    @property
    def _registered(self) -> int:
        """N of the open window."""
        return self.membership.size(self.state.round_index)

    def _busy(self, window: WindowState) -> Ids:
        """Who cannot get a task: those at work, and those who already worked from this version.

        A client with a state waits for the commit of its answer, whatever version that began from.
        """
        if not self.asynchronous or not len(window.ids):
            return np.empty(0, np.int64)
        waits = window.status == Status.IN_FLIGHT
        waits |= window.base_version == self.state.version
        stateful = self.strategy.traits.client_state != "none" or self.outbox.personal_size > 0
        if stateful or self.transform is not None:
            waits |= window.status == Status.RECEIVED
        return distinct(window.ids[waits])

    def _draw(self, window: WindowState, count: int, busy: Ids) -> Ids:
        if count <= 0:
            return np.empty(0, np.int64)
        draw = window.attempt + self._draws
        self._draws += 1
        ids = self.sample(window.index, draw, count, busy)
        # A list or a Poisson draw may name more; a round asks them all, a scheduler has so many places.
        return ids[:count] if self.asynchronous else ids

    def _satisfied(self, window: WindowState) -> bool:
        return window.count(Status.RECEIVED) >= max(1, self.scheduler.quorum)

    def _dispatch(self, window: WindowState, ids: Ids) -> WindowState:
        if not len(ids):
            return window
        state, outbox = self.state, self.outbox
        spec, steps = self.strategy.plan(
            state.strategy, self.spec.at_round(state.round_index), window.index, ids
        )
        message, lend = outbox.broadcast(state.version, state.strategy), outbox.lending(state.strategy)
        lent = pytree.tree_map(lambda rows: rows[0], lend(ids[:1]))
        down = outbox.bytes + state.buffers.bytes + outbox.weigh(lent, state.strategy)
        self._bytes_down += down * len(ids)
        self.engine.submit(
            Task(ids, state.version, window.index, window.attempt, message, lend, state.buffers, spec, steps)
        )
        return rounds.dispatched(window, ids, state.version)

    def _fold_received(
        self, window: WindowState, folding: Folding
    ) -> tuple[WindowState, list[Refused | Failed]]:
        """Fold what was received and not yet folded; returns who was refused and who failed."""
        received = window.received_in_order if self.asynchronous else window.rows(Status.RECEIVED)
        if len(folding.done):
            received = received[~among(received, folding.done)]
        troubles: list[Refused | Failed] = []
        if not len(received):
            return window, troubles
        folding.done = np.concatenate([folding.done, received])
        state = self.state
        moment = Moment(
            window.index,
            state.version,
            state.strategy,
            state.buffers,
            self._opened_at,
            self.engine.now,
            self.outbox.messages,
        )
        weigh = partial(folding.weigh, at=moment) if folding.sums_are_enough else None
        for answer in self.engine.collect(window.ids[received], window.base_version[received], weigh):
            if isinstance(answer, Failed):
                window = rounds.given_up(window, answer)
                for client in answer.ids.tolist():
                    folding.clients.add_missing(client, "lost", answer.reason)
                troubles.append(answer)
                continue
            for event in folding.add(answer, moment):
                troubles.append(event)
                window, _ = rounds.on_event(window, event)
        return window, troubles

    def _conclude(self, window: WindowState, folding: Folding) -> Outcome:
        """Apply and commit, or fail."""
        in_flight = window.count(Status.IN_FLIGHT)
        window = rounds.closed(window)
        received = window.count(Status.RECEIVED)
        refused = window.count(Status.REFUSED)
        lost = window.count(Status.LOST)
        late = window.late + (0 if self.asynchronous else in_flight)
        error = failure_of(window, quorum=self.scheduler.quorum)
        metrics: dict[str, float] = {}
        if error is None:
            metrics = self._commit(window, folding, refused, late, lost)
            outcome = "partial" if received else "empty"
            if received and (self.asynchronous or received == len(window.ids)):
                outcome = "ok"
        else:
            outcome = "failed"
            self.rows.discard()
            self.state = self.state._replace(failures=self.state.failures + 1)
        self._table = window
        if not self.asynchronous:
            self.engine.cancel()
        in_flight_rows = window.rows(Status.IN_FLIGHT)
        self.outbox.keep(window.base_version[in_flight_rows if self.asynchronous else slice(0)])
        self.state = self.state._replace(clock=self.engine.now)
        logged = Counter(folding.clients.troubles)
        for trouble in window.reasons:  # also of a client that answered and then lost its next task
            if logged[trouble]:
                logged[trouble] -= 1
            else:
                folding.clients.add_missing(trouble[0], _verdict_on(window, trouble[0]), trouble[1])
        record = {
            "round": window.index + 1,
            "version": self.state.version,
            "outcome": outcome,
            "cohort": len(window.ids),
            "received": received,
            "refused": refused,
            "late": late,
            "lost": lost,
            **folding.measured,
            **metrics,
            "bytes_down": self._bytes_down,
            "bytes_up": folding.bytes_up,
            "clock_seconds": self.engine.now,
        }
        return Outcome(record, folding.clients, window.reasons, error)

    def _commit(
        self, window: WindowState, folding: Folding, refused: int, late: int, lost: int
    ) -> dict[str, float]:
        meta = folding.meta
        ids = np.empty(0, np.int64) if meta is None else meta.ids
        state = self.state
        info = WindowInfo(
            window.index,
            state.version,
            ids,
            self._registered,
            ids if meta is None else meta.joined,
            self._opened_at,
            self.engine.now,
            refused,
            late,
            lost,
            meta,
        )
        transformed = state.transform
        if isinstance(folding.reduced, Pieces):
            new, metrics = folding.reduced.apply(state.strategy, info)
        else:
            reduced: Any = folding.reduced.result()
            if self.transform is not None and self.transform.after_reduce is not None:
                transformed, reduced = self.transform.after_reduce(transformed, reduced, info, self.seed)
            new, metrics = self.strategy.apply(state.strategy, reduced, info)
        self.engine.commit(ids, ids if meta is None else meta.base_version)
        self.rows.commit(ids)
        self.state = RunState(
            state.round_index + 1,
            state.version + 1,
            self.engine.now,
            0,
            new,
            folding.buffers.result(),
            transformed,
        )
        return {name: float(value) for name, value in metrics.items()}

    def skip_window(self) -> None:
        """After a failed window: let the round pass, the model stays."""
        self.state = self.state._replace(round_index=self.state.round_index + 1, failures=0)


def _verdict_on(window: WindowState, client: int) -> str:
    """Of a client whose answer never reached the folding."""
    status = window.status[window.ids == client]
    return "refused" if Status.REFUSED in status and Status.LOST not in status else "lost"

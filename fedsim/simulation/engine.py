"""The simulated fleet behind the Engine protocol: a virtual clock, and clients computed when folded.

A task is *delivered* at its virtual time and *computed* when its window closes, in blocks, so that a
device which is late, lost or cancelled costs nothing. Where windows are smaller than a block (the
asynchronous schedulers), a block is filled up with the tasks that come next: what a client answers is
decided when it gets its task, so it does not matter when it is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fedsim.engine import Arrived, Drained, Event, Failed, Weigh
from fedsim.local import LocalAlgorithm
from fedsim.rows import RowStore
from fedsim.simulation.clock import VirtualClock
from fedsim.simulation.crew import Alone, Bench, Crew, Order
from fedsim.simulation.devices import DeviceModel
from fedsim.simulation.ready import Ready, gathered
from fedsim.simulation.sent import Chosen, Ledger, Sent, TaskKey, joined
from fedsim.training.answer import from_rows
from fedsim.training.work import ClientFailed, Trained, Trainer, Work, Workplace, client_message
from fedsim.transform import UpdateTransform
from fedsim.types import Floats, Ids, Message, Task, UpdateBlock

log = logging.getLogger(__name__)


class SimulatedEngine:
    """Virtual clients on one machine.

    Args:
        place: what the clients share.
        trainer: how blocks of them are trained.
        algorithm: local spec -> the strategy's client half.
        devices: speeds, dropouts, stragglers.
        store: the clients' states.
        transform: applied on the client side of each update.
        one_by_one: each answer is an event of its own, as asynchronous schedulers want it; otherwise
            those of one moment come together.
        crew: who computes the blocks, None for this process; closed with the engine.
        norms: whether somebody asks for each update's norm.
    """

    def __init__(
        self,
        place: Workplace,
        trainer: Trainer,
        algorithm: Callable[[Any], LocalAlgorithm],
        *,
        devices: DeviceModel,
        store: RowStore,
        transform: UpdateTransform | None = None,
        one_by_one: bool = False,
        crew: Crew | None = None,
        norms: bool = True,
    ) -> None:
        self.place = place
        self.trainer = trainer
        self.algorithm = algorithm
        self.devices = devices
        self.store = store
        self.transform = transform
        self.one_by_one = one_by_one
        self.norms = norms
        self.crew: Crew = Alone() if crew is None else crew
        self.clock = VirtualClock()
        self.sent = Ledger()
        self.ready: dict[TaskKey, Ready] = {}

    @property
    def now(self) -> float:
        return self.clock.now

    def submit(self, task: Task) -> None:
        moment = task.round_index + task.attempt  # a retry comes later, and finds other devices
        steps = self.place.clients.steps(task, task.ids)
        steps = self.devices.limit(task.ids, steps, moment)
        seconds = self.devices.seconds(task.ids, steps, moment)
        sent = Sent(task, steps, seconds, self.devices.lost(task.ids, moment))
        self.sent.add(sent)
        if self.one_by_one:
            groups: list[Ids] = [np.array([row], np.int64) for row in range(len(task.ids))]
        else:
            groups = _equal(seconds)
        for rows in groups:
            after = float(seconds[rows[0]])
            for lost in (False, True):
                ids = task.ids[rows[sent.lost[rows] == lost]]
                if not len(ids):
                    continue
                versions = np.full(len(ids), task.version, np.int64)
                event = Failed(ids, "the device dropped out", versions) if lost else Arrived(ids, versions)
                self.clock.after(after, event)

    def state_of(self, ids: Ids, message: Message, algorithm: LocalAlgorithm) -> Any:
        """The algorithm's state of the one client in `ids`; fresh where it never took part."""
        state = algorithm.fresh(client_message(message, self.place.spec))
        if not self.store.has(ids)[0]:
            return state
        return from_rows(state, self.store.read(ids))

    def set_timer(self, name: str, at: float) -> None:
        self.clock.set_timer(name, at)

    def next_event(self) -> Event:
        event = self.clock.pop()
        if isinstance(event, Failed):
            self._forget(event.ids, event.base_version)
        elif isinstance(event, Arrived):
            self.sent.announce(event.ids, event.base_version)
        return event or Drained()

    def settle(self) -> list[Event]:
        return []  # nothing is acknowledged before it is announced

    def collect(
        self, ids: Ids, base_version: Ids, weigh: Weigh | None = None
    ) -> Iterator[UpdateBlock | Failed]:
        missing = self.sent.find(ids, base_version)
        if self.ready:
            keys = missing.keys
            found = [self.ready.pop(key) for key in keys if key in self.ready]
            if found:
                early = {(int(r.block.ids[r.row]), int(r.block.base_version[r.row])) for r in found}
                missing = missing.take(np.array([key not in early for key in keys]))
                block, kept = gathered(found)
                self.store.stage(block.ids, kept)
                yield block
        for alike in missing.alike:
            yield from self._compute(alike, self._next_of(alike), weigh)
        self._forget(ids, base_version)

    def commit(self, ids: Ids, base_version: Ids) -> None:
        self.store.commit(ids)
        for key in self.sent.end_announced():  # of clients that have left
            self.ready.pop(key, None)

    def cancel(self) -> None:
        self.clock.clear()
        self.sent.clear()
        self.ready.clear()
        self.store.discard()

    def close(self) -> None:
        self.cancel()
        self.crew.close()

    def _forget(self, ids: Ids, base_version: Ids | None) -> None:
        """These tasks are over."""
        assert base_version is not None
        self.sent.end(ids, base_version)
        if self.ready:
            for key in zip(ids.tolist(), base_version.tolist(), strict=True):
                self.ready.pop(key, None)

    def _next_of(self, alike: Chosen) -> Chosen:
        """The tasks under the same local training that fill up the last block or the crew, earliest first."""
        # Workers without a block would wait; of one client, blocks are the same whoever is computed beside.
        room = -len(alike) % (self.crew.width if self.trainer.block == 1 else self.trainer.block)
        if not self.one_by_one or not room:
            return alike.take(np.empty(0, np.int64))
        asked, spec = set(alike.keys), alike.sents[0].task.spec
        coming = [key for key in self.clock.coming() if key not in asked and key not in self.ready]
        found = alike.take(np.empty(0, np.int64))
        for start in range(0, len(coming), room):
            next_ones = np.array(coming[start : start + room], np.int64)
            ahead = self.sent.find(next_ones[:, 0], next_ones[:, 1])
            under = np.array([sent.task.spec == spec for sent in ahead.sents], bool)
            found = joined(found, ahead.take(under[ahead.which])) if len(ahead) else found
            if len(found) >= room:
                break
        return found.take(np.arange(min(room, len(found))))

    def _compute(self, asked: Chosen, early: Chosen, weigh: Weigh | None) -> Iterator[UpdateBlock | Failed]:
        """Train the tasks; those asked for are yielded, the others wait until they are."""
        assert weigh is None or not len(early), "what is asked for later is weighed later"
        both = joined(asked, early)
        plan = self.trainer.plan(both.steps)
        parts = [both.take(rows) for rows in plan]
        outcomes = self.crew.answers(
            Bench(self.place, self.trainer, self.transform, self.algorithm),
            both.sents[0].task.spec,
            [float(part.steps.sum()) for part in parts],
            lambda number: self._order(parts[number], weigh),
        )
        for rows, part, outcome in zip(plan, parts, outcomes, strict=True):
            if isinstance(outcome, ClientFailed):
                log.warning("client=%d failed: %s", outcome.client, outcome.reason, exc_info=outcome)
                yield Failed(part.ids[:1], outcome.reason, part.versions[:1])
                continue
            block, kept = self._block(part, outcome.trained, outcome.vectors), outcome.kept
            due = rows < len(asked)
            if due.all():
                self.store.stage(block.ids, kept)
                yield block
                continue
            keys = part.keys
            for row in np.flatnonzero(~due).tolist():
                self.ready[keys[row]] = Ready(block, row, kept)
            if due.any():
                index = torch.from_numpy(np.flatnonzero(due))
                mine = block.take(due)
                self.store.stage(mine.ids, {name: leaf[index.to(leaf.device)] for name, leaf in kept.items()})
                yield mine

    def _work(self, part: Chosen) -> Work:
        """What the clients of one block do."""
        tasks = [sent.task for sent in part.sents]
        ids, message, buffers = part.ids, tasks[0].message, tasks[0].buffers
        mixed = any(task.message is not message for task in tasks)
        if mixed:
            each = [tasks[number] for number in part.which.tolist()]
            message = pytree.tree_map(lambda *leaves: torch.stack(leaves), *(t.message for t in each))
            buffers = pytree.tree_map(lambda *leaves: torch.stack(leaves), *(t.buffers for t in each))
        if len(tasks) == 1:
            lent = tasks[0].lend(ids)
        else:
            rows = zip(part.which.tolist(), range(len(ids)), strict=True)
            lend = [tasks[number].lend(ids[row : row + 1]) for number, row in rows]
            lent = pytree.tree_map(lambda *leaves: torch.cat(leaves), *lend)
        return Work(ids, part.steps, part.rounds, tasks[0].spec, message, lent, buffers, mixed)

    def _order(self, part: Chosen, weigh: Weigh | None) -> Order:
        """The block with what is known of its clients' states."""
        work = self._work(part)
        if weigh is not None:
            weights = weigh(self._block(part, _untrained(part.steps), {}))
            work = replace(work, weights=weights, norms=self.norms)
        known = self.store.has(work.ids)
        # Tasks that are announced one by one may be computed long before their answers are staged.
        at = self.store.at(work.ids) if self.crew.apart and not self.one_by_one else None
        rows = self.store.read(work.ids[known]) if at is None and known.any() else {}
        return Order(work, known, rows, at)

    def _block(self, part: Chosen, trained: Trained, vectors: Any) -> UpdateBlock:
        """The answers of one block as the federation takes them."""
        ids = part.ids
        return UpdateBlock(
            ids,
            part.versions,
            self.place.clients.sizes(ids) if trained.examples is None else trained.examples,
            trained.steps,
            trained.normaliser,
            part.seconds,
            vectors,
            trained.scalars,
            trained.metrics,
            trained.buffers,
            trained.int_buffers,
            self.store.version_of[ids],
            summed=trained.summed,
        )


def _untrained(steps: Ids) -> Trained:
    """What is known of [C] clients before they train."""
    unknown = np.full(len(steps), np.nan)
    return Trained({}, {}, (), unknown, {}, None, None, steps)


def _equal(seconds: Floats) -> list[Ids]:
    """Rows that take equally long, the shortest first."""
    if (seconds == seconds[0]).all():
        return [np.arange(len(seconds), dtype=np.int64)]
    order = np.argsort(seconds, kind="stable").astype(np.int64)
    return list(np.split(order, np.flatnonzero(np.diff(seconds[order])) + 1))

"""The simulated fleet behind the Engine protocol: a virtual clock, and clients computed when folded.

A task is *delivered* at its virtual time and *computed* when its window closes, in blocks, so that a
device which is late, lost or cancelled costs nothing. Where windows are smaller than a block (the
asynchronous schedulers), a block is filled up with the tasks that come next: what a client answers is
decided when it gets its task, so it does not matter when it is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.engine import Arrived, Drained, Event, Failed
from fedsim.local import LocalAlgorithm, LocalSpec
from fedsim.rows import RowStore
from fedsim.simulation.clock import VirtualClock
from fedsim.simulation.devices import DeviceModel
from fedsim.simulation.ready import Ready, gathered
from fedsim.training.answer import answer, from_rows
from fedsim.training.work import ClientFailed, Trainer, Work, Workplace, client_message
from fedsim.transform import UpdateTransform
from fedsim.types import Bools, Floats, Ids, Message, Task, UpdateBlock

log = logging.getLogger(__name__)

TaskKey = tuple[int, int]  # client, version that it started from


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """A task as its devices take it: [b] local steps, seconds, who never answers."""

    task: Task
    steps: Ids
    seconds: Floats
    lost: Bools


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
    ) -> None:
        self.place = place
        self.trainer = trainer
        self.algorithm = algorithm
        self.devices = devices
        self.store = store
        self.transform = transform
        self.one_by_one = one_by_one
        self.clock = VirtualClock()
        self.sent: dict[TaskKey, tuple[Sent, int]] = {}  # in the order of dispatch
        self.ready: dict[TaskKey, Ready] = {}
        self.announced: set[TaskKey] = set()  # arrived; those never asked for are forgotten

    @property
    def now(self) -> float:
        return self.clock.now

    def submit(self, task: Task) -> None:
        moment = task.round_index + task.attempt  # a retry comes later, and finds other devices
        steps = self.place.clients.steps(task, task.ids)
        steps = self.devices.limit(task.ids, steps, moment)
        seconds = self.devices.seconds(task.ids, steps, moment)
        sent = Sent(task, steps, seconds, self.devices.lost(task.ids, moment))
        self.sent |= {(client, task.version): (sent, row) for row, client in enumerate(task.ids.tolist())}
        if self.one_by_one:
            groups: list[Ids] = [np.array([row], np.int64) for row in range(len(task.ids))]
        else:
            groups = [np.flatnonzero(seconds == at).astype(np.int64) for at in np.unique(seconds)]
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
            self.announced.update(zip(event.ids.tolist(), event.base_version.tolist(), strict=True))
        return event or Drained()

    def settle(self) -> list[Event]:
        return []  # nothing is acknowledged before it is announced

    def collect(self, ids: Ids, base_version: Ids) -> Iterator[UpdateBlock | Failed]:
        wanted = list(zip(ids.tolist(), base_version.tolist(), strict=True))
        missing = [key for key in wanted if key in self.sent and key not in self.ready]
        found = [self.ready.pop(key) for key in wanted if key in self.ready]
        if found:
            block, kept = gathered(found)
            self.store.stage(block.ids, kept)
            yield block
        for alike in self._alike(missing):
            early = self._next_of(alike)
            yield from self._compute(alike, early)
        self._forget(ids, base_version)

    def commit(self, ids: Ids, base_version: Ids) -> None:
        self.store.commit(ids)
        for key in self.announced:  # of clients that have left
            self.sent.pop(key, None)
            self.ready.pop(key, None)
        self.announced.clear()

    def cancel(self) -> None:
        self.clock.clear()
        self.sent.clear()
        self.ready.clear()
        self.announced.clear()
        self.store.discard()

    def close(self) -> None:
        self.cancel()

    def _forget(self, ids: Ids, base_version: Ids | None) -> None:
        """These tasks are over."""
        assert base_version is not None
        for key in zip(ids.tolist(), base_version.tolist(), strict=True):
            self.sent.pop(key, None)
            self.ready.pop(key, None)
            self.announced.discard(key)

    def _alike(self, keys: Sequence[TaskKey]) -> list[list[TaskKey]]:
        """Tasks grouped by their local training: only those under the same can share a block."""
        groups: dict[LocalSpec, list[TaskKey]] = {}
        for key in keys:
            groups.setdefault(self.sent[key][0].task.spec, []).append(key)
        return list(groups.values())

    def _next_of(self, alike: Sequence[TaskKey]) -> list[TaskKey]:
        """The tasks under the same local training that fill up the last block, earliest first."""
        room = -len(alike) % self.trainer.block
        if not self.one_by_one or not room:
            return []
        spec, asked = self.sent[alike[0]][0].task.spec, set(alike)
        return [
            key
            for key in self.clock.coming()
            if key in self.sent
            and key not in asked
            and key not in self.ready
            and self.sent[key][0].task.spec == spec
        ][:room]

    def _compute(self, asked: Sequence[TaskKey], early: Sequence[TaskKey]) -> Iterator[UpdateBlock | Failed]:
        """Train the tasks; those asked for are yielded, the others wait until they are."""
        keys = [*asked, *early]
        at = [self.sent[key] for key in keys]
        steps = np.array([sent.steps[row] for sent, row in at], np.int64)
        algorithm = self.algorithm(at[0][0].task.spec)
        for rows in self.trainer.plan(steps):
            part = [at[row] for row in rows]
            try:
                block, kept = self._train(part, algorithm)
            except ClientFailed as failure:
                log.warning("client=%d failed: %s", failure.client, failure.reason, exc_info=True)
                sent, row = part[0]
                yield Failed(sent.task.ids[row : row + 1], failure.reason, np.array([sent.task.version]))
                continue
            due = rows < len(asked)
            for row in np.flatnonzero(~due):
                self.ready[keys[rows[row]]] = Ready(block, int(row), kept)
            if due.all():
                self.store.stage(block.ids, kept)
                yield block
            elif due.any():
                index = torch.from_numpy(np.flatnonzero(due))
                mine = block.take(due)
                self.store.stage(mine.ids, {name: leaf[index.to(leaf.device)] for name, leaf in kept.items()})
                yield mine

    def _work(self, part: Sequence[tuple[Sent, int]]) -> tuple[Work, Ids, Floats]:
        """What the clients of one block do, with [C] versions and seconds."""
        tasks = [sent.task for sent, _ in part]
        ids = np.array([sent.task.ids[row] for sent, row in part], np.int64)
        steps = np.array([sent.steps[row] for sent, row in part], np.int64)
        seconds = np.array([sent.seconds[row] for sent, row in part])
        rounds = np.array([task.round_index for task in tasks], np.int64)
        versions = np.array([task.version for task in tasks], np.int64)
        message, buffers = tasks[0].message, tasks[0].buffers
        mixed = any(task.message is not message for task in tasks)
        if mixed:
            message = pytree.tree_map(lambda *leaves: torch.stack(leaves), *(t.message for t in tasks))
            buffers = pytree.tree_map(lambda *leaves: torch.stack(leaves), *(t.buffers for t in tasks))
        if all(task is tasks[0] for task in tasks):
            lent = tasks[0].lend(ids)
        else:
            each = [task.lend(ids[row : row + 1]) for row, task in enumerate(tasks)]
            lent = pytree.tree_map(lambda *leaves: torch.cat(leaves), *each)
        work = Work(ids, steps, rounds, tasks[0].spec, message, lent, buffers, mixed)
        return work, versions, seconds

    def _train(
        self, part: Sequence[tuple[Sent, int]], algorithm: LocalAlgorithm
    ) -> tuple[UpdateBlock, Mapping[str, Tensor]]:
        """The answers of one block, and the rows that its clients will keep."""
        work, versions, seconds = self._work(part)
        ids = work.ids
        found = answer(self.place, self.trainer, self.transform, work, algorithm, self._known)
        trained = found.trained
        block = UpdateBlock(
            ids,
            versions,
            self.place.clients.sizes(ids) if trained.examples is None else trained.examples,
            trained.steps,
            trained.normaliser,
            seconds,
            found.vectors,
            trained.scalars,
            trained.metrics,
            trained.buffers,
            trained.int_buffers,
            self.store.version_of[ids],
        )
        return block, found.kept

    def _known(self, ids: Ids) -> tuple[Bools, Mapping[str, Tensor]]:
        """Which clients have states, and the rows of those."""
        known = self.store.has(ids)
        return known, self.store.read(ids[known]) if known.any() else {}

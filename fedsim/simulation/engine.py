"""The simulated fleet behind the Engine protocol: a virtual clock, and clients computed when folded.

A task is *delivered* at its virtual time and *computed* when its window closes, in blocks, so that a
device which is late, lost or cancelled costs nothing.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.buffers import Buffers
from fedsim.engine import Arrived, Drained, Event, Failed, Timer
from fedsim.keys import Purpose, stream_keys
from fedsim.local import LocalAlgorithm
from fedsim.optimizers import make_optimizer
from fedsim.rows import RowStore
from fedsim.simulation.devices import DeviceModel
from fedsim.simulation.trainer import ClientFailed, Trainer, Workplace, client_message
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
        buffers: () -> the model's buffers at this version.
        transform: applied on the client side of each update.
        now: seconds of the clock at the start.
    """

    def __init__(
        self,
        place: Workplace,
        trainer: Trainer,
        algorithm: Callable[[Any], LocalAlgorithm],
        *,
        devices: DeviceModel,
        store: RowStore,
        buffers: Callable[[], Buffers],
        transform: UpdateTransform | None = None,
        now: float = 0.0,
    ) -> None:
        self.place = place
        self.trainer = trainer
        self.algorithm = algorithm
        self.devices = devices
        self.store = store
        self.buffers = buffers
        self.transform = transform
        self._now = now
        self._queue: list[tuple[float, int, Event]] = []
        self._count = 0
        self._tasks: list[tuple[Task, Ids, Floats]] = []  # task, steps, seconds

    @property
    def now(self) -> float:
        return self._now

    def submit(self, task: Task) -> None:
        moment = task.round_index + task.attempt  # a retry comes later, and finds other devices
        steps = self.place.clients.steps(task, task.ids)
        steps = self.devices.limit(task.ids, steps, moment)
        seconds = self.devices.seconds(task.ids, steps, moment)
        self._tasks.append((task, steps, seconds))
        lost = self.devices.lost(task.ids, moment)
        arrival = self._now + seconds
        for at in np.unique(arrival):
            then = arrival == at
            if (then & ~lost).any():
                ids = task.ids[then & ~lost]
                self._push(float(at), Arrived(ids, np.full(len(ids), task.version, np.int64)))
            if (then & lost).any():
                self._push(float(at), Failed(task.ids[then & lost], "the device dropped out"))

    def restore_clock(self, now: float) -> None:
        """Continue a run whose clock stood at `now`."""
        self._now = now

    def state_of(self, ids: Ids, message: Message, algorithm: LocalAlgorithm) -> Any:
        """The algorithm's state of the one client in `ids`; fresh where it never took part."""
        state = algorithm.fresh(client_message(message, self.place.spec))
        if not self.store.has(ids)[0]:
            return state
        leaves, structure = pytree.tree_flatten(state)
        rows = self.store.read(ids)
        own = [rows[f"local-{position:03d}"][0] for position in range(len(leaves))]
        return pytree.tree_unflatten(own, structure)

    def set_timer(self, name: str, at: float) -> None:
        self._push(at, Timer(name))

    def next_event(self) -> Event:
        if not self._queue:
            return Drained()
        at, _, event = heapq.heappop(self._queue)
        self._now = max(self._now, at)
        return event

    def collect(self, ids: Ids) -> Iterator[UpdateBlock | Failed]:
        for task, steps, seconds in self._tasks:
            rows = np.flatnonzero(np.isin(task.ids, ids))
            if not len(rows):
                continue
            algorithm = self.algorithm(task.spec)
            for block in self.trainer.plan(steps[rows]):
                chosen = rows[block]
                try:
                    yield self._train(task, task.ids[chosen], steps[chosen], seconds[chosen], algorithm)
                except ClientFailed as failure:
                    log.warning("client=%d failed: %s", failure.client, failure.reason, exc_info=True)
                    yield Failed(np.array([failure.client], np.int64), failure.reason)

    def commit(self, ids: Ids) -> None:
        self.store.commit(ids)

    def cancel(self) -> None:
        self._queue.clear()
        self._tasks.clear()
        self.store.discard()

    def close(self) -> None:
        self.cancel()

    def _push(self, at: float, event: Event) -> None:
        heapq.heappush(self._queue, (at, self._count, event))
        self._count += 1

    def _train(
        self, task: Task, ids: Ids, steps: Ids, seconds: Floats, algorithm: LocalAlgorithm
    ) -> UpdateBlock:
        with torch.no_grad():
            states = self._read(ids, self._fresh(task, algorithm), "local")
            trained = self.trainer.train(task, ids, steps, algorithm, states, self.buffers())
            vectors, kept = self._encode(task, ids, trained.vectors)
        self.store.stage(ids, _named(trained.states, "local") | _named(kept, "transform"))
        return UpdateBlock(
            ids,
            np.full(len(ids), task.version, np.int64),
            self.place.clients.sizes(ids) if trained.examples is None else trained.examples,
            trained.steps,
            trained.normaliser,
            seconds,
            vectors,
            trained.scalars,
            trained.metrics,
            trained.buffers,
            trained.int_buffers,
            self.store.version_of[ids],
        )

    def _fresh(self, task: Task, algorithm: LocalAlgorithm) -> Any:
        """One client's state at first participation: the algorithm's and the optimiser's."""
        message = client_message(task.message, self.place.spec)
        optimizer: Any = ()
        if algorithm.keeps_optimizer:
            optimizer = make_optimizer(task.spec).init(message.x)
        return algorithm.fresh(message), optimizer

    def _read(self, ids: Ids, fresh: Any, part: str) -> Any:
        """The states of these clients with a leading C; fresh for those never accepted before."""
        leaves, structure = pytree.tree_flatten(fresh)
        if not leaves:
            return fresh
        stacked: list[Tensor] = [leaf.unsqueeze(0).repeat(len(ids), *[1] * leaf.ndim) for leaf in leaves]
        known = self.store.has(ids)
        if known.any():
            rows = self.store.read(ids[known])
            at = torch.from_numpy(np.flatnonzero(known))
            for position, leaf in enumerate(stacked):
                leaf[at.to(leaf.device)] = rows[f"{part}-{position:03d}"].to(leaf.device)
        return pytree.tree_unflatten(stacked, structure)

    def _encode(
        self, task: Task, ids: Ids, vectors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Any]:
        if self.transform is None:
            return vectors, ()
        fresh = self.transform.init({name: torch.zeros_like(v[:1]) for name, v in vectors.items()})
        state = self._read(ids, pytree.tree_map(lambda leaf: leaf[0], fresh), "transform")
        keys = stream_keys(self.place.seed, Purpose.ENCODE, task.round_index, ids)
        message, kept = self.transform.encode(state, vectors, keys)
        return message, kept


def _named(tree: Any, part: str) -> dict[str, Tensor]:
    """The leaves of a state as named rows."""
    return {f"{part}-{i:03d}": leaf for i, leaf in enumerate(pytree.tree_leaves(tree))}

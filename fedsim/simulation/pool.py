"""Blocks computed by worker processes with one thread each, around any trainer.

    this process                           a worker
    order ──▶ slot of shared memory ─────▶ trains the block
    fold  ◀── views of the same slot ◀──── writes its answer behind the order

This process plans the blocks, writes their orders, and folds their answers in the order of the plan, while
the workers go on. So the numbers are those of one process with the same blocks, whatever the number of
workers and whoever was faster. A few slots are enough for any cohort; one is used again when nobody holds a
tensor of it any more. A worker that dies is replaced and its blocks are computed once more.
"""

from __future__ import annotations

import heapq
import logging
import select
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from fedsim.local import LocalSpec
from fedsim.simulation import pool_messages, pool_process
from fedsim.simulation.crew import Bench, Order
from fedsim.simulation.pool_arena import Arena
from fedsim.simulation.pool_messages import Words, log_again, untold
from fedsim.simulation.pool_process import Recipe
from fedsim.simulation.pool_tasks import DEATHS, Call, Seat, Task, deadly
from fedsim.simulation.shared import unpack
from fedsim.training.answer import Answer
from fedsim.training.work import ClientFailed, Trained

log = logging.getLogger(__name__)

DEPTH = 2
"""Orders that a worker has: the one that it computes, and the next."""
AHEAD_BYTES = 64 << 20
"""Answers that may wait until those before them are there."""
MOST_AHEAD = 64
"""Blocks of each worker that may be begun or done before the one that is folded next."""
LOOK_SECONDS = 1.0


def device_of(number: int, devices: Sequence[str]) -> str | None:
    """Where a worker trains: the devices in turn, None where none are named."""
    return devices[number % len(devices)] if devices else None


class Pool:
    """A crew of worker processes; they are started when they are first needed.

    Args:
        workers: how many.
        devices: where they train, in turn (``["cuda:0", "cuda:1"]``); none for where the engine's data are.
        recipe: how a fresh process builds the run, for workers that cannot be forked; None forks only.
        patience: seconds after which it is said that a worker takes long.
    """

    apart = True

    def __init__(
        self,
        workers: int,
        *,
        devices: Sequence[str] = (),
        recipe: Recipe | None = None,
        patience: float = 60.0,
    ) -> None:
        self.devices = tuple(devices)
        self.recipe = recipe
        self.patience = patience
        self.arena = Arena()
        self._staff = [Seat(number) for number in range(workers)]
        self._bench: Bench | None = None
        self._tickets = 0
        # Also at the end of the program, and where a notebook forgets its simulation.
        self._finalizer = weakref.finalize(self, _end, self._staff)

    @property
    def width(self) -> int:
        """Workers."""
        return len(self._staff)

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [worker.process.pid for worker in self._staff if worker.process is not None]

    def answers(
        self, bench: Bench, spec: LocalSpec, costs: Sequence[float], order: Callable[[int], Order]
    ) -> Iterator[Answer | ClientFailed]:
        """As of `fedsim.simulation.crew.Crew`; an answer's tensors are views of shared memory.

        Raises:
            RunFailed: FS-RUN-030, a block has ended too many workers.
            ConfigError, EnvironmentProblem: workers cannot be started.
            Exception: that a block led to in a worker, with the worker's traceback as its cause.
        """
        self._bench = bench
        call = Call(asdict(spec), costs, order)
        try:
            for number in range(len(costs)):
                self._hand_out(call, number)
                while number not in call.done:
                    self._listen()
                    self._hand_out(call, number)
                outcome = call.done.pop(number)
                if isinstance(outcome, Exception) and not isinstance(outcome, ClientFailed):
                    raise outcome
                yield outcome
                del outcome  # its slot is free for the next but one
        except GeneratorExit:
            if self._writes_rows(call):
                self.close()
            raise
        except BaseException:
            self.close()  # an interrupted message would be taken for the next
            raise
        finally:
            call.over = True
            call.done.clear()
            self.arena.trim(max(len(call.slots), self._ahead))

    def close(self) -> None:
        """End the workers; the next block would start others."""
        _end(self._staff)
        for worker in self._staff:
            for task in worker.tasks:
                self._release(task)
            worker.tasks.clear()
            self.arena.forget(worker.number)

    @property
    def _ahead(self) -> int:
        """Blocks that may be begun or done at a time."""
        workers = len(self._staff)
        if not self.arena.largest:
            return DEPTH * workers
        return min(max(AHEAD_BYTES // self.arena.largest, workers + 1), MOST_AHEAD * workers)

    def _hand_out(self, call: Call, head: int) -> None:
        """Give the workers what they can take of the blocks from `head` on, the longest first."""
        while call.begun < min(head + self._ahead, len(call.costs)):
            heapq.heappush(call.waiting, (-call.costs[call.begun], call.begun))
            call.begun += 1
        while call.waiting:
            free = [worker for worker in self._staff if len(worker.tasks) < DEPTH]
            if not free:
                return
            worker = min(free, key=lambda worker: worker.load)
            _, number = heapq.heappop(call.waiting)
            order = call.order(number)
            slot = self.arena.slot(worker.number)
            page = None if order.work.mixed else self.arena.page(order.work)
            call.slots.add(slot.number)
            self._tickets += 1
            task = Task(call, number, self._tickets, order, slot, page)
            if not worker.tasks:
                worker.since, worker.warned = time.monotonic(), 0
            worker.tasks.append(task)
            self._give(worker, task)

    def _give(self, worker: Seat, task: Task) -> None:
        """Write the order into its slot and tell the worker; its death is noticed by whoever listens."""
        if worker.process is None:
            assert self._bench is not None
            siblings = [w.process.channel for w in self._staff if w.process is not None]
            device = device_of(worker.number, self.devices)
            worker.process = pool_process.start(
                self._bench, worker.number, device=device, recipe=self.recipe, siblings=siblings
            )
        work = task.order.work
        content = (
            work.ids, work.steps, work.rounds, work.lent, task.order.known, task.order.rows, work.weights,
            task.order.at,
        )  # fmt: skip
        words: Words = {
            "order": task.ticket,
            "spec": task.call.spec,
            "mixed": work.mixed,
            "norms": work.norms,
        }
        placed, files = self.arena.write(worker.number, task.slot, task.page, content, work)
        try:
            pool_messages.send(worker.process.channel, words | placed, files)
        except OSError:
            log.debug("worker=%d cannot be reached", worker.process.pid)

    def _writes_rows(self, call: Call) -> bool:
        """Whether a worker still writes states of its clients, into places that the store gives to others."""
        return any(t.call is call and t.order.at is not None for seat in self._staff for t in seat.tasks)

    def _listen(self) -> None:
        """Take in what workers say, or the end of one; look after them where they say nothing."""
        running = {w.process.channel.fileno(): w for w in self._staff if w.process is not None}
        ears = select.poll()
        for channel in running:
            ears.register(channel, select.POLLIN)
        said = ears.poll(LOOK_SECONDS * 1000)
        for channel, _ in said:
            self._hear(running[channel])
        if not said:
            for worker in running.values():
                self._look_after(worker)

    def _hear(self, worker: Seat) -> None:
        assert worker.process is not None
        try:
            words, _ = pool_messages.receive(worker.process.channel)
        except (EOFError, OSError):
            self._replace(worker)
            return
        log_again(words["log"], worker.process.pid)
        task = worker.tasks.popleft()
        assert words["order"] == task.ticket
        worker.since, worker.warned = time.monotonic(), 0
        if task.call.over:
            self._release(task)  # whoever asked for it has gone
        elif "error" in words:
            self._release(task)
            task.call.done[task.number] = untold(words["error"])
        else:
            if task.page is not None:
                self.arena.leave(task.page)
            task.call.done[task.number] = self._answer(task, words)

    def _answer(self, task: Task, words: Words) -> Answer:
        assert self._bench is not None
        device = self._bench.place.clients.device
        found: Any = unpack(words["answer"], self.arena.lease(task.slot, words["size"]), device)
        vectors, kept, scalars, normaliser, metrics, buffers, int_buffers, steps, examples, summed = found
        # Whoever keeps a number of each client for the record must not keep the whole slot with it.
        scalars = {name: values.clone() for name, values in scalars.items()}
        trained = Trained({}, scalars, (), normaliser, metrics, buffers, int_buffers, steps, examples, summed)
        return Answer(trained, vectors, kept)

    def _replace(self, worker: Seat) -> None:
        """A worker has died: another one takes over what it had, unless that is what ends them all."""
        process = worker.process
        assert process is not None
        process.ended()
        worker.process = None
        self.arena.forget(worker.number)
        log.warning(
            "worker=%d ended %s; blocks=%d are given to another", process.pid, process.how, len(worker.tasks)
        )
        tasks, worker.tasks = list(worker.tasks), deque()
        worker.since, worker.warned = time.monotonic(), 0
        for position, task in enumerate(tasks):
            task.deaths += position == 0  # the first is the one that it was at
            if task.call.over:
                self._release(task)
            elif task.deaths >= DEATHS:
                self._release(task)
                task.call.done[task.number] = deadly(task, process.how)
            else:
                worker.tasks.append(task)
                self._give(worker, task)

    def _look_after(self, worker: Seat) -> None:
        """A worker that says nothing: is it dead, stopped, or only slow?"""
        process = worker.process
        assert process is not None
        if not process.look():
            self._replace(worker)
            return
        if not worker.tasks:
            return
        seconds = time.monotonic() - worker.since
        if process.stopped and not worker.warned:
            log.warning("worker=%d is stopped; kill -CONT %d lets it go on", process.pid, process.pid)
            worker.warned = 1
        elif seconds > self.patience * 2**worker.warned:
            ids = worker.tasks[0].named
            log.warning("worker=%d is at clients=%s for seconds=%.0f", process.pid, ids, seconds)
            worker.warned += 1

    def _release(self, task: Task) -> None:
        """Its order is over, and there is no answer to hold."""
        if task.page is not None:
            self.arena.leave(task.page)
        self.arena.free(task.slot)


def _end(staff: Sequence[Seat]) -> None:
    for worker in staff:
        if worker.process is not None:
            worker.process.end()
            worker.process = None

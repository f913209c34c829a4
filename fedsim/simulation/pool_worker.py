"""A worker of a pool: one thread, one block after the other, until its pool is gone.

It reads an order from shared memory, computes it as the pool's own process would, and writes the answer
behind the order. It keeps nothing from one block to the next but what is the same for all of them, so
that it does not matter which worker computes what, or whether it took the place of one that died.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import random
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

import numpy as np
import torch

from fedsim.buffers import Buffers
from fedsim.keys import Purpose, torch_seed
from fedsim.local import LocalAlgorithm, LocalSpec
from fedsim.runs.lock import LOCK
from fedsim.simulation import pool_messages
from fedsim.simulation.allocator import settle_allocator
from fedsim.simulation.crew import Bench, Order
from fedsim.simulation.fused import FusedTrainer
from fedsim.simulation.pool_messages import Overheard, Words, told
from fedsim.simulation.shared import Memory, Room, pack, unpack
from fedsim.training.answer import Answer
from fedsim.training.work import Work
from fedsim.types import Message

_PDEATHSIG = 1  # PR_SET_PDEATHSIG of prctl(2)


def begin_as_copy(parent: int | None, others: Sequence[int]) -> None:
    """Let go, in a forked process, of what belongs to the process that it is a copy of.

    Args:
        parent: its id, where this process shall die with the thread that forked it; None for no such thing.
        others: numbers of files that must not stay open here.
    """
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)  # it ended before the wish was heard
    gc.freeze()  # collecting what both share would copy its pages
    signal.set_wakeup_fd(-1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    for fd in [*others, *_locks()]:
        # The number stays taken, or whoever thinks that it is still his would close another file.
        os.dup2(nothing, fd)
    os.close(nothing)
    # A thread of the parent's may have held the locks of its streams, and nobody would ever let them go here.
    sys.stdout, sys.stderr = _stream(1), _stream(2)
    # Loggers write into files of the parent's, and perhaps through a display that lives in a thread of it.
    for name in (None, *logging.root.manager.loggerDict):
        logging.getLogger(name).handlers.clear()


def main(fd: int) -> None:
    """A fresh process: build the run that the pool names, and serve."""
    channel = socket.socket(fileno=fd)
    try:
        words, _ = pool_messages.receive(channel)
    except (EOFError, OSError):
        return

    def build() -> Bench:
        from fedsim.simulation.run import Simulation

        config = dict(words["config"])
        config["engine"] = dict(config.get("engine", {})) | {"workers": 1, "threads": 1}
        if words["device"] is not None:
            config["engine"]["device"] = words["device"]
        engine = Simulation(config).engine
        return Bench(engine.place, engine.trainer, engine.transform, engine.algorithm)

    serve(channel, build, words["number"])


def serve(channel: socket.socket, build: Callable[[], Bench], number: int) -> None:
    """Carry out orders until the other side of the channel is gone.

    Args:
        build: makes the bench; what goes wrong with it is the answer to every order.
        number: of the worker.
    """
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group: the pool decides
        signal.signal(signal_number, signal.SIG_IGN)
    torch.set_num_threads(1)
    settle_allocator()
    threading.Thread(target=_end_with, args=(channel,), daemon=True).start()
    overheard = Overheard()
    logging.getLogger().addHandler(overheard)
    desk = Desk(build)
    while True:
        try:
            words, files = pool_messages.receive(channel)
            reply = desk.reply(words, files)
            sys.stdout.flush()
            sys.stderr.flush()
            pool_messages.send(channel, reply | {"log": overheard.taken()})
        except (EOFError, OSError):
            return


class Desk:
    """Carries out orders.

    Args:
        build: makes the bench, at the first order.
    """

    def __init__(self, build: Callable[[], Bench]) -> None:
        self._build = build
        self._bench: Bench | None = None
        self._memories: dict[int, Memory] = {}
        self._algorithm: tuple[LocalSpec, LocalAlgorithm] | None = None

    def reply(self, words: Words, files: Sequence[int]) -> Words:
        """The reply to one order: its answer, or the error that it led to."""
        for number, fd in zip(words["new"], files, strict=True):
            self._memories[number] = Memory(fd)
        for number in words["drop"]:
            self._memories.pop(number).close()
        try:
            return {"order": words["order"], **self._answer(words)}
        except Exception as error:
            return {"order": words["order"], "error": told(error)}

    def _answer(self, words: Words) -> Words:
        if self._bench is None:
            self._bench = self._build()
        bench, memory = self._bench, self._memories[words["slot"]]
        spec = LocalSpec(**words["spec"])
        if self._algorithm is None or self._algorithm[0] != spec:
            self._algorithm = spec, bench.algorithm(spec)
        order = self._order(words, spec, bench)
        _seed_others(bench, order.work)
        room = Room(memory, words["end"])
        if isinstance(bench.trainer, FusedTrainer):
            bench.trainer.room = room.take
        found = order.carry_out(bench, self._algorithm[1])
        packed = pack(plain(found), memory, room.end, room=room)
        return {"answer": packed.form, "size": packed.end}

    def _order(self, words: Words, spec: LocalSpec, bench: Bench) -> Order:
        device = bench.place.clients.device

        def read(slot: int, form: Any) -> Any:
            memory = self._memories[slot]
            memory.reach(words["sizes"][str(slot)])
            return unpack(form, memory.lease(), device)

        ids, steps, rounds, lent, known, rows, weights, at = read(words["slot"], words["work"])
        vectors, scalars, floating, integers = read(words["page"], words["message"])
        message, buffers = Message(vectors, scalars), Buffers(floating, integers)
        work = Work(ids, steps, rounds, spec, message, lent, buffers, words["mixed"], weights, words["norms"])
        return Order(work, known.astype(bool), rows, at)


def plain(found: Answer) -> tuple[Any, ...]:
    """What the pool needs of an answer: neither the vectors before the transform nor the states twice."""
    trained = found.trained
    return (
        found.vectors,
        found.kept,
        trained.scalars,
        trained.normaliser,
        trained.metrics,
        trained.buffers,
        trained.int_buffers,
        trained.steps,
        trained.examples,
        trained.summed,
    )


def _stream(fd: int) -> TextIO:
    """A stream of this process alone; to nowhere where the number is closed."""
    try:
        return open(fd, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    except OSError:
        return open(os.devnull, "w", encoding="utf-8")


def _seed_others(bench: Bench, work: Work) -> None:
    """Seed the generators that fedsim does not use, in case that a client's own code does.

    Copies of one process would all draw the same numbers, and which depends on who computes what.
    """
    seed = torch_seed(bench.place.seed, Purpose.DROPOUT, int(work.rounds[0]), int(work.ids[0]))
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _end_with(channel: socket.socket) -> None:
    """In a thread: end this process when the pool's is gone, which training would notice too late."""
    ended = select.poll()
    ended.register(channel, 0)  # hanging up is always reported
    with suppress(OSError, ValueError):
        ended.poll()
    os._exit(0)


def _locks() -> list[int]:
    """Numbers of the open files that lock run folders: a lock is held while any copy of it is open."""
    found: list[int] = []
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return found  # the copies close with this process, which ends with its parent
    for number in numbers:
        with suppress(OSError):
            if os.path.basename(os.readlink(f"/proc/self/fd/{number}")) == LOCK:
                found.append(number)
    return found

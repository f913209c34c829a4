"""The runs of a coordinator without runs: tasks that a test puts down, verdicts in a dictionary.

`FakeRuns` offers what `fedsim.server.runs.Runs` offers to the service for nodes. It decides as the ledger
does (one verdict for a task, the first one stays), but nothing is written and nothing is trained.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedsim.bundle import Object, TensorSpec, encode
from fedsim.identity import Key
from fedsim.local import LocalSpec
from fedsim.pb import federation_pb2 as pb
from fedsim.server.board import ANSWERED, CLOSED, OPEN, Board, OpenTask, RunFacts, Sent, UpdateLimits
from fedsim.server.desk import Decision, Place

RUN_ID = "0123456789ab"
UPDATE = "vectors/delta"


def sent(content: bytes) -> Sent:
    """A bundle that is kept in memory."""
    return Sent(Object(hashlib.sha256(content).digest(), len(content)), content)


def update_bundle(size: int = 4, value: float = 0.5) -> bytes:
    """An answer to a task of `FakeRuns.put` with the same `size`."""
    return encode({UPDATE: torch.full((size,), value)})


@dataclass(eq=False)
class FakeRuns:
    """Tasks and verdicts in memory; used by tests as the argument `runs`.

    Args:
        key: of the server, which signs offers.
    """

    key: Key
    max_norm: float | None = None
    over_norm: str = "reject"
    inline_bytes: int = 1 << 20
    verdicts: dict[bytes, Decision] = field(default_factory=dict)
    places: dict[bytes, Place] = field(default_factory=dict)
    failures: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    expirations: list[bytes] = field(default_factory=list)
    online: frozenset[str] = frozenset()
    forgotten: list[bytes] = field(default_factory=list)
    fails_with: Exception | None = None  # what `accept` fails with

    def __post_init__(self) -> None:
        self.board = Board(self.key)
        self._door = threading.Lock()

    def forget_objects(self, digests: Sequence[bytes]) -> None:
        self.forgotten += digests

    def put(self, node_id: str, *, size: int = 4, message: bytes | Path = b"the model") -> OpenTask:
        """A new task of a node: to answer with `size` float32 values."""
        if isinstance(message, Path):
            digest = hashlib.sha256(message.read_bytes()).digest()
            broadcast = Sent(Object(digest, message.stat().st_size), message)
        else:
            broadcast = sent(message)
        facts = RunFacts(
            RUN_ID,
            "fake",
            b"{}",
            "",
            1,
            UpdateLimits(1e6, self.max_norm, self.over_norm),
            self.inline_bytes,
            90.0,
        )
        specs = (TensorSpec(UPDATE, "F32", (size,)),)
        task = OpenTask(
            facts, os.urandom(16), 0, node_id, 0, 0, 0, LocalSpec(), -1, broadcast, None, specs,
            4 * size + 4096, b"", 0.0,
        )  # fmt: skip
        self.board.put([task])
        return task

    # What the service uses.

    @property
    def on_offers(self) -> Callable[[], None]:
        return self.board.on_offers

    @on_offers.setter
    def on_offers(self, callback: Callable[[], None]) -> None:
        self.board.on_offers = callback

    def offer(self, node_id: str) -> OpenTask | None:
        return self.board.next_for(node_id)

    def task(self, task_id: bytes) -> OpenTask | None:
        return self.board.task(task_id)

    def fetchable(self, node_id: str, digest: bytes) -> bytes | Path | None:
        return self.board.fetchable(node_id, digest)

    def cancelled(self, task_id: bytes) -> bool:
        task = self.board.task(task_id)
        return task is None or task.status != OPEN

    def earlier(self, node_id: str, body: pb.SubmitBody) -> Decision | None:
        task = self.board.task(body.task_id)
        if task is None or task.node_id != node_id:
            return None
        return self._known(task)

    def accept(
        self, task: OpenTask, body: pb.SubmitBody, request: pb.SubmitRequest, place: Place
    ) -> Future[Decision]:
        if self.fails_with is not None:
            failed: Future[Decision] = Future()
            failed.set_exception(self.fails_with)
            return failed
        return self._decide(task, Decision(pb.ACCEPTED), ANSWERED, place)

    def reject(
        self, task: OpenTask, body: pb.SubmitBody, request: pb.SubmitRequest, reason: str, text: str
    ) -> Future[Decision]:
        return self._decide(task, Decision(pb.REJECTED, reason, text), CLOSED)

    def fail(self, task: OpenTask, code: str, text: str) -> Future[None]:
        self.failures[task.task_id] = (code, text)
        task.status = CLOSED
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def expired(self, task_id: bytes) -> None:
        self.expirations.append(task_id)
        task = self.board.task(task_id)
        if task is not None:
            task.status = CLOSED

    def set_online(self, node_ids: frozenset[str]) -> None:
        self.online = node_ids

    def _known(self, task: OpenTask) -> Decision | None:
        known = self.verdicts.get(task.task_id)
        if known is not None:
            return Decision(pb.DUPLICATE, known.reason, "the task was answered before", first=known.verdict)
        return Decision(pb.LATE, "late", "the round closed") if task.status == CLOSED else None

    def _decide(
        self, task: OpenTask, decision: Decision, status: str, place: Place | None = None
    ) -> Future[Decision]:
        done: Future[Decision] = Future()
        with self._door:
            known = self._known(task)
            if known is None:
                self.verdicts[task.task_id] = known = decision
                task.status = status
                if place is not None:
                    self.places[task.task_id] = place
        done.set_result(known)
        return done

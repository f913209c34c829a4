"""The tasks that nodes can take, and what belongs to them: written by run threads, read by the service.

A task id is a random capability; which task is whose is decided here, once, and never by what a node
says of itself.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsim.bundle import Object, TensorSpec
from fedsim.identity import TASK, Key
from fedsim.local import LocalSpec
from fedsim.pb import federation_pb2 as pb
from fedsim.wire import local_json

OPEN, ANSWERED, CLOSED = "open", "answered", "closed"


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """A bundle that clients fetch.

    Args:
        object: digest and size.
        content: the bytes where it is small, else the file that holds them.
    """

    object: Object
    content: bytes | Path


@dataclass(frozen=True, slots=True)
class UpdateLimits:
    """What an update may be beside well-formed."""

    max_weight: float
    max_norm: float | None
    over_norm: str


@dataclass(frozen=True, slots=True, eq=False)
class RunFacts:
    """What all tasks of a run have in common.

    Args:
        config: JSON of `wire.client_config`; schema: digest of the model's layout.
        population: N.
    """

    run_id: str
    name: str
    config: bytes
    schema: str
    population: int
    limits: UpdateLimits
    inline_bytes: int
    lease_seconds: float


@dataclass(slots=True, eq=False)
class OpenTask:
    """One task of one client, from its dispatch to the end of its window.

    Args:
        client: index in the run; node_id: who is it.
        update: what an answer must hold.
        last_folded: task whose client state is current, empty for none.
        dispatched: seconds of the run's clock; offered_at: of the machine's, when it could first be taken.
        status: open, answered or closed.
    """

    run: RunFacts
    task_id: bytes
    client: int
    node_id: str
    version: int
    round_index: int
    round_attempt: int
    spec: LocalSpec
    steps: int
    message: Sent
    lent: Sent | None
    update: tuple[TensorSpec, ...]
    max_update_bytes: int
    last_folded: bytes
    dispatched: float
    attempt: int = 0
    status: str = OPEN
    offered_at: float = field(default_factory=time.monotonic)
    _offer: pb.Offer | None = field(default=None, repr=False)

    @property
    def run_id(self) -> str:
        return self.run.run_id

    @property
    def limits(self) -> UpdateLimits:
        return self.run.limits

    @property
    def local(self) -> str:
        """JSON of the local training."""
        return local_json(self.spec).decode()

    def offer(self, key: Key) -> pb.Offer:
        """The signed offer, made when it is first asked for."""
        if self._offer is None:
            self._offer = self._signed(key)
        return self._offer

    def again(self) -> None:
        """Offer it anew: the lease of the last attempt is over."""
        self.attempt += 1
        self._offer = None

    def _signed(self, key: Key) -> pb.Offer:
        run, lent = self.run, self.lent
        body = pb.Task(
            server_id=key.public,
            run_id=run.run_id,
            run_name=run.name,
            task_id=self.task_id,
            attempt=self.attempt,
            client=self.client,
            version=self.version,
            round_index=self.round_index,
            round_attempt=self.round_attempt,
            config=run.config,
            schema=run.schema,
            local=self.local.encode(),
            steps=self.steps,
            message=_object(self.message.object),
            lent=None if lent is None else _object(lent.object),
            update=[pb.TensorSpec(name=s.name, dtype=s.dtype, shape=s.shape) for s in self.update],
            last_folded=self.last_folded,
            population=run.population,
            lease_seconds=run.lease_seconds,
        ).SerializeToString()
        return pb.Offer(
            body=body,
            signature=key.sign(TASK, body),
            message=_inline(self.message, run.inline_bytes),
            lent=b"" if lent is None else _inline(lent, run.inline_bytes),
        )


def new_task_id() -> bytes:
    """16 random bytes."""
    return secrets.token_bytes(16)


def _object(of: Object) -> pb.Object:
    return pb.Object(digest=of.digest, size=of.size)


def _inline(sent: Sent, most: int) -> bytes:
    if sent.object.size > most:
        return b""
    return sent.content if isinstance(sent.content, bytes) else sent.content.read_bytes()


class Board:
    """Every task of every run that is not forgotten yet; thread-safe.

    Args:
        key: of the server, which signs tasks.
    """

    def __init__(self, key: Key) -> None:
        self.key = key
        self.on_offers: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._tasks: dict[bytes, OpenTask] = {}
        self._of_node: dict[str, list[OpenTask]] = {}

    def put(self, tasks: Sequence[OpenTask]) -> None:
        """These tasks may be taken; wakes whoever waits for one."""
        with self._lock:
            for task in tasks:
                self._tasks[task.task_id] = task
                self._of_node.setdefault(task.node_id, []).append(task)
        if any(task.status == OPEN for task in tasks):
            self.on_offers()

    def task(self, task_id: bytes) -> OpenTask | None:
        return self._tasks.get(task_id)

    def next_for(self, node_id: str) -> OpenTask | None:
        """The task that this node should do now: the oldest, so that runs take turns."""
        with self._lock:
            for task in self._of_node.get(node_id, ()):
                if task.status == OPEN:
                    return task
        return None

    def fetchable(self, node_id: str, digest: bytes) -> bytes | Path | None:
        """What a digest stands for in a live task of this node; knowing a digest grants nothing else."""
        with self._lock:
            for task in self._of_node.get(node_id, ()):
                if task.status != OPEN:
                    continue
                for sent in (task.message, task.lent):
                    if sent is not None and sent.object.digest == digest:
                        return sent.content
        return None

    def forget(self, tasks: Iterable[OpenTask]) -> None:
        """These tasks are over: whoever still works on one is told so."""
        with self._lock:
            for task in tasks:
                task.status = CLOSED
                self._tasks.pop(task.task_id, None)
                own = self._of_node.get(task.node_id)
                if own is not None:
                    own[:] = [other for other in own if other is not task]
                    if not own:
                        del self._of_node[task.node_id]

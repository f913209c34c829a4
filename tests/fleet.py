"""Clients of a coordinator's runs without a network: each trains what it is offered, in this process."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.client.data import Source
from fedsim.client.job import Answer, Job
from fedsim.client.train import Trainee
from fedsim.config import config_from, to_toml
from fedsim.identity import SUBMIT, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server.board import OpenTask
from fedsim.server.database import Database, open_database
from fedsim.server.desk import Decision, Place
from fedsim.server.members import Candidate
from fedsim.server.objects import Objects
from fedsim.server.runs import Runs
from fedsim.server.segments import Segments
from fedsim.server.uploads import Uploads

END = frozenset({"ok", "target", "early_stop", "stopped", "failed", "paused"})


class Gone(Exception):
    """The round closed, or the run ended, between the offer of a task and the fetching of its objects."""


@dataclass(eq=False)
class Node:
    """One client: what it keeps between tasks, and its training."""

    name: str
    folder: Path
    key: Key = field(default_factory=Key.new)
    trainee: Trainee = field(default_factory=lambda: Trainee(Source()))

    @property
    def node_id(self) -> str:
        return self.key.node_id

    def _state(self, task_id: bytes) -> Path | None:
        """What was kept of a task, also by a process that was killed since."""
        kept = list((self.folder / task_id.hex()).glob("*state*.safetensors")) if task_id else []
        return kept[0] if kept else None

    def answer(
        self, offer: pb.Offer, content: Callable[[bytes], Any]
    ) -> tuple[pb.SubmitRequest, Answer, bytes]:
        """Train the offered task; the submission, what it holds, and the bundle.

        Raises:
            Gone: by `content`.
        """
        task = pb.Task.FromString(offer.body)
        out = self.folder / task.task_id.hex()
        out.mkdir(parents=True, exist_ok=True)
        message = offer.message or content(task.message.digest)
        lent = None
        if task.HasField("lent") and task.lent.digest:
            lent = offer.lent or content(task.lent.digest)
        state = self._state(task.last_folded)
        found = self.trainee.train(Job(offer.body, message, lent, state, out))
        update = found.update if isinstance(found.update, bytes) else found.update.read_bytes()
        body = pb.SubmitBody(
            run_id=task.run_id,
            task_id=task.task_id,
            attempt=task.attempt,
            key=os.urandom(16),
            update=pb.Object(digest=hashlib.sha256(update).digest(), size=len(update)),
            examples=found.examples,
            local_steps=found.local_steps,
            normaliser=found.normaliser,
            train_seconds=found.train_seconds,
            metrics=found.metrics,
        ).SerializeToString()
        return pb.SubmitRequest(body=body, signature=self.key.sign(SUBMIT, body)), found, update


@dataclass(eq=False)
class Coordinator:
    """`Runs` over a state folder, as a coordinator has it; `crash` forgets all that is not on the disk."""

    state: Path
    key: Key
    nodes: list[Node]
    lease_seconds: float = 60.0
    inline_bytes: int = 1 << 20
    database: Database = field(init=False)
    uploads: Uploads = field(init=False)
    runs: Runs = field(init=False)

    def start(self) -> Coordinator:
        self.state.mkdir(exist_ok=True)
        self.database = open_database("", self.state)
        named = {node.node_id: node.name for node in self.nodes}
        objects = Objects(self.state / "objects")
        self.uploads = Uploads(self.database, objects, self.state / "uploads", keep_free_bytes=0)
        self.runs = Runs(
            self.database,
            objects,
            Segments(self.state / "segments"),
            self.uploads,
            self.state,
            self.key,
            candidates=lambda expression, online: [Candidate(n, named[n], {}) for n in online if n in named],
            inline_bytes=self.inline_bytes,
            lease_seconds=self.lease_seconds,
        )
        self.runs.recover()
        self.runs.set_online(frozenset(named))
        return self

    def stop(self) -> None:
        self.runs.close()
        self.database.close()

    def submit(self, task: OpenTask, request: pb.SubmitRequest, update: bytes) -> Decision:
        body = pb.SubmitBody.FromString(request.body)
        place = Place(body.update.digest, len(update), update)
        return self.runs.accept(task, body, request, place).result(timeout=120)

    def serve(self, run_id: str, *, seconds: float = 240.0, until: Callable[[], bool] = lambda: False) -> str:
        """Let every node do what it is offered until the run ends, or `until`; the run's state."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            idle = True
            for node in self.nodes:
                task = self.runs.offer(node.node_id)
                if until():
                    return self.runs.get(run_id).state
                if task is None:
                    continue
                idle = False
                self.turn(node, task)
            if idle:
                state = self.runs.get(run_id)
                if state.state in END:
                    return f"{state.state} {state.detail}".strip()
                time.sleep(0.002)
        raise AssertionError(f"the run did not end: {self.runs.get(run_id)}")

    def turn(self, node: Node, task: OpenTask) -> Decision | None:
        """One node does one task, or leaves it alone where it was over before it began."""

        def content(digest: bytes) -> Any:
            found = self.runs.fetchable(node.node_id, digest)
            if found is None:
                assert self.runs.cancelled(task.task_id), "an open task without its objects"
                raise Gone
            return found

        try:
            request, _, update = node.answer(task.offer(self.key), content)
        except Gone:
            return None
        return self.submit(task, request, update)


def make_nodes(folder: Path, count: int) -> list[Node]:
    return [Node(f"client-{i}", folder / f"client-{i}") for i in range(count)]


def toml_of(values: dict[str, Any]) -> str:
    return to_toml(config_from(values, {}))


def scratch() -> Path:
    return Path(tempfile.mkdtemp())

"""From a dispatch to tasks that can be offered: bundles of message and loans, and what an answer holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedsim import bundle
from fedsim.buffers import Buffers
from fedsim.bundle import Object, TensorSpec
from fedsim.local import LocalSpec
from fedsim.server.board import OpenTask, RunFacts, Sent, new_task_id
from fedsim.server.objects import Objects
from fedsim.server.segments import Segments
from fedsim.types import Message, Task
from fedsim.wire import local_of, pack_lent, pack_message, unpack_lent, unpack_message

Layout = Callable[[LocalSpec, Message, Any], tuple[TensorSpec, ...]]
"""(local training, message, lent rows of one client) -> what every answer must hold."""

WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Planner:
    """Makes the tasks of one run.

    Args:
        facts: what they share.
        node_of: client -> node id, None while the index has nobody.
        layout: called once; answers of a run all look alike.
        durable: bundles are kept in files, for tasks that outlive a checkpoint (asynchronous runs).
    """

    def __init__(
        self,
        facts: RunFacts,
        *,
        objects: Objects,
        segments: Segments,
        node_of: Callable[[int], str | None],
        layout: Layout,
        durable: bool,
    ) -> None:
        self.facts, self.objects, self.segments = facts, objects, segments
        self.node_of = node_of
        self.durable = durable
        self._layout = layout
        self._answer: tuple[TensorSpec, ...] | None = None
        self._messages: dict[int, tuple[Message, Sent]] = {}
        self._held: list[bytes] = []  # objects that no row names yet

    def tasks(
        self, task: Task, names: Sequence[bytes], *, last: Mapping[int, bytes], now: float
    ) -> list[OpenTask]:
        """The tasks of a dispatch.

        Args:
            names: their identifiers where they were planned before a restart, else empty.
            last: client -> task whose client state is current.
            now: seconds of the run's clock.
        """
        message = self.message(task.version, task.message, task.buffers)
        planned: list[OpenTask] = []
        for row, client in enumerate(task.ids.tolist()):
            lent = task.lend(task.ids[row : row + 1])
            if self._answer is None:
                self._answer = self._layout(task.spec, task.message, lent)
            planned.append(
                OpenTask(
                    run=self.facts,
                    task_id=names[row] if names else new_task_id(),
                    client=client,
                    node_id=self.node_of(client) or "",
                    version=task.version,
                    round_index=task.round_index,
                    round_attempt=task.attempt,
                    spec=task.spec,
                    steps=-1 if task.steps is None else int(task.steps[row]),
                    message=message,
                    lent=self._sent(pack_lent(lent)) if len(lent) else None,
                    update=self._answer,
                    max_update_bytes=largest(self._answer),
                    last_folded=last.get(client, b""),
                    dispatched=now,
                )
            )
        return planned

    def taken_up(
        self, rows: Sequence[Mapping[str, Any]], *, last: Mapping[int, bytes]
    ) -> tuple[dict[int, Message], list[OpenTask]]:
        """Tasks that clients went on with while the coordinator was down, from the ledger's rows.

        Returns:
            The messages by version, and the tasks in the order of the rows.

        Raises:
            EnvironmentProblem, BundleError: a bundle is missing or damaged.
        """
        messages: dict[int, Message] = {}
        planned: list[OpenTask] = []
        for row in rows:
            version = row["version"]
            if version not in self._messages:
                sent = self._stored(row["message_digest"])
                message, buffers = unpack_message(bundle.decode_file(self.objects.path(sent.object.digest)))
                self._messages[version] = message, sent
            message, sent = self._messages[version]
            messages[version] = message
            lent = None if row["lent_digest"] is None else self._stored(row["lent_digest"])
            spec = local_of(row["local"].encode())
            if self._answer is None:
                loan = (
                    ()
                    if lent is None
                    else unpack_lent(bundle.decode_file(self.objects.path(lent.object.digest)))
                )
                self._answer = self._layout(spec, message, loan)
            planned.append(
                OpenTask(
                    run=self.facts,
                    task_id=row["task_id"],
                    client=row["client"],
                    node_id=self.node_of(row["client"]) or "",
                    version=version,
                    round_index=row["round_index"],
                    round_attempt=row["round_attempt"],
                    spec=spec,
                    steps=row["steps"],
                    message=sent,
                    lent=lent,
                    update=self._answer,
                    max_update_bytes=largest(self._answer),
                    last_folded=last.get(row["client"], b""),
                    dispatched=row["dispatched"],
                )
            )
        return messages, planned

    def _stored(self, digest: bytes) -> Sent:
        content = (
            self.objects.read(digest) if (self.objects.size(digest) or 0) <= self.facts.inline_bytes else None
        )
        path = self.objects.path(digest)
        size = self.objects.size(digest) or 0
        return Sent(Object(digest, size), path if content is None else content)

    def message(self, version: int, message: Message, buffers: Buffers) -> Sent:
        """The bundle of a version's broadcast, made once."""
        known = self._messages.get(version)
        if known is None or known[0] is not message:
            self._messages[version] = message, self._sent(pack_message(message, buffers))
        return self._messages[version][1]

    def named(self) -> None:
        """Rows name all that was made so far."""
        held, self._held = self._held, []
        for digest in held:
            self.objects.release(digest)

    def keep(self, versions: set[int]) -> list[bytes]:
        """Forget the bundles of all other versions.

        Returns:
            Digests of those that are forgotten; rows of tasks may still name them.
        """
        gone = [self._messages.pop(v)[1] for v in list(self._messages) if v not in versions]
        return [sent.object.digest for sent in gone]

    def _sent(self, tensors: Mapping[str, Tensor]) -> Sent:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        small = size + 4096 <= self.facts.inline_bytes
        if small:
            content = bundle.encode(tensors)
            made = Object(hashlib.sha256(content).digest(), len(content))
            if self.durable:
                self._hold(made.digest)
                self.objects.put(content)
            return Sent(made, content)
        unfinished = self.objects.scratch()
        made = bundle.encode_to(unfinished, tensors)
        self._hold(made.digest)
        self.objects.adopt(unfinished, made.digest)
        return Sent(made, self.objects.path(made.digest))

    def _hold(self, digest: bytes) -> None:
        """Another run may be about to remove the same bytes."""
        self.objects.hold(digest)
        self._held.append(digest)


def largest(layout: Sequence[TensorSpec]) -> int:
    """Bytes that a bundle of these tensors may have: the values, and room for a header."""
    values = sum(math.prod(s.shape) * WIDTHS[s.dtype] for s in layout)
    return values + 4096 + 512 * len(layout)

"""`Submit`, step by step: who signed, for which task, what the update is worth, and then the ledger.

The signature covers the very bytes of the body, so it is checked before anything is read from them; then
the sizes of its fields. What is wrong there is a mistake or an attack and ends the call, the task stays
open. What is wrong with the update itself is a verdict: it consumes the task and counts as a strike.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from grpc import StatusCode

from fedsim import identity
from fedsim.bundle import Object, digest
from fedsim.pb import federation_pb2 as pb
from fedsim.server.board import OPEN
from fedsim.server.calls import Refused
from fedsim.server.desk import Decision, Place
from fedsim.server.streams import NOT_LEASED
from fedsim.server.telemetry import describe_verdict
from fedsim.server.validate import Clipped, Rejected, validate

if TYPE_CHECKING:
    from fedsim.server.auth import Peer
    from fedsim.server.board import OpenTask
    from fedsim.server.completions import Completions
    from fedsim.server.fleet_parts import FleetParts

ID_BYTES, DIGEST_BYTES = 16, 32
MOST_BODY_BYTES = 256 * 1024
# Up to this size an update is validated on the loop: a thread costs more than the work. Measured on two
# cores: 0.1 ms for 10 kB, and about as much again for going to a thread and back.
SMALL_BYTES = 64 * 1024


class Outcome(NamedTuple):
    """What a submission is answered, and the task it was for where that is known."""

    decision: Decision
    task: OpenTask | None


class Submissions:
    """Turns submissions into decisions that are durable.

    Args:
        parts: of the service.
        completions: awaits the ledger.
    """

    def __init__(self, parts: FleetParts, completions: Completions) -> None:
        self._parts = parts
        self._completions = completions
        self._runs = parts.runs
        self._loop = asyncio.get_running_loop()

    async def decide(self, request: pb.SubmitRequest, peer: Peer) -> Outcome:
        """The decision on a submission of `peer`.

        Raises:
            Refused: the signature, a field or the holder of the task is wrong.
        """
        body = read_body(request, peer, self._parts.key.public)
        task = self._runs.task(body.task_id)
        if task is not None and task.node_id != peer.node_id:
            raise Refused(StatusCode.PERMISSION_DENIED, NOT_LEASED)
        if task is None or task.status != OPEN:
            threads = self._parts.disk
            earlier = await self._loop.run_in_executor(threads, self._runs.earlier, peer.node_id, body)
            if earlier is not None:
                return self._counted(Outcome(earlier, task))
        if task is None:
            raise Refused(StatusCode.PERMISSION_DENIED, NOT_LEASED)
        if task.run_id != body.run_id:
            raise Refused(StatusCode.INVALID_ARGUMENT, "the task belongs to another run than the body says")
        found = await self._weighed(task, body, request, peer.node_id)
        if isinstance(found, Place):
            future = self._runs.accept(task, body, request, found)
            if found.content is None and found.digest != body.update.digest:
                future.add_done_callback(lambda _: self._parts.disk.submit(self._let_go, found.digest))
        else:
            future = self._runs.reject(task, body, request, found.reason, found.text)
        return self._counted(Outcome(await self._completions.of(future), task))

    async def _weighed(
        self, task: OpenTask, body: pb.SubmitBody, request: pb.SubmitRequest, node_id: str
    ) -> Place | Rejected:
        """Where the update lies when it can be used, else why it cannot."""
        if not body.upload_id:
            if len(request.update) <= SMALL_BYTES:
                return self._inline(task, body, request.update)
            return await self._loop.run_in_executor(
                self._parts.work, self._inline, task, body, request.update
            )
        if request.update:
            raise Refused(StatusCode.INVALID_ARGUMENT, "an update is either uploaded or inline, not both")
        return await self._loop.run_in_executor(self._parts.work, self._uploaded, task, body, node_id)

    def _inline(self, task: OpenTask, body: pb.SubmitBody, content: bytes) -> Place | Rejected:
        # Hashed as bytes: for a small update to be read as a file costs more than the hash.
        known = Object(digest(content), len(content))
        found = validate(task, body, content, known=known)
        if isinstance(found, Rejected):
            return found
        self._parts.telemetry.validated(found.seconds)
        self._parts.telemetry.moved("up", "update", len(content))
        if found.clipped is not None:
            return self._clipped(found.clipped)
        return Place(body.update.digest, len(content), content)

    def _uploaded(self, task: OpenTask, body: pb.SubmitBody, node_id: str) -> Place | Rejected:
        """The same for an update that this very node uploaded for this task."""
        row = self._parts.uploads.finished(node_id, body.upload_id, body.task_id)
        if row is None:
            text = "the update of this task is not uploaded yet: ask UploadStatus and go on there"
            raise Refused(StatusCode.FAILED_PRECONDITION, text)
        known = Object(row.digest, row.size)
        found = validate(task, body, self._parts.objects.path(row.digest), known=known)
        if isinstance(found, Rejected):
            return found
        self._parts.telemetry.validated(found.seconds)
        return self._clipped(found.clipped) if found.clipped else Place(row.digest, row.size, None)

    def _clipped(self, clipped: Clipped) -> Place:
        """Where the shortened update lies."""
        digest, size = clipped.object
        if isinstance(clipped.content, bytes):
            return Place(digest, size, clipped.content)
        self._parts.objects.hold(digest)
        try:
            self._parts.objects.adopt(clipped.content, digest)
        except BaseException:
            self._parts.objects.release(digest)
            raise
        return Place(digest, size, None)

    def _let_go(self, digest: bytes) -> None:
        """A shortened update is named by its answer from now on, or it was not accepted and goes."""
        self._parts.objects.release(digest)
        self._runs.forget_objects([digest])

    def _counted(self, outcome: Outcome) -> Outcome:
        decision = outcome.decision
        self._parts.telemetry.update(describe_verdict(decision.verdict), decision.reason)
        return outcome


def read_body(request: pb.SubmitRequest, peer: Peer, server_id: bytes) -> pb.SubmitBody:
    """The body of a submission that `peer` signed for this coordinator.

    Raises:
        Refused: UNAUTHENTICATED for a wrong signature or another coordinator's body, INVALID_ARGUMENT
            for fields of the wrong size.
        DecodeError: the body is no SubmitBody.
    """
    if len(request.body) > MOST_BODY_BYTES:
        raise Refused(StatusCode.INVALID_ARGUMENT, f"the body has more than {MOST_BODY_BYTES} bytes")
    if not identity.verify(peer.public_key, identity.SUBMIT, request.body, request.signature):
        text = "the signature does not fit the body and the key of this node"
        raise Refused(StatusCode.UNAUTHENTICATED, text)
    body = pb.SubmitBody()
    body.ParseFromString(request.body)
    if body.server_id != server_id:
        raise Refused(StatusCode.UNAUTHENTICATED, "the body was signed for another coordinator")
    fields = [
        ("task_id", body.task_id, ID_BYTES),
        ("key", body.key, ID_BYTES),
        ("update.digest", body.update.digest, DIGEST_BYTES),
    ]
    if body.upload_id:
        fields.append(("upload_id", body.upload_id, ID_BYTES))
    for name, value, size in fields:
        if len(value) != size:
            text = f"{name} must have {size} bytes, not {len(value)}"
            raise Refused(StatusCode.INVALID_ARGUMENT, text)
    return body

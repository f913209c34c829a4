"""From what the worker returned to a verdict: sign, write down, upload where it is large, submit."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from grpc import StatusCode

from fedsim.client.connection import Connection
from fedsim.client.hands import Held, TaskFailed
from fedsim.client.policy import Policy, leaving
from fedsim.client.state import StateFolder
from fedsim.client.statuses import Refused
from fedsim.client.transfer import BadObject, upload
from fedsim.client.unsent import Unsent
from fedsim.client.worker import Answer
from fedsim.identity import SUBMIT
from fedsim.pb import federation_pb2 as pb
from fedsim.storage import sha256

MOST_INLINE = 3 << 20
"""A message of gRPC holds 4 MiB."""

_STRIKES = 5
_GONE = (StatusCode.NOT_FOUND, StatusCode.PERMISSION_DENIED)

log = logging.getLogger(__name__)


async def written(
    folder: StateFolder, connection: Connection, task: pb.Task, answer: Answer, policy: Policy
) -> Unsent:
    """Sign an answer and write it down with the client's state, before anything of it is sent.

    Raises:
        EnvironmentProblem: there is no space.
    """
    if answer.state is not None:
        await asyncio.to_thread(folder.states.keep, task.run_id, task.task_id, answer.state)
    most = min(connection.limits.inline_bytes, MOST_INLINE)
    content = answer.update
    if isinstance(content, Path) and content.stat().st_size <= most:
        content = content.read_bytes()
    if isinstance(content, Path):
        digest, size = bytes.fromhex(await asyncio.to_thread(sha256, content)), content.stat().st_size
    else:
        digest, size = hashlib.sha256(content).digest(), len(content)
    inline = isinstance(content, bytes) and size <= most
    body = pb.SubmitBody(
        server_id=task.server_id, run_id=task.run_id, task_id=task.task_id, attempt=task.attempt,
        key=os.urandom(16), update=pb.Object(digest=digest, size=size),
        upload_id=b"" if inline else os.urandom(16),
        examples=answer.examples, local_steps=answer.local_steps, normaliser=answer.normaliser,
        train_seconds=answer.train_seconds, metrics=leaving(policy, answer.metrics),
    )  # fmt: skip
    signed = body.SerializeToString()
    request = pb.SubmitRequest(
        body=signed,
        signature=connection.key.sign(SUBMIT, signed),
        update=content if inline and isinstance(content, bytes) else b"",
    )
    if inline:
        return folder.unsent.write(body, request, content)
    return await asyncio.to_thread(folder.unsent.write, body, request, content)


async def hand_in(
    connection: Connection, unsent: Unsent, held: Held, *, resumed: bool, backoff: Callable[[int], float]
) -> pb.SubmitReply:
    """Send an answer until there is a verdict, every time the same bytes.

    Args:
        held: told how far it is.
        resumed: a part of it may have been sent before.
        backoff: seconds to wait before another try after refusal 1, 2, …

    Raises:
        TaskFailed: the coordinator does not take the answer, and says no verdict either.
        Unwanted: the task was cancelled while the update was on the way.
    """
    body, strikes = unsent.body, 0
    while True:
        try:
            if isinstance(unsent.content, Path):
                await _upload(connection, unsent, unsent.content, held, resumed=resumed)
            reply = await connection.submit(unsent.request, body.update.size)
        except BadObject as bad:
            raise TaskFailed("exception", f"the answer is damaged: {bad}") from bad
        except Refused as refused:
            # An upload that the coordinator has lost meanwhile is sent again.
            strikes += 1
            lost = refused.code in (StatusCode.FAILED_PRECONDITION, StatusCode.DATA_LOSS, *_GONE)
            if not unsent.inline and lost and strikes < _STRIKES:
                resumed = True
                await asyncio.sleep(backoff(strikes))
                continue
            raise TaskFailed("exception", f"the answer is not taken: {refused}") from refused
        if reply.verdict == pb.RETRY:
            resumed, strikes = True, 0
            await asyncio.sleep(reply.delay_seconds or backoff(1))
            continue
        return reply


async def _upload(
    connection: Connection, unsent: Unsent, content: Path, held: Held, *, resumed: bool
) -> None:
    body = unsent.body
    start = pb.UploadStart(upload_id=body.upload_id, task_id=body.task_id, object=body.update)
    try:
        await upload(
            connection, start, content, resumed=resumed,
            on_bytes=held.at_byte, cancelled=lambda: held.cancelled,
        )  # fmt: skip
    except Refused as refused:
        # The task may be over for good; then only the submission is told so.
        if refused.code not in _GONE:
            raise
        log.info("task=%s upload=refused why=%s", body.task_id.hex(), refused)

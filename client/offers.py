"""A task as a coordinator offers it: nothing is believed before signature and digests are right."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from google.protobuf.message import DecodeError

from fedsim.identity import TASK, verify
from fedsim.pb import federation_pb2 as pb

_RUN_ID = re.compile(r"[0-9a-f]{8,64}")  # becomes the name of a folder


class BadOffer(Exception):
    """An offer that a client does not take up.

    Args:
        why: for the owner's audit file and the coordinator.
        task: as far as it could be read and was signed; None otherwise.
    """

    def __init__(self, why: str, task: pb.Task | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.task = task


class Offered(NamedTuple):
    """A task that is the coordinator's own.

    Args:
        task: what its signed `body` says.
        message, lent: the bundles where they came along; None where they have to be fetched.
    """

    task: pb.Task
    body: bytes
    message: bytes | None
    lent: bytes | None


def read_offer(offer: pb.Offer, server_id: bytes) -> Offered:
    """The task of an offer.

    Args:
        server_id: public key of the coordinator that this client is bound to.

    Raises:
        BadOffer: it is not signed by that key, is malformed, or what came along has another digest.
    """
    if not verify(server_id, TASK, offer.body, offer.signature):
        raise BadOffer("the task is not signed by the coordinator")
    task = pb.Task()
    try:
        task.ParseFromString(offer.body)
    except DecodeError as error:
        raise BadOffer("the task is no message of fedsim.v1") from error
    if task.server_id != server_id:
        raise BadOffer("the task names another coordinator")
    if len(task.task_id) != 16 or not _RUN_ID.fullmatch(task.run_id) or not task.client < task.population:
        raise BadOffer("the task's identifiers are malformed")
    if not task.message.size:
        raise BadOffer("the task has no message", task)
    return Offered(
        task,
        offer.body,
        _came_along(task, "message", task.message, offer.message),
        _came_along(task, "lent", task.lent, offer.lent),
    )


def lends(task: pb.Task) -> bool:
    """Whether the coordinator lends something to this client."""
    return bool(task.lent.digest)


def _came_along(task: pb.Task, name: str, object_: pb.Object, content: bytes) -> bytes | None:
    if object_.size and len(object_.digest) != 32:
        raise BadOffer(f"the digest of {name} has not 32 bytes", task)
    if not content:
        return None
    if len(content) != object_.size or hashlib.sha256(content).digest() != object_.digest:
        raise BadOffer(f"{name} has another SHA-256 than the signed task says", task)
    return content

"""What an operator is told of runs, nodes and events: plain values, free of the wire's types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsim.pb import federation_pb2 as pb

OVER = ("ok", "target", "early_stop", "stopped", "failed")
"""States of a run that has ended."""
_STATES = {pb.PENDING: "pending", pb.APPROVED: "approved", pb.REVOKED: "revoked"}
_MOST_JSON = 1_000_000

Record = Mapping[str, Any]  # Any: JSON


@dataclass(frozen=True, slots=True)
class RemoteRun:
    """A run on a coordinator.

    Args:
        run_id: 12 hexadecimal digits; folder: name of its folder there.
        state: running, paused, stopping, ok, target, early_stop, stopped or failed; detail: why.
        rounds_done, rounds: committed, and wanted.
        clients, online: that take part, and that are there now.
        record: last line of its metrics.jsonl, {} before the first.
        bytes_down, bytes_up, client_seconds: what it has cost so far.
    """

    run_id: str
    name: str
    state: str
    detail: str
    rounds_done: int
    rounds: int
    clients: int
    online: int
    record: Record
    folder: str
    bytes_down: int
    bytes_up: int
    client_seconds: float

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in OVER

    def as_data(self) -> dict[str, Any]:
        """As JSON for a program."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class RemoteEvent:
    """Something that happened in a run.

    Args:
        revision: grows with every event of a coordinator; watching goes on behind it.
        type: such as round, state.
        data: JSON, by type.
        time: seconds since 1970, on the coordinator's clock.
    """

    revision: int
    run_id: str
    type: str
    data: Record
    time: float


@dataclass(frozen=True, slots=True)
class RemoteNode:
    """A key that a coordinator knows.

    Args:
        state: pending, approved or revoked; role: client, viewer, operator or admin.
        last_seen: seconds since 1970, 0 for never.
    """

    node_id: str
    name: str
    state: str
    role: str
    labels: Mapping[str, str]
    online: bool
    last_seen: float
    build: str
    device: str
    fingerprint: str

    def as_data(self) -> dict[str, Any]:
        """As JSON for a program."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Invitation:
    """A token for one enrolment.

    Args:
        token: to be handed over in a file; valid_seconds: from now.
        server_id: public key of the coordinator.
    """

    token: str = field(repr=False)
    valid_seconds: float
    server_id: bytes


def run_of(run: pb.Run) -> RemoteRun:
    """A run from the wire."""
    return RemoteRun(
        run_id=run.run_id,
        name=run.name,
        state=run.state,
        detail=run.detail,
        rounds_done=run.rounds_done,
        rounds=run.rounds,
        clients=run.clients,
        online=run.online,
        record=_json(run.record),
        folder=run.folder,
        bytes_down=run.bytes_down,
        bytes_up=run.bytes_up,
        client_seconds=run.client_seconds,
    )


def event_of(event: pb.Event) -> RemoteEvent:
    """An event from the wire."""
    return RemoteEvent(event.revision, event.run_id, event.type, _json(event.data), event.time)


def node_of(node: pb.Node) -> RemoteNode:
    """A node from the wire."""
    return RemoteNode(
        node_id=node.node_id,
        name=node.name,
        state=_STATES.get(node.state, "unknown"),
        role=node.role,
        labels=dict(node.labels),
        online=node.online,
        last_seen=node.last_seen,
        build=node.build,
        device=node.device,
        fingerprint=node.fingerprint,
    )


def _json(text: str) -> Record:
    """A JSON object; what is none, or is absurdly long, is an empty one: it is shown and decides nothing."""
    if not text or len(text) > _MOST_JSON:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

"""A coordinator's security on a real database, with callers in front of it and a clock moved by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from fedsim.identity import ENROL, LOGIN, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server.audit import Audit
from fedsim.server.auth import Auth, Denied, Peer
from fedsim.server.database import open_database
from fedsim.server.nodes import Nodes
from fedsim.transport import TICKET

HERE = "10.0.0.7"


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """A coordinator's security on a real database, and callers in front of it.

    Args:
        options: of `Auth`.
    """

    def __init__(self, folder: Path, clock: Clock, **options: Any) -> None:
        self.folder, self.clock, self.options = folder, clock, options
        self.key = Key.new()
        self.open()

    def open(self) -> None:
        self.database = open_database("", self.folder)
        self.audit = Audit(self.folder / "audit.jsonl", wall=self.clock)
        self.nodes = Nodes(self.database, self.audit, wall=self.clock)
        self.auth = Auth(
            self.database, self.audit, self.nodes, self.key,
            lease_seconds=90, heartbeat_seconds=20, clock=self.clock, wall=self.clock, **self.options,
        )  # fmt: skip

    def close(self) -> None:
        self.audit.close()
        self.database.close()

    def restart(self) -> None:
        self.close()
        self.open()

    def enrolment(self, key: Key, token: str = "", name: str = "", **more: Any) -> pb.Signed:
        body = pb.EnrolBody(
            server_id=self.key.public, nonce=self.auth.nonce(), public_key=key.public, token=token, name=name
        )
        return signed(key, ENROL, body, more)

    def login_body(self, key: Key, session: bytes = b"s" * 16, **more: Any) -> pb.Signed:
        body = pb.LoginBody(
            server_id=self.key.public, nonce=self.auth.nonce(), public_key=key.public, build="1.0",
            client_time=self.clock(), session=session,
        )  # fmt: skip
        return signed(key, LOGIN, body, more)

    def member(self, name: str = "", role: str = "client") -> Key:
        """A key that has enrolled."""
        key = Key.new()
        self.auth.enrol(self.enrolment(key, self.nodes.invite(role), name), HERE)
        return key

    def login(self, key: Key, session: bytes = b"s" * 16) -> bytes:
        return self.auth.login(self.login_body(key, session), HERE).ticket

    def peer(self, ticket: bytes) -> Peer:
        return self.auth.peer(((TICKET, ticket),))

    def audited(self, action: str) -> int:
        return (self.folder / "audit.jsonl").read_text().count(f'"action":"{action}"')


def signed(key: Key, context: bytes, body: Any, more: dict[str, Any]) -> pb.Signed:
    for name, value in more.items():
        if isinstance(value, dict):
            getattr(body, name).update(value)
        else:
            setattr(body, name, value)
    content = body.SerializeToString()
    return pb.Signed(body=content, signature=key.sign(context, content))


def refused(status: StatusCode, attempt: Callable[[], Any]) -> str:
    """The text of a refusal with this status."""
    with pytest.raises(Denied) as caught:
        attempt()
    assert caught.value.status == status, caught.value.text
    return caught.value.text

"""Who is let in: nonces, enrolment, logins and tickets, in the order in which a caller meets them.

A caller proves that it holds its key by signing a nonce of this process together with the identity of the
coordinator that it means, so that nothing it signed serves anybody else or a second time. A key that is not
known and one that was revoked get the same answer after the same work. Failures are counted, successes not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from google.protobuf.message import DecodeError
from grpc import StatusCode
from sqlalchemy import select

from fedsim.errors import ConfigError
from fedsim.identity import ENROL, LOGIN, PUBLIC_BYTES, Key, is_weak, node_id_of, verify
from fedsim.pb import federation_pb2 as pb
from fedsim.printable import printable
from fedsim.server import tables
from fedsim.server.attempts import Attempts
from fedsim.server.audit import Audit
from fedsim.server.database import Database
from fedsim.server.denied import Denied
from fedsim.server.enrolment import Applicant, NameTaken
from fedsim.server.labels import check_labels, check_name
from fedsim.server.logs import fields
from fedsim.server.node_rows import APPROVED, PENDING, REVOKED
from fedsim.server.nodes import Nodes
from fedsim.server.nonces import Nonces
from fedsim.server.tickets import TICKET_SECONDS, Peer, Tickets, not_let_in
from fedsim.transport import TICKET

__all__ = ["Auth", "Denied", "Peer", "certificate_names"]

SKEW_SECONDS = 120.0
FAILURES_PER_MINUTE = 10
_MOST_BODY = 32 * 1024
_SESSION_BYTES = 16
_MOST_BUILD = 64
_STATES = {PENDING: pb.PENDING, APPROVED: pb.APPROVED, REVOKED: pb.REVOKED}

Metadata = Sequence[tuple[str, str | bytes]]

log = logging.getLogger(__name__)


class Auth:
    """Lets callers in; any thread. `enrol`, `login` and `drop` wait for the disk, the rest does not.

    Args:
        key: of the coordinator.
        lease_seconds, heartbeat_seconds: told to whoever logs in.
        allow_anonymous: unknown keys become clients without a token; for loopback alone.
        manual_approval: whoever enrols waits for an administrator.
        bind_certificates: a caller's client certificate must be made out to its name or identifier (mTLS).
        clock: seconds that never go back; wall: seconds since 1970.
    """

    def __init__(
        self,
        database: Database,
        audit: Audit,
        nodes: Nodes,
        key: Key,
        *,
        lease_seconds: float,
        heartbeat_seconds: float,
        ticket_seconds: float = TICKET_SECONDS,
        allow_anonymous: bool = False,
        manual_approval: bool = False,
        bind_certificates: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._audit = audit
        self._nodes = nodes
        self._server_id = key.public
        self._seconds = lease_seconds, heartbeat_seconds
        self._anonymous, self._manual, self._bound = allow_anonymous, manual_approval, bind_certificates
        self._wall = wall
        self._nonces = Nonces(clock=clock)
        self._failures = Attempts(FAILURES_PER_MINUTE, clock=clock)
        # So that strangers cannot fill the disk with lines about themselves.
        self._audited = Attempts(FAILURES_PER_MINUTE, clock=clock)
        self._tickets = Tickets(database, seconds=ticket_seconds, wall=wall)
        nodes.on_revoke.append(self._tickets.revoke)

    def __repr__(self) -> str:
        return f"Auth({self._tickets!r})"

    def nonce(self) -> bytes:
        """32 bytes for one Enrol or Login, within 60 s."""
        return self._nonces.new()

    def enrol(
        self, signed: pb.Signed, address: str, certificate: Collection[str] | None = None
    ) -> pb.EnrolReply:
        """Let a new key in; a key that is in already gets the same answer again.

        Args:
            address: where the call comes from, without its port.
            certificate: names in the caller's client certificate, see `certificate_names`.

        Raises:
            Denied: UNAUTHENTICATED, PERMISSION_DENIED, ALREADY_EXISTS, INVALID_ARGUMENT, RESOURCE_EXHAUSTED.
        """
        body = _parsed(pb.EnrolBody(), signed)
        who = ("enrol", address)
        self._check_rate(who)
        self._check_proof(body, signed, ENROL, who)
        try:
            name = check_name(body.name) if body.name else ""
            applicant = Applicant(body.public_key, body.token, name, check_labels(body.labels))
        except ConfigError as error:
            raise Denied(StatusCode.INVALID_ARGUMENT, f"{error.what}: {error.why}") from None

        def check(node_id: str, name: str) -> None:
            self._check_certificate(certificate, node_id, name)

        # Used up before it is known whether the key comes in: a second copy of this call must do nothing.
        if not self._nonces.use(body.nonce):
            raise self._failed(who, _old_nonce())
        try:
            found = self._nodes.enrol(
                applicant,
                anonymous=self._anonymous,
                state=PENDING if self._manual else APPROVED,
                check=check,
            )
        except NameTaken as error:
            raise Denied(
                StatusCode.ALREADY_EXISTS, f"the name {error} is taken: ask for another one"
            ) from None
        node_id = node_id_of(body.public_key)
        if found is None:
            text = "this key may not enrol: it needs an invitation that is known, not used and not expired"
            self._audit_failure("enrol.denied", node_id, address)
            raise self._failed(who, Denied(StatusCode.PERMISSION_DENIED, text))
        node = found.node
        if found.new:
            how = "token" if body.token else "anonymous"
            self._audit.write(
                "node.enrol",
                node=node_id, name=node.name, role=node.role, state=node.state, labels=dict(node.labels),
                address=address, how=how,
            )  # fmt: skip
            about = fields(node=node_id)
            log.info("enrolled name=%s role=%s state=%s", node.name, node.role, node.state, extra=about)
        return pb.EnrolReply(node_id=node_id, state=_STATES[node.state], name=node.name)

    def login(
        self, signed: pb.Signed, address: str, certificate: Collection[str] | None = None
    ) -> pb.LoginReply:
        """Begin a session, or go on with it under a new ticket.

        Args:
            address: where the call comes from, without its port.
            certificate: names in the caller's client certificate, see `certificate_names`.

        Raises:
            Denied: UNAUTHENTICATED, PERMISSION_DENIED, FAILED_PRECONDITION (superseded), INVALID_ARGUMENT,
                RESOURCE_EXHAUSTED.
        """
        body = _parsed(pb.LoginBody(), signed)
        node_id = node_id_of(body.public_key)
        who = ("login", address, node_id)
        self._check_rate(who)
        if len(body.session) != _SESSION_BYTES:
            raise Denied(StatusCode.INVALID_ARGUMENT, f"a session is {_SESSION_BYTES} random bytes")
        self._check_proof(body, signed, LOGIN, who)
        n = tables.nodes
        query = select(n.c.name, n.c.role, n.c.state).where(
            n.c.node_id == node_id, n.c.public_key == body.public_key
        )
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None or row.state == REVOKED:
            self._audit_failure("login.denied", node_id, address)
            raise self._failed(who, not_let_in())
        if row.state != APPROVED:
            text = f"this key waits for approval: fedsim node approve {node_id}"
            raise Denied(StatusCode.PERMISSION_DENIED, text)
        self._check_certificate(certificate, node_id, row.name)
        if not self._nonces.use(body.nonce):
            raise self._failed(who, _old_nonce())
        self._look_at_clock(body.client_time, node_id, row.name)
        peer = Peer(node_id, row.name, row.role, body.public_key, body.session)
        build = printable(body.build, longest=_MOST_BUILD)
        ticket = self._tickets.issue(peer, address=address, build=build)
        self._audit.write("session.login", node=node_id, name=row.name, role=row.role, address=address)
        lease_seconds, heartbeat_seconds = self._seconds
        return pb.LoginReply(
            ticket=ticket,
            ticket_seconds=self._tickets.seconds,
            lease_seconds=lease_seconds,
            heartbeat_seconds=heartbeat_seconds,
            node_id=node_id,
            name=row.name,
            role=row.role,
        )

    def peer(self, metadata: Metadata | None) -> Peer:
        """Who calls, by the ticket in the metadata of a call.

        Raises:
            Denied: UNAUTHENTICATED, no valid ticket; FAILED_PRECONDITION, superseded.
        """
        tickets = [value for name, value in metadata or () if name == TICKET]
        if len(tickets) != 1 or not isinstance(tickets[0], bytes):
            raise Denied(StatusCode.UNAUTHENTICATED, "the call carries no ticket: log in")
        return self._tickets.find(tickets[0])

    def renew(self, peer: Peer) -> tuple[bytes, float] | None:
        """A new ticket and its seconds where the old one is getting old, else None."""
        return self._tickets.renew(peer)

    def revoke(self, node_id: str) -> None:
        """Let go of the tickets of a node; `Nodes.revoke` has done so already."""
        self._tickets.revoke(node_id)

    def drop(self, peer: Peer) -> None:
        """End a session."""
        self._tickets.drop(peer)

    def _check_proof(self, body: Any, signed: pb.Signed, context: bytes, who: tuple[str, ...]) -> None:
        """The caller means this coordinator, now, and holds the key. Any: Enrol- or LoginBody."""
        if len(body.public_key) != PUBLIC_BYTES or is_weak(body.public_key):
            raise Denied(StatusCode.INVALID_ARGUMENT, "this is no public key of Ed25519")
        if body.server_id != self._server_id:
            text = "the call was signed for another coordinator"
            raise self._failed(who, Denied(StatusCode.UNAUTHENTICATED, text))
        if not self._nonces.fresh(body.nonce):
            raise self._failed(who, _old_nonce())
        if not verify(body.public_key, context, signed.body, signed.signature):
            text = "the signature does not fit the call and the key"
            raise self._failed(who, Denied(StatusCode.UNAUTHENTICATED, text))

    def _check_certificate(self, names: Collection[str] | None, node_id: str, name: str) -> None:
        if self._bound and not {node_id, name} & set(names or ()):
            text = f"the client certificate must be made out to {name} or {node_id}"
            raise Denied(StatusCode.PERMISSION_DENIED, text)

    def _check_rate(self, who: tuple[str, ...]) -> None:
        seconds = self._failures.wait(who)
        if seconds > 0:
            text = f"too many attempts have failed: try again in {seconds:.0f} s"
            raise Denied(StatusCode.RESOURCE_EXHAUSTED, text, retry_seconds=seconds)

    def _failed(self, who: tuple[str, ...], denied: Denied) -> Denied:
        self._failures.failed(who)
        return denied

    def _audit_failure(self, action: str, node_id: str, address: str) -> None:
        log.warning("%s address=%s", action, printable(address, longest=64), extra=fields(node=node_id))
        if self._audited.wait(address) == 0:
            self._audited.failed(address)
            self._audit.write(action, node=node_id, address=address)

    def _look_at_clock(self, client_time: float, node_id: str, name: str) -> None:
        """Nothing depends on the client's clock; logs are easier to read when it is right."""
        skew = client_time - self._wall()
        if client_time and not abs(skew) <= SKEW_SECONDS:
            text = "name=%s clock_seconds=%+.0f its clock differs from this machine's"
            log.warning(text, name, skew, extra=fields(node=node_id))


def certificate_names(auth_context: Any) -> frozenset[str]:
    """Common name and host names in a caller's client certificate, which TLS has checked.

    Args:
        auth_context: of a call of grpc.aio, which has no types: name -> list of bytes.
    """
    names = [
        *auth_context.get("x509_common_name", ()),
        *auth_context.get("x509_subject_alternative_name", ()),
    ]
    return frozenset(name.decode("utf-8", "replace") for name in names)


def _parsed(body: Any, signed: pb.Signed) -> Any:  # Any: a message of protobuf
    if len(signed.body) > _MOST_BODY:
        raise Denied(StatusCode.INVALID_ARGUMENT, f"a body has at most {_MOST_BODY:,} bytes")
    try:
        body.ParseFromString(signed.body)
    except DecodeError:
        raise Denied(StatusCode.INVALID_ARGUMENT, "the body is no message of fedsim.v1") from None
    return body


def _old_nonce() -> Denied:
    text = "the nonce is not one of this coordinator, was used, or is too old: say Hello again"
    return Denied(StatusCode.UNAUTHENTICATED, text)

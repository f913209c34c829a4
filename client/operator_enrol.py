"""An operator's first visit: a key is made, the coordinator comes to know it, the address gets a name.

What an admin hands over is a bundle (``fedsim node invite --role operator``): address, identity and
authority of the coordinator, and a token that is good for one enrolment.
"""

from __future__ import annotations

import asyncio
import getpass
import random
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from fedsim.client.operator_link import CALL_SECONDS, channel_to, greet
from fedsim.client.operator_problems import no_answer, not_let_in
from fedsim.client.problems import bad_certificate
from fedsim.client.statuses import BadCertificate, Lost, meaning
from fedsim.connections import Connection, parse_address, write_connection
from fedsim.errors import ConfigError
from fedsim.identity import ENROL, Key
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import FleetStub
from fedsim.schema import shown
from fedsim.storage import unreadable, write_atomically
from fedsim.transport import backoff

_MOST_BYTES = 256 * 1024
PATIENCE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Bundle:
    """What an admin hands over.

    Args:
        server: ``host:port``; server_id: public key of the coordinator, 32 bytes.
        ca: certificates to trust, PEM; empty where the connection is plain text.
        token: for one enrolment.
    """

    server: str
    server_id: bytes
    ca: str
    token: str = field(repr=False)


def read_bundle(path: Path) -> Bundle:
    """Read the bundle of an invitation.

    Raises:
        ConfigError: FS-SRV-032, it is none.
        EnvironmentProblem: FS-ENV-024, it cannot be read.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.loads(file.read(_MOST_BYTES).decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _no_bundle(path, "it is not TOML") from error
    except OSError as error:
        raise unreadable(error, path) from error
    try:
        texts = {key: table.get(key, "") for key in ("server", "server_id", "ca", "token")}
        wrong = next((key for key, value in texts.items() if not isinstance(value, str)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is no text")
        server_id = bytes.fromhex(texts["server_id"])
        if len(server_id) != 32:
            raise ValueError("server_id is no key of 64 hexadecimal digits")
        return Bundle(str(parse_address(texts["server"])), server_id, texts["ca"], texts["token"])
    except ValueError as error:
        raise _no_bundle(path, str(error)) from error


def enrol(
    folder: Path, name: str, bundle: Bundle, *, key: Path | None = None, insecure: bool = False
) -> tuple[Connection, str]:
    """Make the coordinator know this operator, and give it a name in ``connections.toml``.

    Args:
        folder: `connections.home`; a new key lies there as ``NAME.key``.
        name: of the connection.
        key: an existing key to use instead.
        insecure: plain text, on loopback alone.

    Returns:
        The connection and the state of the key: approved or pending.

    Raises:
        CoordinatorProblem: the coordinator cannot be reached or refuses the token.
        ConfigError, EnvironmentProblem: files.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = folder / f"{name}.key" if key is None else key
    if key is None and not own.exists():
        Key.new().save(own)
    ca = None
    if bundle.ca and not insecure:
        ca = folder / f"{name}-ca.pem"
        write_atomically(ca, bundle.ca.encode())
    connection = Connection(bundle.server, ca, own, bundle.server_id, insecure, name)
    state = asyncio.run(_enrol(connection, Key.load(own), bundle.token, PATIENCE_SECONDS))
    write_connection(folder, connection)
    return connection, state


async def _enrol(connection: Connection, key: Key, token: str, patience: float) -> str:
    channel = channel_to(connection)
    fleet: Any = FleetStub(channel)  # type: ignore[no-untyped-call]
    where, rng = str(connection), random.Random()
    try:
        until, tries = time.monotonic() + patience, 0
        while True:
            try:
                hello = await greet(fleet, connection)
                body = pb.EnrolBody(
                    server_id=hello.server_id,
                    nonce=hello.nonce,
                    public_key=key.public,
                    token=token,
                    name=_person(key),
                ).SerializeToString()
                signed = pb.Signed(body=body, signature=key.sign(ENROL, body))
                reply = await fleet.Enrol(signed, timeout=CALL_SECONDS)
                return "pending" if reply.state == pb.PENDING else "approved"
            except grpc.aio.AioRpcError as error:
                trouble = meaning(error)
                match trouble:
                    case BadCertificate():
                        raise bad_certificate(str(trouble), where=where) from error
                    case Lost():
                        tries += 1
                        delay = backoff(tries, rng) if trouble.delay is None else trouble.delay
                        if time.monotonic() + delay > until:
                            raise no_answer(trouble.text, patience, where=where) from error
                        await asyncio.sleep(delay)
                    case _:
                        raise not_let_in(error.details() or "", where=where) from error
    finally:
        await channel.close()


def _person(key: Key) -> str:
    """A name for the list of nodes that nobody else has; one that the invitation fixes wins over it."""
    user = ""
    with suppress(OSError, KeyError, ImportError):
        user = getpass.getuser()
    kept = "".join(c for c in user if c.isascii() and c.isalnum())[:24] or "operator"
    return f"{kept}-{key.node_id[:6]}"


def _no_bundle(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{shown(path.name)} is no enrolment bundle",
        code="FS-SRV-032",
        where=str(path),
        why=why,
        hint="ask for a new one: fedsim node invite --role operator --out FILE",
    )

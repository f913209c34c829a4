"""Messages between a client and its worker: a JSON header, then raw payloads, over one pipe.

``Connection.send`` would pickle; here only bytes cross, so that nothing which came over the network is
ever unpickled in either process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

Header = dict[str, Any]  # Any: what JSON holds
Payload = bytes | memoryview


def send(connection: Connection, header: Header, payloads: Sequence[Payload] = ()) -> None:
    """Send one message; blocks until the other side has taken it.

    Raises:
        OSError: the other side is gone.
    """
    connection.send_bytes(json.dumps({**header, "payloads": len(payloads)}).encode())
    for payload in payloads:
        connection.send_bytes(payload)


def receive(connection: Connection) -> tuple[Header, list[bytes]]:
    """The next message; blocks until it is there.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    header: Header = json.loads(connection.recv_bytes())
    return header, [connection.recv_bytes() for _ in range(header.pop("payloads"))]

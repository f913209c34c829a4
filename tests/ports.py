"""Ports of the loopback for servers that go away and come back in a test."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import suppress

FIRST, EACH, PARTS = 20_000, 500, 24
"""Below those that the system gives out by itself, one of which somebody gets while its server is away."""


def _own() -> Iterator[int]:
    """The ports of this test process, again and again; other processes of the same tests have others."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST + worker % PARTS * EACH
    # Tests of another checkout begin elsewhere.
    return itertools.cycle(first + (os.getpid() + number) % EACH for number in range(EACH))


_ports = _own()


def free_port() -> int:
    """A port of the loopback that nobody uses now, and nobody gets by chance."""
    for port in itertools.islice(_ports, EACH):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError(f"all {EACH} ports of this process are taken")

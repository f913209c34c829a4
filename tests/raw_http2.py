"""Connections that no library would make: HTTP/2 frames by hand, as much of it as an attacker needs."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, SETTINGS, PING, GOAWAY, CONTINUATION = 1, 4, 6, 7, 9
SECONDS = 30.0


def frame(kind: int, stream: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    """One frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header(name: bytes, value: bytes, *, indexed: bool = False) -> bytes:
    """A header field in HPACK without Huffman coding; `indexed` puts it into the table of the connection."""
    return bytes([0x40 if indexed else 0]) + _text(name) + _text(value)


def _text(content: bytes) -> bytes:
    if len(content) < 127:
        return bytes([len(content)]) + content
    rest, found = len(content) - 127, bytearray([127])
    while rest >= 128:
        found.append(rest % 128 | 128)
        rest //= 128
    return bytes([*found, rest]) + content


CALL = b"".join(
    header(name, value)
    for name, value in (
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/fedsim.v1.Fleet/Hello"),
        (b":authority", b"localhost"), (b"te", b"trailers"), (b"content-type", b"application/grpc"),
    )
)  # fmt: skip
"""The headers with which a call begins."""


class RawConnection:
    """A TCP connection to ``HOST:PORT``; use it in a ``with`` block."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=SECONDS)
        self.sent = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def begin(self) -> None:
        """Say what HTTP/2 says first."""
        self.send(PREFACE + frame(SETTINGS))

    def send(self, content: bytes) -> bool:
        """Send it all; False where the other side has closed, or does not read for `SECONDS`."""
        try:
            self.socket.sendall(content)
        except OSError:
            return False
        self.sent += len(content)
        return True

    def flood(self, content: bytes, most: int) -> bool:
        """Send `content` again and again, `most` bytes of it; False where the other side ended that."""
        target = self.sent + most
        while self.sent < target:
            if not self.send(content):
                return False
        return True

    def last_words(self) -> bytes:
        """What the other side sends until it closes the connection; fails where it does not close it."""
        found = b""
        with suppress(ConnectionResetError):
            while received := self.socket.recv(1 << 16):
                found += received
        return found

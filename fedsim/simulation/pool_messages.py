"""What a pool and its workers say to each other: small JSON over a socket, with file numbers beside it.

Tensors never pass here, they lie in shared memory (`fedsim.simulation.shared`).
"""

from __future__ import annotations

import builtins
import json
import logging
import socket
import struct
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from fedsim import errors
from fedsim.errors import FedsimError
from fedsim.training.work import ClientFailed

Words = dict[str, Any]  # what JSON holds

_LENGTH = struct.Struct("<I")
_MOST_FILES = 64
_LONGEST_LINE = 2000
_MOST_LINES = 100


def send(to: socket.socket, words: Words, files: Sequence[int] = ()) -> None:
    """Send one message, with copies of open files.

    Raises:
        OSError: the other side is gone.
    """
    text = json.dumps(words).encode()
    prefix = _LENGTH.pack(len(text))
    if files:
        socket.send_fds(to, [prefix], list(files))
        to.sendall(text)
    else:
        to.sendall(prefix + text)


def receive(source: socket.socket) -> tuple[Words, list[int]]:
    """The next message and its files; blocks until it is there.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    prefix, files, _, _ = socket.recv_fds(source, _LENGTH.size, _MOST_FILES)
    prefix += _exactly(source, _LENGTH.size - len(prefix)) if prefix else b""
    if not prefix:
        raise EOFError
    words: Words = json.loads(_exactly(source, *_LENGTH.unpack(prefix)))
    return words, list(files)


def _exactly(source: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = source.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class WorkerTraceback(Exception):
    """Where an error began, in another process; the cause of the error that is raised here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def told(error: Exception) -> Words:
    """An error as words."""
    words: Words = {
        "class": type(error).__name__,
        "text": str(error),
        "args": [part if isinstance(part, str | int | float | None) else str(part) for part in error.args],
        "traceback": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, FedsimError):
        words |= {name: getattr(error, name) for name in ("what", "code", "where", "why", "hint")}
    if isinstance(error, ClientFailed):
        words |= {"client": error.client, "reason": error.reason}
    return words


def untold(words: Words) -> Exception:
    """The error again: of its class where that is one of Python's or fedsim's own, else a RuntimeError."""
    error: Exception
    if "client" in words:
        error = ClientFailed(words["client"], words["reason"])
    elif "code" in words:
        kind = getattr(errors, words["class"], FedsimError)
        error = kind(words["what"], **{name: words[name] for name in ("code", "where", "why", "hint")})
    elif words["class"] == "OutOfMemoryError":
        error = torch.OutOfMemoryError(words["text"])
    else:
        error = RuntimeError(f"{words['class']}: {words['text']}")
        kind = getattr(builtins, words["class"], None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            with suppress(TypeError):
                error = kind(*words["args"])
    error.__cause__ = WorkerTraceback(words["traceback"])
    return error


class Overheard(logging.Handler):
    """Keeps what is logged in a worker until it is told to the pool, which logs it in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[list[Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.lines) < _MOST_LINES:
            text = self.format(record)[:_LONGEST_LINE]
            self.lines.append([record.name, record.levelno, text])

    def taken(self) -> list[list[Any]]:
        """The lines since the last call."""
        lines, self.lines = self.lines, []
        return lines


def log_again(lines: Sequence[Sequence[Any]], pid: int) -> None:
    """Log what a worker had logged."""
    for name, level, text in lines:
        logging.getLogger(name).log(level, "worker=%d %s", pid, text)

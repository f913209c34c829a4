"""The log of a coordinator: one JSON object per line for machines, one plain line on a terminal.

    {"ts": "2025-01-31T14:05:07.123Z", "level": "info", "event": "committed", "run": "1f0c…", "round": 12}

Code logs as usual, ``log.info("committed", extra=fields(run=run_id, round=12, dur_ms=41))``. Names and
texts of others are written so that they cannot forge a line or steer a terminal, and what looks like a
ticket, a token or a key is masked whoever logged it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from fedsim.printable import printable

if TYPE_CHECKING:
    from fedsim.server.board import OpenTask

FIELDS = ("run", "round", "node", "task", "dur_ms")
"""Keys of a line beside ``ts``, ``level`` and ``event``, in this order."""
MASK = "[masked]"
_LONGEST = 8_000
_MOST_TRACE = 32_000

# NAME=VALUE, NAME: VALUE and "NAME": "VALUE" of a name that stands for a secret; a path is none.
_NAMED = re.compile(
    r"""(?ix)
    \b(?P<name> (?:[a-z_]*_)? (?:ticket|token|secret|password|passwd|passphrase|private_key|api_key)
      | authorization | fedsim-ticket-bin | bundle_token )
    (?P<between> ["']? \s* [=:] \s* (?:bearer\s+)? )
    (?P<value> b?"[^"]*" | b?'[^']*' | [^\s,;)\]}]+ )
    """
)
_SECRETS = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?i)(?<=bearer )\s*[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?<=://)[^/\s:@]*:[^@\s]+(?=@)"),  # user:password of an address
    # Raw bytes in a text are never wanted there: identifiers are logged as hex.
    re.compile(r"""b(?:'(?:[^'\\]|\\.){16,}'|"(?:[^"\\]|\\.){16,}")"""),
)


def fields(**values: object) -> dict[str, object]:
    """`values` as ``extra`` of a log call: any of `FIELDS`; bytes become hex."""
    unknown = set(values) - set(FIELDS)
    if unknown:
        raise TypeError(f"no such field of a log line: {', '.join(sorted(unknown))}")
    return {name: v.hex() if isinstance(v, bytes) else v for name, v in values.items()}


def task_fields(task: OpenTask) -> dict[str, object]:
    """A task as ``extra`` of a log call."""
    return fields(run=task.run_id, round=task.round_index + 1, node=task.node_id, task=task.task_id)


def redacted(text: str) -> str:
    """`text` with everything masked that looks like a ticket, a token, a password or a private key."""
    for pattern in _SECRETS:
        text = pattern.sub(MASK, text)
    return _NAMED.sub(_masked, text)


def _masked(match: re.Match[str]) -> str:
    value = match["value"].strip("\"'")
    # A file that holds a secret may be named, and a number is a duration or a count.
    if (
        value.startswith(("/", "./", "~", MASK))
        or value in ("None", "")
        or re.fullmatch(r"[\d.]{1,8}", value)
    ):
        return match[0]
    return f"{match['name']}{match['between']}{MASK}"


class JsonLines(logging.Formatter):
    """One JSON object of ASCII per record."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "ts": stamp.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": _text(record),
        }
        line |= _extra(record)
        line["logger"] = record.name
        if record.exc_info:
            line["error"] = redacted("".join(traceback.format_exception(*record.exc_info)))[-_MOST_TRACE:]
        return json.dumps(line, allow_nan=False)


class Lines(logging.Formatter):
    """``14:05:07 INFO    round committed  run=digits round=12``, for people."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        parts = [f"{clock} {record.levelname:<7} {printable(_text(record))}"]
        parts += [f"{name}={printable(str(value))}" for name, value in _extra(record).items()]
        line = "  ".join([parts[0], " ".join(parts[1:])]).rstrip()
        if record.exc_info:
            trace = redacted("".join(traceback.format_exception(*record.exc_info)))[-_MOST_TRACE:]
            line += "".join(f"\n    {printable(each)}" for each in trace.splitlines())
        return line


def _text(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # arguments that do not fit: the line is not lost for it
        text = str(record.msg)
    return redacted(text[:_LONGEST])


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    given: Mapping[str, Any] = vars(record)
    found = {name: given[name] for name in FIELDS if given.get(name) is not None}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: object) -> object:
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, bytes):
        return value.hex()
    return redacted(str(value)[:_LONGEST])


def start_logging(form: str, level: str, *, stream: TextIO | None = None) -> logging.Handler:
    """Send the log of this process to `stream`, by default stderr.

    Args:
        form: ``json``, ``text``, or ``auto`` for text on a terminal.
        level: least severe that is written: ``debug`` … ``error``.
    """
    out = sys.stderr if stream is None else stream
    text = form == "text" or (form == "auto" and out.isatty())
    handler = logging.StreamHandler(out)
    handler.setFormatter(Lines() if text else JsonLines())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("fedsim").setLevel(level.upper())
    logging.captureWarnings(True)
    return handler


def stop_logging(handler: logging.Handler) -> None:
    """Undo `start_logging`."""
    logging.getLogger().removeHandler(handler)
    logging.captureWarnings(False)
    handler.close()

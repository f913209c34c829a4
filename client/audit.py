"""What a client refused and why, for its owner: JSON lines, each with the digest of the line before.

A line that was changed or removed later breaks the chain from there on.
"""

from __future__ import annotations

import hashlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path

from fedsim.storage import append_whole, unreadable

START = "0" * 64
_MOST_TEXT = 1_000


class Audit:
    """The audit file of a client.

    Args:
        path: made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = _last_digest(path)

    def write(self, action: str, **fields: str) -> None:
        """Add one line.

        Raises:
            EnvironmentProblem: it cannot be written.
        """
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        cut = {name: text[:_MOST_TEXT] for name, text in fields.items()}
        line = json.dumps({"time": now, "action": action, **cut, "before": self._last}).encode()
        append_whole(self.path, line + b"\n")
        self._last = hashlib.sha256(line).hexdigest()


def broken_at(path: Path) -> int | None:
    """Number of the first line (from 1) that does not follow from the one before; None where all do."""
    before = START
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if json.loads(line)["before"] != before:
                return number
        except (ValueError, KeyError, TypeError):
            return number
        before = hashlib.sha256(line).hexdigest()
    return None


def _last_digest(path: Path) -> str:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return START
    except OSError as error:
        raise unreadable(error, path) from error
    return hashlib.sha256(lines[-1]).hexdigest() if lines else START

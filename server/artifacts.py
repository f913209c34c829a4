"""Files of a run that operators may fetch: which names there are, and where they lie.

A name is a word of a list or a file below one of two folders. It is matched against a pattern before it
comes near a path, and what it leads to must be a regular file inside the run's folder: a link that points
out of it is not followed.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from grpc import StatusCode

from fedsim.server.calls import Refused

FILES = frozenset({
    "clients.jsonl", "config.toml", "journal.jsonl", "log.txt", "manifest.json", "metrics.jsonl",
    "report.html", "rounds.csv",
})  # fmt: skip
"""Files that lie in the run's folder itself."""
FOLDERS = ("checkpoints", "plots")
"""Folders whose files may be fetched; ``state`` is not among them: it holds what clients sent."""
_NAME = re.compile(r"(?:(?P<folder>[a-z]{1,20})/)?(?P<file>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})")


def open_artifact(folder: Path, name: str) -> tuple[BinaryIO, int]:
    """The file that `name` stands for, opened, and its size in bytes.

    Args:
        folder: of the run.
        name: ``final``, ``best`` or ``latest`` for a model; else a name such as ``metrics.jsonl`` or
            ``checkpoints/round-00005.safetensors``.

    Raises:
        Refused: INVALID_ARGUMENT, no such name can be; NOT_FOUND, there is no such file now.
    """
    inside = _inside(folder, name)
    if inside is None:
        text = "an artifact is final, best, metrics.jsonl … or a file of checkpoints/ or plots/"
        raise Refused(StatusCode.INVALID_ARGUMENT, text)
    path = folder / inside
    try:
        # The last part must be no link; of the folder before it the real path is compared.
        if path.parent.resolve() != (folder.resolve() / Path(inside).parent):
            raise FileNotFoundError
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Refused(StatusCode.NOT_FOUND, f"the run has no {inside} now") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise Refused(StatusCode.NOT_FOUND, f"the run has no {inside} now")
    return os.fdopen(handle, "rb"), found.st_size


def _inside(folder: Path, name: str) -> str | None:
    if name in ("final", "best"):
        return f"checkpoints/{name}.safetensors"
    if name == "latest":
        saved = sorted((folder / "checkpoints").glob("round-*.safetensors"))
        return f"checkpoints/{saved[-1].name}" if saved else "checkpoints/final.safetensors"
    match = _NAME.fullmatch(name)
    if match is None or ".." in name:
        return None
    if match["folder"] is None:
        return name if name in FILES else None
    return name if match["folder"] in FOLDERS else None


def lines_from(path: Path, offset: int, *, longest: int, most: int) -> list[tuple[str, int]]:
    """Whole lines of a text file behind `offset`, each with the offset behind it.

    Args:
        longest: bytes of a line; the rest of a longer one is left out.
        most: lines that are given at a time.
    """
    found: list[tuple[str, int]] = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return found
    with file:
        file.seek(offset)
        while len(found) < most:
            kept = line = file.readline(longest)
            while line and not line.endswith(b"\n"):
                # The writer may have gone on between two reads: what is read belongs to this line.
                line = file.readline(longest)
                kept = (kept + line)[:longest]
            if not line:
                break  # the end, or a line whose rest is still being written
            found.append((kept.rstrip(b"\r\n").decode("utf-8", "replace"), file.tell()))
    return found

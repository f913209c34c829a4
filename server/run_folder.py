"""The run folder of a coordinator's run: the same files as a simulation's, and the journal.

The lines of a window are appended, and synced, before the window is committed; its row in the ledger says
how long the files were then. Whatever a crash left behind that is cut off again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from fedsim.journal import Entry
from fedsim.runs.folder import CLIENTS, METRICS, RunFolder
from fedsim.storage import append_whole, sync_file

JOURNAL = "journal.jsonl"
FILES = (METRICS, CLIENTS, JOURNAL)


def append_journal(folder: RunFolder, entries: Iterable[Entry]) -> None:
    """Add entries of the journal to the folder.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022.
    """
    text = "".join(f"{entry.line}\n" for entry in entries)
    if text:
        append_whole(folder.path / JOURNAL, text.encode())


def journalled(folder: RunFolder) -> int:
    """Number of the last entry in the folder's journal, 0 of none."""
    path = folder.path / JOURNAL
    if not path.exists() or not path.stat().st_size:
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        last = file.read().splitlines()[-1]
    return int(json.loads(last)["seq"])


def lengths(folder: RunFolder) -> dict[str, int]:
    """Bytes of the line files, after they reached the disk."""
    for name in FILES:
        sync_file(folder.path / name)
    return {name: _size(folder.path / name) for name in FILES}


def cut_back(folder: RunFolder, lengths: dict[str, int], records: Iterable[str]) -> None:
    """The line files as they were at a commit.

    Args:
        lengths: from `lengths`, {} before any commit.
        records: lines of ``metrics.jsonl`` by the ledger, put back where the disk lost them.
    """
    for name in FILES:
        path, size = folder.path / name, lengths.get(name, 0)
        if _size(path) > size:
            os.truncate(path, size)
    if _size(folder.path / METRICS) < lengths.get(METRICS, 0):
        os.truncate(folder.path / METRICS, 0)
        for record in records:
            folder.append_record(json.loads(record))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

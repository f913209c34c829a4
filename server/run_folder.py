"""The run folder of a coordinator's run: the same files as a simulation's, and the journal.

The lines of a window are appended, and synced, before the window is committed; its row in the ledger says
how long the files were then. Whatever a crash left behind that is cut off again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedsim.federated_run import FederatedRun
from fedsim.journal import Entry
from fedsim.progress import Progress
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


def complete(folder: RunFolder, run: FederatedRun, progress: Progress, state: str, detail: str) -> None:
    """The files of a run that is over: its final model, its summary and its report.

    Args:
        run: as far as it was taken up; state, detail: how it ended.
    """
    done = 0
    if hasattr(run, "federation"):
        folder.save_model(run.model_tensors(copy=False), "final")
        done = run.federation.state.round_index
    outcome: dict[str, Any] = {
        "outcome": state,
        "rounds": done,
        "final": progress.final,
        "best": progress.best,
        "seconds": run.federation.state.clock if done else 0.0,
    }
    if state == "failed":
        outcome["error"] = {"code": detail.partition(":")[0], "what": detail, "why": ""}
    folder.finish(outcome)
    if run.config.output.report:
        from fedsim.runs.report import write_report

        write_report(folder, data=run.data, client_evaluation=None)

"""What a client keeps between its answers, by run and by the task after which it was kept.

A state becomes current when the coordinator says so: a later task names the task whose answer was folded
last. Until then it is pending, and the one before it still counts, so that an answer that was lost or
refused leaves client and coordinator agreeing. Two folded states are kept, for a coordinator that falls
back by one checkpoint, and the pending ones after them.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path

from fedsim.storage import problem, sync_file, sync_folder

FOLDED = 2
PENDING = 4
"""An asynchronous run may ask again before it has folded an answer; older answers than these are lost."""


class StateLost(Exception):
    """The state after a folded task is not here: another machine has it, or the folder was lost."""


class ClientStates:
    """States of one client, ``ROOT/RUN/TASK.safetensors``.

    Args:
        root: an existing folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def current(self, run_id: str, last_folded: bytes) -> Path | None:
        """The state to train from; what can no longer be needed is deleted.

        Args:
            last_folded: the task that the coordinator names; empty for the fresh state.

        Returns:
            None for the fresh state: the client never kept anything, or nothing of it was folded.

        Raises:
            StateLost: this client kept states, and that of `last_folded` is not among them.
        """
        order, folded = self._read(run_id)
        if not last_folded or not order:
            return None
        name = last_folded.hex()
        if name not in order:
            raise StateLost(name)
        if name not in folded:
            self._settle(run_id, order, [*folded, name])
        return self._file(run_id, name)

    def keep(self, run_id: str, task_id: bytes, file: Path) -> None:
        """Take over `file` as the pending state after `task_id`, safely on disk.

        Raises:
            EnvironmentProblem: FS-ENV-020 … 022.
        """
        order, folded = self._read(run_id)
        name = task_id.hex()
        place = self._file(run_id, name)
        try:
            place.parent.mkdir(exist_ok=True)
            sync_file(file)
            os.replace(file, place)
            sync_folder(place.parent)
        except OSError as error:
            raise problem(error, place) from error
        order = [*(n for n in order if n != name), name]
        self._settle(run_id, order, folded)

    def drop(self, run_id: str, task_id: bytes) -> None:
        """Forget the pending state after a task whose answer does not count."""
        order, folded = self._read(run_id)
        name = task_id.hex()
        if name in order and name not in folded:
            self._settle(run_id, [n for n in order if n != name], folded)

    def _settle(self, run_id: str, order: list[str], folded: list[str]) -> None:
        """Keep what may be needed, delete the rest, write the order down."""
        folded = folded[-FOLDED:]
        newest = max((order.index(name) for name in folded if name in order), default=-1)
        pending = [name for name in order[newest + 1 :] if name not in folded][-PENDING:]
        kept = [name for name in order if name in folded] + pending
        self._write(run_id, kept, [name for name in folded if name in kept])
        for name in order:
            if name not in kept:
                self._delete(run_id, name)
        for file in self._folder(run_id).glob("*.safetensors"):
            if file.stem not in kept:
                self._delete(run_id, file.stem)

    def _read(self, run_id: str) -> tuple[list[str], list[str]]:
        """Tasks in the order in which their states were kept, and those of them that were folded."""
        folder = self._folder(run_id)
        if not folder.is_dir():
            return [], []
        files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        there = [file.stem for file in files]
        try:
            index = json.loads((folder / "order.json").read_bytes())
            order, folded = list(index["order"]), list(index["folded"])
        except (OSError, ValueError, KeyError, TypeError):
            return there, []  # the times of the files say it nearly as well
        known = [name for name in order if name in there]
        return known + [name for name in there if name not in known], [n for n in folded if n in known]

    def _write(self, run_id: str, order: list[str], folded: list[str]) -> None:
        place = self._folder(run_id) / "order.json"
        unfinished = place.with_name(f".order-{secrets.token_hex(4)}")
        try:
            unfinished.write_text(json.dumps({"order": order, "folded": folded}), encoding="utf-8")
            os.replace(unfinished, place)
        except OSError as error:
            raise problem(error, place) from error

    def _folder(self, run_id: str) -> Path:
        return self._root / run_id

    def _file(self, run_id: str, name: str) -> Path:
        return self._folder(run_id) / f"{name}.safetensors"

    def _delete(self, run_id: str, name: str) -> None:
        with suppress(OSError):
            self._file(run_id, name).unlink(missing_ok=True)

"""CPU seconds and memory of a process and all that it has started, read from ``/proc`` (Linux)."""

from __future__ import annotations

import os
import threading
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` after the name; the first is the state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def members(root: int) -> list[int]:
    """`root` and every living process below it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(_stat(int(entry))[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def cpu_seconds(root: int) -> float:
    """Processor time of the tree so far, user and system, with that of processes that were waited for."""
    total = 0
    for pid in members(root):
        try:
            fields = _stat(pid)
        except OSError:
            continue
        total += sum(int(fields[place]) for place in (11, 12, 13, 14))
    return total / TICK


def pss_bytes(root: int) -> int:
    """Proportional set size of the tree: a page that k processes share counts as a k-th for each."""
    total = 0
    for pid in members(root):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        sizes = [line.split()[1] for line in text.splitlines() if line.startswith("Pss:")]
        total += sum(int(size) << 10 for size in sizes)
    return total


class PeakMemory:
    """Samples the PSS of a tree in a thread, and keeps the most.

    Reading it takes a lock of the process that is read, so nothing is timed meanwhile.
    """

    def __init__(self, root: int, seconds: float = 0.02) -> None:
        self.root, self.seconds = root, seconds
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.is_set():
            self.peak = max(self.peak, pss_bytes(self.root))
            self._over.wait(self.seconds)

"""What a process takes, and how results are shown and kept."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from fedsim import __version__

MIB = 1 << 20


class Memory(NamedTuple):
    """Resident bytes of a process.

    Args:
        total: RSS; anonymous: of it, memory of its own; file: pages of mapped files, which the kernel can
            take back.
    """

    total: int
    anonymous: int
    file: int


def memory(pid: int) -> Memory:
    """Resident memory of a process, now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)
             if name in ("VmRSS", "RssAnon", "RssFile", "RssShmem")}  # fmt: skip
    return Memory(found["VmRSS"], found["RssAnon"], found["RssFile"] + found["RssShmem"])


def forget_peak(pid: int) -> None:
    """The kernel measures the most resident memory of a process (`peak`) from here on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pid: int) -> int:
    """Most resident bytes of a process since `forget_peak`, counted by the kernel without sampling."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (most,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(most) << 10


def descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Samples the memory of a process in a thread, and keeps the peak of each phase.

    Args:
        pid: of the process; seconds: between two samples.
    """

    def __init__(self, pid: int, seconds: float = 0.005) -> None:
        self.pid, self.seconds = pid, seconds
        self.peaks: dict[str, Memory] = {}
        self.grown: dict[str, int] = {}  # phase -> most RSS above that at its beginning
        self._phase = "", 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def enter(self, phase: str) -> None:
        """The samples from now on belong to this phase; to none if it is empty."""
        self._phase = phase, memory(self.pid).total if phase else 0

    def _sample(self) -> None:
        while not self._over.wait(self.seconds):
            phase, start = self._phase
            if phase:
                now, most = memory(self.pid), self.peaks.get(phase, Memory(0, 0, 0))
                self.peaks[phase] = Memory(*(max(pair) for pair in zip(now, most, strict=True)))
                self.grown[phase] = max(self.grown.get(phase, 0), now.total - start)


def machine() -> dict[str, Any]:
    """Facts without which numbers say nothing."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    return {
        "fedsim": __version__,
        "python": platform.python_version(),
        "grpc": grpc.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "load_before": round(os.getloadavg()[0], 2),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of text, as Markdown."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * w for w in widths) + " |", *lines[1:]])


def keep(path: Path | None, module: str, result: dict[str, Any]) -> None:
    """Write a result as JSON beside the module that made it, or to `path`."""
    path = path or Path(module).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def disk_bytes_per_second(folder: Path, size: int = 100 * MIB) -> float:
    """How fast a file gets onto the disk: written and synced every 8 MiB."""
    path, block = folder / "disk-rate", os.urandom(MIB)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for number in range(size // MIB):
            file.write(block)
            if number % 8 == 7:
                os.fdatasync(file.fileno())
        os.fdatasync(file.fileno())
    spent = time.perf_counter() - began
    path.unlink()
    return size / spent

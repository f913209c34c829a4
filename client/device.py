"""The device that a client trains on, and what it has of memory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from fedsim.client.job import DeviceFacts
from fedsim.errors import EnvironmentProblem

_CGROUP = Path("/sys/fs/cgroup")


def resolve(name: str) -> str:
    """The device behind ``cpu``, ``cuda``, ``cuda:1`` or ``auto``.

    Raises:
        EnvironmentProblem: FS-CLI-051, there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _missing(name, str(error).splitlines()[0]) from error
    if device.type not in ("cpu", "cuda"):
        raise _missing(name, "clients train on a CPU or a CUDA GPU")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise _missing(name, f"torch {torch.__version__} finds {count} GPUs")
    return str(device)


def facts(name: str) -> DeviceFacts:
    """Facts of a resolved device. Asking a GPU opens a context on it: for the worker only."""
    if name == "cpu":
        return DeviceFacts(name, _processor(), free_memory())
    free, _ = torch.cuda.mem_get_info(name)
    return DeviceFacts(name, torch.cuda.get_device_name(name), int(free))


def free_memory() -> int:
    """Bytes that this process could still take: what the machine has free, or the limit of its
    container where that is less; 0 where the system does not say."""
    free = 0
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    if not free and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        free = min(free, max(limit - used, 0)) if free else max(limit - used, 0)
    return free


def _processor() -> str:
    with suppress(OSError, StopIteration, IndexError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    return "cpu"


def _missing(name: str, why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"there is no device {name!r} to train on",
        code="FS-CLI-051",
        where="--device",
        why=why,
        hint="use --device cpu, or auto for a GPU where there is one",
    )

"""What was run, with what, on what: the facts of ``manifest.json``.

No user name, host name or home folder goes in: paths below the home folder begin with ``~``, and of
the program only its name is kept.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fedsim import registry
from fedsim.storage import sha256

SCHEMA = 1
Facts = dict[str, Any]  # Any: JSON

_NOT_DIGESTED = ("state", "exports", "tb")
_CHANGING = {"manifest.json", "log.txt", ".lock"}


def now() -> str:
    """The time in UTC, to the microsecond, so that runs sort by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def first(
    name: str, folder: str, *, config_text: str, facts: Mapping[str, Any], command: Sequence[str]
) -> Facts:
    """The manifest of a run that begins."""
    return {
        "schema": SCHEMA,
        "run": {"name": name, "folder": folder},
        "outcome": "running",
        "started": now(),
        "ended": None,
        "result": None,
        "sessions": [session(command)],
        "seeds": seeds(config_text),
        "facts": dict(facts),
        "software": software(),
        "hardware": hardware(),
        "git": git(Path.cwd()),
        "files": {},
    }


def session(command: Sequence[str]) -> Facts:
    """One stretch of a run: from its start or resumption to its end."""
    return {"command": portable(command), "started": now(), "ended": None, "outcome": "running"}


def portable(command: Sequence[str]) -> list[str]:
    """A command line without the folder of its program and without the home folder."""
    if not command:
        return []
    home = str(Path.home())
    words = [Path(command[0]).name, *command[1:]]
    return [w.replace(home + os.sep, "~" + os.sep) for w in words] if len(home) > 1 else words


def seeds(config_text: str) -> Facts:
    """The seeds named in a resolved configuration."""
    config = tomllib.loads(config_text)
    partition = config.get("data", {}).get("partition", {})
    found = {"run": config.get("run", {}).get("seed"), "partition": partition.get("seed")}
    return {name: seed for name, seed in found.items() if seed is not None}


def software() -> Facts:
    """Versions of Python, of fedsim, of what it depends on and of the plugins installed beside it."""
    import torch

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": packages(),
        "torch": {
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "commit": torch.version.git_version,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "mkl": bool(torch.backends.mkl.is_available()),  # type: ignore[no-untyped-call]
            "threads": torch.get_num_threads(),
        },
    }


def packages() -> dict[str, str]:
    """Installed versions, by name: fedsim, its dependencies, and whoever registers plugins for it."""
    wanted = {"fedsim"}
    try:
        needs = metadata.requires("fedsim") or ()
        used = [need for need in needs if not re.search(r"extra == .dev\b", need)]
        wanted |= {re.split(r"[^A-Za-z0-9._-]", need)[0] for need in used}
    except metadata.PackageNotFoundError:
        wanted |= {"torch", "numpy"}  # run from its source tree, without an installation
    wanted |= registry.distributions()
    versions: dict[str, str] = {}
    for name in sorted(wanted, key=str.lower):
        try:
            versions[name] = _version(metadata.distribution(name))
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    return versions


def _version(installed: metadata.Distribution) -> str:
    """The version in the head of a distribution's metadata, which by itself reads a whole manual too."""
    head = (installed.read_text("METADATA") or "").partition("\n\n")[0]
    found = re.search(r"^Version: *(\S+) *$", head, re.MULTILINE)
    return found[1] if found else installed.version


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> Facts:
    """Processor, cores that this process may use, memory in bytes, accelerators."""
    import torch

    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_bytes": memory,
        "accelerators": [torch.cuda.get_device_name(d) for d in devices],
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    if sys.platform == "darwin":
        asked = _answer(["sysctl", "-n", "machdep.cpu.brand_string"], Path("/"))
        if asked:
            return asked
    return platform.processor() or platform.machine()


def git(folder: Path) -> Facts | None:
    """Commit of the repository that `folder` lies in and whether tracked files differ from it.

    None outside a repository, without git, or before the first commit.
    """
    commit = _answer(["git", "rev-parse", "--verify", "HEAD"], folder)
    if not commit:
        return None
    changes = _answer(["git", "status", "--porcelain", "--untracked-files=no"], folder)
    return {"commit": commit, "modified": None if changes is None else bool(changes)}


def _answer(command: list[str], folder: Path) -> str | None:
    """What a program prints, None when it is not there, fails or takes longer than ten seconds."""
    program = shutil.which(command[0])
    if program is None:
        return None
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a run, by path relative to its folder, in order of path.

    Left out: the manifest itself, the log (which goes on after the end), state and exports.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    names = {p.relative_to(folder).as_posix(): p for p in files}
    return {
        name: sha256(path)
        for name, path in names.items()
        if name not in _CHANGING and name.split("/")[0] not in _NOT_DIGESTED
        and not path.name.startswith(".writing-")
    }  # fmt: skip


def changed_files(folder: Path, digests: Mapping[str, str]) -> dict[str, str]:
    """Files that are not what the manifest says: ``{"metrics.jsonl": "changed"}`` or ``"missing"``."""
    found = file_digests(folder)
    return {
        name: "changed" if name in found else "missing"
        for name, digest in digests.items()
        if found.get(name) != digest
    }

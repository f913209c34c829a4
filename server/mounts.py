"""Which file systems are shared over a network: SQLite's write-ahead log must not lie there.

Its index is memory that all processes share, and a network file system shares no memory between
machines: two coordinators would both believe that they hold the lock, and the file would be damaged.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

SHARED = frozenset({
    "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs2", "glusterfs", "gpfs", "lustre",
    "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "prl_fs", "pvfs2", "smb2", "smb3", "smbfs",
    "vboxsf",
})  # fmt: skip
"""Types that another machine may have mounted at the same time."""
SHARED_BY_PROGRAM = frozenset({
    "ceph", "davfs", "gcsfuse", "glusterfs", "goofys", "juicefs", "mfs", "rclone", "s3fs", "seaweedfs",
    "smbnetfs", "sshfs",
})  # fmt: skip
"""The same for ``fuse.TYPE``."""

_MOUNTS = Path("/proc/mounts")


def mounts() -> str:
    """The mounts of this machine, in the format of ``/proc/mounts``; empty where there is no such file."""
    try:
        return _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def shared_file_system(folder: Path, mounted: str) -> str | None:
    """The type of the network file system that holds `folder`, or None where it is a local one.

    Args:
        folder: exists; links in it are followed.
        mounted: what `mounts` gave.
    """
    place = PurePosixPath(folder.resolve().as_posix())
    best, found = -1, ""
    for line in mounted.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        top = PurePosixPath(_unescaped(fields[1]))
        depth = len(top.parts)
        # Of two mounts on one place the later covers the earlier.
        if depth >= best and place.is_relative_to(top):
            best, found = depth, fields[2]
    program = found.removeprefix("fuse.") if found.startswith("fuse.") else None
    shared = program in SHARED_BY_PROGRAM if program is not None else found in SHARED
    return found if shared else None


def _unescaped(text: str) -> str:
    """Blanks and backslashes stand there as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)

"""The folder where decoded data are kept, and the files in it.

There is one place: the environment variable ``FEDSIM_CACHE``, else ``$XDG_CACHE_HOME/fedsim``, else
``~/.cache/fedsim``. Everything in it can be deleted at any time.

One entry is one safetensors file, ``datasets/<name>-<key>.safetensors``. The key is a digest of the
source's content, of how it was decoded and of `FORMAT`, so an entry is never updated: another
source is another entry. It is written beside its place and renamed, so a reader sees all of it or
nothing, and two runs that decode the same data at once do no harm.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedsim.errors import EnvironmentProblem

FORMAT = 1
"""Version of the entries' layout; part of every key."""

_log = logging.getLogger(__name__)


def folder() -> Path:
    """The cache folder; not created by asking for it."""
    named = os.environ.get("FEDSIM_CACHE")
    if named:
        return Path(named).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "fedsim"


def key(*parts: str) -> str:
    """A key of 32 hexadecimal digits from everything an entry depends on."""
    text = "\0".join((f"fedsim cache {FORMAT}", *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def entry(name: str, entry_key: str) -> Path:
    """Where the entry of data set `name` with this key lies, whether or not it exists."""
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
    return folder() / "datasets" / f"{plain}-{entry_key}.safetensors"


def fetch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors (mapped into memory, private to the process) and metadata, or None when absent.

    An entry that cannot be read counts as absent, with a warning: what it held can be decoded again.
    Whether its content is the content once written is for the caller to check by digest.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return tensors, dict(stored.metadata() or {})
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        _log.warning("cache=%s unreadable=%s action=decode-again", path, error)
        return None


def store(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write an entry, whole or not at all.

    Raises:
        EnvironmentProblem: FS-DAT-030, the folder cannot be written or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        os.close(handle)
        save_file(dict(tensors), unfinished, metadata=dict(metadata))
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        raise EnvironmentProblem(
            "decoded data cannot be written to the cache",
            code="FS-DAT-030",
            where=str(path.parent),
            why=f"{size / 2**20:.0f} MiB are needed; {error}",
            hint="free some space, point FEDSIM_CACHE at another folder, or set data.cache = false",
        ) from error

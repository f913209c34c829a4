"""Fetching a data set's parquet files from the Hugging Face hub, or from a mirror of it.

`huggingface_hub` does the transfer, its cache and its environment variables are honoured:
``HF_ENDPOINT`` for a mirror, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_HOME``. The files are then read
by our own decoder; the `datasets` library would build a second copy of them in its own format first.
"""

from __future__ import annotations

import errno
from pathlib import Path

from fedsim.errors import DataError, EnvironmentProblem

_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG})


def download(repo: str, *, revision: str = "main", config: str | None = None) -> Path:
    """The folder that holds the parquet files of a hub data set, fetched if they are not there.

    Without a connection, files that were fetched completely before are used.

    Args:
        repo: such as ``ylecun/mnist``.
        revision: branch, tag or commit. ``refs/convert/parquet`` is the hub's own conversion of a
            set that is stored in another form.
        config: fetch this configuration's folder only.

    Raises:
        DataError: FS-DAT-009 when the hub cannot be reached and nothing was fetched before,
            FS-DAT-010 when there is no such data set, no access, or no parquet file in it.
        EnvironmentProblem: FS-DAT-031, the fetched files cannot be written.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.parquet"] if config is None else [f"{config}/*.parquet", f"*/{config}/*.parquet"]
    try:
        folder = Path(
            snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise DataError(
            f"the hub has no data set {repo!r} that can be read",
            code="FS-DAT-010",
            where=f"{repo}, revision {revision}",
            why=_first_line(error),
            hint="check the name; a private or gated set needs HF_TOKEN",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise EnvironmentProblem(
                f"data set {repo!r} cannot be written to the hub's cache",
                code="FS-DAT-031",
                where=str(error.filename or repo),
                why=_first_line(error),
                hint="free some space, or point HF_HOME at another folder",
            ) from error
        raise DataError(
            f"data set {repo!r} cannot be fetched from the hub",
            code="FS-DAT-009",
            where=f"{_endpoint()}, {repo}",
            why=_first_line(error),
            hint="set data.path to a local folder with its parquet files, or HF_ENDPOINT to a mirror",
        ) from error
    if not any(folder.rglob("*.parquet")):
        raise DataError(
            f"data set {repo!r} has no parquet files",
            code="FS-DAT-010",
            where=f"{repo}, revision {revision}" + (f", configuration {config}" if config else ""),
            why="only parquet files are read from the hub; no code of a data set is ever run",
            hint="try revision = 'refs/convert/parquet', the hub's own conversion",
        )
    return folder


def _endpoint() -> str:
    from huggingface_hub.constants import ENDPOINT

    return ENDPOINT


def _first_line(error: Exception) -> str:
    """The first line of an error, or of what caused it: causes say more than advice to try again."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"

"""Finding a run by what a person types: a path, a name, or a part of the folder's name."""

from __future__ import annotations

from pathlib import Path

from fedsim.errors import ConfigError, FedsimError
from fedsim.runs.folder import MANIFEST, RunFolder


def list_runs(runs: Path) -> list[RunFolder]:
    """The runs below `runs`, the oldest first; folders that are no runs are passed over."""
    if not runs.is_dir():
        return []
    found = [RunFolder(p) for p in runs.iterdir() if not p.name.startswith(".") and _is_run(p)]
    return sorted(found, key=_started)


def open_run(runs: Path, run: str | Path) -> RunFolder:
    """The run that `run` names.

    Tried in this order: a path of a run's folder; a folder's name below `runs`; the name of a run,
    of which the latest is taken; the four digits at a folder's end; the beginning of a folder's name.

    Raises:
        ConfigError: FS-CFG-090, there is no such run; FS-CFG-091, more than one fits.
    """
    typed = Path(run)
    for path in (typed, runs / typed):
        if _is_run(path):
            return RunFolder(path)
    known = list_runs(runs)
    text = str(run)
    named = [folder for folder in known if _name(folder) == text]
    if named:
        return named[-1]
    digits = [folder for folder in known if folder.path.name.rpartition("_")[2] == text]
    fitting = digits or [folder for folder in known if text and folder.path.name.startswith(text)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ConfigError(
            f"{text!r} fits {len(fitting)} runs",
            code="FS-CFG-091",
            where=str(runs),
            why=", ".join(folder.path.name for folder in fitting[-5:]),
            hint="type more of the folder's name, or its last four digits",
        )
    latest = ", ".join(folder.path.name for folder in known[-3:])
    raise ConfigError(
        f"there is no run {text!r}",
        code="FS-CFG-090",
        where=str(runs),
        why=f"the latest are {latest}" if latest else "there is no run in this folder",
        hint="fedsim ls lists the runs; --runs DIR or FEDSIM_RUNS names another folder",
    )


def _is_run(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _started(folder: RunFolder) -> tuple[str, str]:
    try:
        return str(folder.manifest.get("started", "")), folder.path.name
    except FedsimError:
        return "", folder.path.name  # a damaged manifest still has a place in the list


def _name(folder: RunFolder) -> str | None:
    try:
        return folder.name
    except (FedsimError, KeyError):
        return None

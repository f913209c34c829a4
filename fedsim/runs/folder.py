"""The folder of one run: created whole, appended line by line, closed with digests.

    2025-01-31T14-05_digits_7f3a/
      config.toml     resolved configuration          metrics.jsonl  one line per round
      manifest.json   versions, hardware, outcome     clients.jsonl  one line per client and round
      rounds.csv      metrics.jsonl as a table        log.txt        what was said
      checkpoints/    models as safetensors           state/         what resuming needs
      plots/          pictures and their numbers      report.html

``docs/outputs.md`` describes every file and field.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.client_log import Column
from fedsim.runs import checkpoints, lines, lock, manifest, table
from fedsim.runs.columns import encode_columns
from fedsim.runs.lines import Record
from fedsim.runs.log import open_log
from fedsim.runs.names import folder_name
from fedsim.storage import append_whole, damaged, problem, sync_file, unreadable, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, MANIFEST, LOG = "config.toml", "manifest.json", "log.txt"
METRICS, CLIENTS, ROUNDS = "metrics.jsonl", "clients.jsonl", "rounds.csv"
REPORT, PLOTS, CHECKPOINTS, STATE = "report.html", "plots", "checkpoints", "state"


class RunFolder:
    """One run on disk, made by `create` or found by `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(
        cls,
        runs: Path,
        name: str,
        *,
        config_text: str,
        facts: Mapping[str, Any],
        command: Sequence[str],
    ) -> RunFolder:
        """Make the folder of a new run below `runs`, complete or not at all.

        Args:
            name: of the run; the folder's name is made safe from it, see `names.slug`.
            config_text: the resolved configuration, TOML.
            facts: of the simulation, for the manifest.
            command: the words that started the run.

        Raises:
            EnvironmentProblem: FS-ENV-020 … 022, nothing is left behind.
        """
        final = runs / folder_name(name, datetime.now().astimezone())
        unfinished = runs / f".writing-{secrets.token_hex(8)}"
        try:
            runs.mkdir(parents=True, exist_ok=True)
            unfinished.mkdir()
        except OSError as error:
            raise problem(error, runs) from error
        run = cls(unfinished)
        try:
            for part in (CHECKPOINTS, PLOTS, STATE):
                (unfinished / part).mkdir()
            write_atomically(unfinished / CONFIG, config_text.encode())
            run._write_manifest(
                manifest.first(name, final.name, config_text=config_text, facts=facts, command=command)
            )
            unfinished.rename(final)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise problem(error, final) from error
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return cls(final)

    @classmethod
    def open(cls, runs: Path, run: str | Path) -> RunFolder:
        """The run that a person names, see `find.open_run`.

        Raises:
            ConfigError: FS-CFG-090, there is no such run; FS-CFG-091, more than one fits.
        """
        from fedsim.runs.find import open_run

        return open_run(runs, run)

    def append_record(self, record: Mapping[str, Any]) -> None:
        """Add one round to ``metrics.jsonl``.

        Raises:
            EnvironmentProblem: FS-ENV-020 … 022, the file is as before.
        """
        line = lines.ordered(record, lines.ROUND_KEYS, tail=lines.ROUND_TAIL)
        lines.append(self.path / METRICS, [line])

    def append_clients(self, columns: Mapping[str, Column]) -> None:
        """Add the clients of one round to ``clients.jsonl``, all in one write.

        Args:
            columns: equally long, ``round`` and ``client`` among them.

        Raises:
            ValueError: the columns are not equally long.
            EnvironmentProblem: FS-ENV-020 … 022, the file is as before.
        """
        append_whole(self.path / CLIENTS, encode_columns(columns, lines.CLIENT_KEYS))

    def records(self) -> list[Record]:
        """The rounds so far; a torn last line is left out.

        Raises:
            EnvironmentProblem: FS-ENV-023, the file is damaged before its end.
        """
        return lines.read(self.path / METRICS)

    def client_records(self) -> Iterator[Record]:
        """The lines of ``clients.jsonl`` one by one."""
        return (record for record, _ in lines.scan(self.path / CLIENTS))

    def truncate(self, round_index: int) -> None:
        """Forget what came after `round_index`: lines of later rounds, and a torn end."""
        for name in (METRICS, CLIENTS):
            lines.truncate(self.path / name, round_index)

    def save_model(self, tensors: Mapping[str, Tensor], name: str) -> Path:
        """Write ``checkpoints/<name>.safetensors``, whole or not at all.

        Args:
            tensors: by parameter and buffer name, as ``module.state_dict()``; may share memory.
            name: such as ``final``, ``best`` or `names.round_file`.

        Raises:
            EnvironmentProblem: FS-ENV-020 … 022.
        """
        return checkpoints.save(self.path / CHECKPOINTS, tensors, name)

    def load_model(self, name: str = "final") -> dict[str, Tensor]:
        """The tensors of a checkpoint.

        Raises:
            EnvironmentProblem: FS-ENV-026, it is not there or damaged.
        """
        return checkpoints.load(self.path / CHECKPOINTS, name)

    @property
    def state_folder(self) -> Path:
        """Where the state lies that resuming needs."""
        return self.path / STATE

    def write_latest(self, round_index: int, fields: Mapping[str, Any] | None = None) -> None:
        """Say that the state of `round_index` is complete: ``checkpoints/latest.json``.

        The lines up to here reach the disk first, so that a state never claims a round that
        ``metrics.jsonl`` has lost with the power.
        """
        try:
            for name in (METRICS, CLIENTS):
                sync_file(self.path / name)
        except OSError as error:
            raise problem(error, self.path / METRICS) from error
        text = _json({"round": round_index, **(fields or {})})
        write_atomically(self.path / CHECKPOINTS / "latest.json", text)

    def latest(self) -> Record | None:
        """What `write_latest` said last, None before the first checkpoint."""
        path = self.path / CHECKPOINTS / "latest.json"
        return _read_json(path) if path.exists() else None

    @property
    def manifest(self) -> Record:
        """``manifest.json`` as it stands."""
        return _read_json(self.path / MANIFEST)

    @property
    def name(self) -> str:
        """The run's name as it was given."""
        return str(self.manifest["run"]["name"])

    @property
    def config_text(self) -> str:
        """The resolved configuration, TOML."""
        path = self.path / CONFIG
        try:
            return path.read_bytes().decode()
        except OSError as error:
            raise unreadable(error, path) from error
        except UnicodeDecodeError as error:
            raise damaged(path, "it is not UTF-8") from error

    @property
    def config(self) -> Record:
        """The resolved configuration, parsed and not checked.

        Raises:
            EnvironmentProblem: FS-ENV-023, the file is damaged.
        """
        try:
            return tomllib.loads(self.config_text)
        except ValueError as error:
            raise damaged(self.path / CONFIG, f"it is not TOML: {error}") from error

    def status(self) -> str:
        """``running`` while a process writes it, ``stopped`` if that died, else the run's outcome."""
        outcome = str(self.manifest["outcome"])
        return "stopped" if outcome == "running" and not lock.is_locked(self.path) else outcome

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder as its one writer.

        Raises:
            EnvironmentProblem: FS-ENV-025, another process holds it.
        """
        return lock.locked(self.path)

    def add_session(self, command: Sequence[str]) -> None:
        """Note in the manifest that the run goes on."""
        document = self.manifest
        document["sessions"].append(manifest.session(command))
        document |= {"outcome": "running", "ended": None, "result": None, "files": {}}
        self._write_manifest(document)

    def update_facts(self, facts: Mapping[str, Any]) -> None:
        """Add to or replace facts of the simulation in the manifest."""
        document = self.manifest
        document["facts"] |= facts
        self._write_manifest(document)

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """Write ``rounds.csv`` and close the manifest: end, outcome, digests of the files.

        Args:
            outcome: with ``outcome`` (ok, failed, interrupted, target) and what the end block shows:
                ``rounds``, ``final``, ``best``, ``seconds``.
        """
        write_atomically(self.path / ROUNDS, table.as_csv(self.records()))
        document = self.manifest
        ended = manifest.now()
        word = str(outcome["outcome"])
        document |= {"outcome": word, "ended": ended, "result": dict(outcome)}
        document["sessions"][-1] |= {"ended": ended, "outcome": word}
        self._write_manifest(document)
        self.digest_files()

    def digest_files(self) -> None:
        """Renew the digests in the manifest after a report was written; only once a run has ended."""
        document = self.manifest
        if document["ended"] is not None:
            document["files"] = manifest.file_digests(self.path)
            self._write_manifest(document)

    def changed_files(self) -> dict[str, str]:
        """Files that differ from the manifest's digests: path to ``changed`` or ``missing``."""
        return manifest.changed_files(self.path, self.manifest["files"])

    def _write_manifest(self, document: Mapping[str, Any]) -> None:
        write_atomically(self.path / MANIFEST, _json(document))

    def log_handler(self) -> logging.Handler:
        """A handler that adds to ``log.txt``; whoever attaches it also closes it.

        Raises:
            EnvironmentProblem: FS-ENV-020 … 022, the log cannot be opened.
        """
        return open_log(self.path / LOG)


def _json(document: Mapping[str, Any]) -> bytes:
    plain = lines.ordered(document, tuple(document))
    return (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode()


def _read_json(path: Path) -> Record:
    try:
        document = lines.parse(path.read_bytes())
    except OSError as error:
        raise unreadable(error, path) from error
    if document is None:
        raise damaged(path, "it is not a JSON object")
    return document

"""The log of a run, ``log.txt``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.storage import problem


def line_of(record: Mapping[str, Any]) -> str:  # Any: a line of metrics.jsonl
    """A round for the log: ``round=3 version=3 outcome=ok … seconds=0.12``."""
    shown = {k: v for k, v in record.items() if k not in ("time", "bytes_down", "bytes_up")}
    shown["seconds"] = round(record["time"]["seconds"], 3)
    return " ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())


def open_log(path: Path) -> logging.Handler:
    """A handler that adds to `path`; whoever attaches it to a logger also closes it.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022, the file cannot be opened.
    """
    try:
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise problem(error, path) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s"))
    return handler


class _LogFile(logging.FileHandler):
    """A log that a full disk silences after one word on stderr; the run itself fails on its results."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        self._tell(sys.exc_info()[1])

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # the last lines did not fit; the file is closed all the same
            self._tell(error)

    def _tell(self, error: BaseException | None) -> None:
        if not self._told:
            self._told = True
            print(f"warning: {self.baseFilename} cannot be written: {error}", file=sys.stderr)

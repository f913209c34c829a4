"""What a command prints: text for people, one document for programs, errors in one form.

With ``--format json`` stdout holds exactly one document ``{"schema": 1, "status": …, "data": {…}}``;
everything else goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any, TextIO

from fedsim.cli.settings import Settings
from fedsim.errors import EnvironmentProblem, FedsimError

SCHEMA = 1
INTERNAL_EXIT = 70
Data = Mapping[str, Any]  # Any: JSON


def people(settings: Settings) -> TextIO:
    """Where text for people goes: stdout, or stderr where stdout is for a program."""
    return sys.stdout if settings.format == "text" else sys.stderr


def write(stream: TextIO, line: str) -> None:
    """Print a line at once; where nobody reads any more, as behind ``| head``, print nothing from then on."""
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(settings: Settings, text: str = "") -> None:
    """A line for people, part of a command's result; with json and ``-q`` nothing."""
    if settings.format == "text" or not settings.quiet:
        write(people(settings), text)


def note(settings: Settings, text: str) -> None:
    """A remark on stderr; ``-q`` leaves it out."""
    if not settings.quiet:
        print(text, file=sys.stderr)


def result(settings: Settings, data: Data, lines: Sequence[str]) -> None:
    """The result of a command: `lines` for people, or `data` for a program."""
    if settings.format == "text":
        write(sys.stdout, "\n".join(lines))
    else:
        document(settings, "ok", data)


def document(settings: Settings, status: str, data: Data) -> None:
    """The one document of json, or the last line of jsonl."""
    whole: dict[str, Any] = {"schema": SCHEMA, "status": status, "data": plain(data)}
    if settings.format == "jsonl":
        write(sys.stdout, json.dumps(whole | {"final": True}, allow_nan=False))
    else:
        write(sys.stdout, json.dumps(whole, indent=2, allow_nan=False))


def event(name: str, data: Data) -> None:
    """One line of jsonl that is not the last."""
    whole = {"schema": SCHEMA, "event": name, "data": plain(data)}
    write(sys.stdout, json.dumps(whole, allow_nan=False))


def plain(value: Any) -> Any:
    """`value` as JSON holds it: numbers that are not finite are null, paths are texts."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, PurePath):
        return str(value)
    item = getattr(value, "item", None)  # numbers of NumPy and torch
    return value if item is None else item()


def columns(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()
) -> list[str]:
    """A table as aligned lines, never cut; `right` are the columns of numbers."""
    texts = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return [line(texts[0]), "  ".join("-" * w for w in widths), *(line(row) for row in texts[1:])]


def pairs(entries: Mapping[str, object]) -> list[str]:
    """``name   value`` lines, aligned."""
    width = max((len(name) for name in entries), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in entries.items()]


def fail(settings: Settings, error: FedsimError, *, exit_code: int | None = None) -> int:
    """Print an error in its one form and return the exit code, that of its class where none is given."""
    code = error.exit_code if exit_code is None else exit_code
    if settings.traceback:
        traceback.print_exception(error)
    if settings.format != "text":
        fields = {name: getattr(error, name) for name in ("code", "what", "where", "why", "hint")}
        # Where stdout itself is what cannot be written, stderr still says why.
        with contextlib.suppress(OSError):
            document(settings, "error", settings.result | fields | {"exit_code": code})
    print(_coloured(settings, str(error)), file=sys.stderr)
    print(f"  more: fedsim explain {error.code}", file=sys.stderr)
    return code


def internal(settings: Settings, error: BaseException) -> int:
    """A bug: say so, write the whole traceback into a file and name it; exit code 70."""
    text = "".join(traceback.format_exception(error))
    log = _bug_log(text)
    bug = FedsimError(
        f"internal error: {type(error).__name__}: {error}",
        code="FS-BUG-001",
        where=log or "see the traceback above",
        why="this is a mistake in fedsim or in a plugin, not in what you typed",
        hint="report it together with that file and the command",
    )
    if settings.traceback or log is None:
        print(text, file=sys.stderr, end="")
    settings.traceback = False
    return fail(settings, bug, exit_code=INTERNAL_EXIT)


def _bug_log(text: str) -> str | None:
    """The file that holds the traceback, None where none can be written."""
    stamp = f"{datetime.now():%Y-%m-%dT%H-%M-%S}"
    try:
        handle, name = tempfile.mkstemp(prefix=f"fedsim-error-{stamp}-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return None
    return name


def out_of_memory(error: BaseException) -> EnvironmentProblem:
    """The error for a user when memory ran out."""
    gpu = type(error).__name__ == "OutOfMemoryError"
    return EnvironmentProblem(
        f"the memory of the {'GPU' if gpu else 'machine'} ran out",
        code="FS-ENV-003",
        where="[engine] block, [client] batch_size",
        why=(str(error).strip().splitlines() or ["an allocation failed"])[0],
        hint="lower engine.block (clients trained at once), client.batch_size or evaluation.batch_size",
    )


def _coloured(settings: Settings, text: str) -> str:
    """The first line in bold red, on a terminal that has colours."""
    if not colours(settings, sys.stderr):
        return text
    head, _, rest = text.partition("\n")
    return f"\x1b[1;31m{head}\x1b[0m" + (f"\n{rest}" if rest else "")


def colours(settings: Settings, stream: TextIO) -> bool:
    """Whether colours are wanted and can be shown."""
    wanted = settings.color and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and stream.isatty()

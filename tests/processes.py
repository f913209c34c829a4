"""The program as a real process, for end-to-end tests; its folder of runs is ``runs`` in its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

SMALL = """
[run]
rounds = 3
[data]
name = "synthetic"
clients = 4
examples = 60
features = 600
[data.partition]
clients = 8
kind = "iid"
[model]
name = "logistic"
[round]
sample = 4
[client]
epochs = 1
[output]
report = false
plots = false
"""

# Some errors end in Python's own words; one screen is what still fits a small terminal.
ONE_SCREEN = 24


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Its one JSON document."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def start(folder: Path, *words: str, environ: dict[str, str] | None = None, **more: Any) -> Any:
    """A process of the program in `folder`, not waited for (Any: Popen of text or of bytes)."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedsim", *words],
        **{
            "cwd": folder,
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": os.environ | {"COLUMNS": "80"} | (environ or {}),
            **more,
        },
    )


def fedsim(folder: Path, *words: str, **more: Any) -> Ended:
    """The program, run to its end in `folder`."""
    process = start(folder, *words, **more)
    out, err = process.communicate(timeout=240)
    return Ended(process.returncode, out or "", err or "")


def script(folder: Path, text: str, *options: str) -> Ended:
    """A Python script given on standard input, as from a session without a file of its own."""
    process = subprocess.run(
        [sys.executable, *options],
        input=text, cwd=folder, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    return Ended(process.returncode, process.stdout, process.stderr)


def config(folder: Path, text: str = SMALL) -> str:
    """Write ``fedsim.toml`` into `folder`; its name."""
    (folder / "fedsim.toml").write_text(text)
    return "fedsim.toml"


def only_run(runs: Path) -> Path:
    """The one run below `runs`; anything else that lies there, hidden or not, is a failure."""
    (found,) = runs.iterdir()
    assert not list(found.rglob(".writing-*")), "a half-written file was left"
    return found


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without their times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in found:
        del record["time"]
    return found


def wait_for_lines(process: Any, runs: Path, count: int) -> Path:
    """The run's folder once its ``metrics.jsonl`` has `count` lines; the file is looked at, not a clock."""
    while process.poll() is None:
        found = list(runs.glob("[!.]*/metrics.jsonl")) if runs.exists() else []
        if found and found[0].read_bytes().count(b"\n") >= count:
            return found[0].parent
        time.sleep(0.01)
    raise AssertionError(f"the run ended early: {process.communicate()}")


def assert_told(ended: Ended, *, code: str, exit_code: int, naming: tuple[str, ...]) -> None:
    """One error in its form: its code, its exit code, on one screen, with what it concerns and a remedy."""
    assert ended.code == exit_code, f"exit {ended.code}\n{ended.out}\n{ended.err}"
    assert f"error[{code}]: " in ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) <= ONE_SCREEN
    for name in ("-->", "help: ", *naming):
        assert name in ended.err, f"{name!r} is not in\n{ended.err}"

"""`fedsim up` runs a whole federation, and what it prints works when it is typed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.deployed import until
from tests.processes import fedsim

pytestmark = pytest.mark.slow

OPTIONS = ("--clients", "2", "--set", "run.rounds=2", "--set", "output.report=false")


def words_of(line: str) -> tuple[list[str], dict[str, str]]:
    """A printed command: its words after the program's name, and the variables before it."""
    words = shlex.split(line)
    place = words.index("fedsim")
    return words[place + 1 :], dict(word.split("=", 1) for word in words[:place])


def test_up_ends_a_federation_on_digits(tmp_path: Path) -> None:
    """One command: TLS, keys, a coordinator, clients, a run, and nothing left behind."""
    ended = fedsim(tmp_path, "up", *OPTIONS, "--format", "json", environ={"TMPDIR": str(tmp_path)})
    assert ended.code == 0, ended.err
    assert ended.document["data"]["state"] == "ok", ended.out
    assert not list(tmp_path.glob("fedsim-up-*"))
    with_folder = [line for line in _command_lines() if str(tmp_path) in line]
    assert not with_folder


def test_the_commands_that_up_prints_work_in_terminals_of_their_own(tmp_path: Path) -> None:
    """Typed one after the other, in another working folder; those that serve stay open."""
    state = tmp_path / "up"
    dry = fedsim(tmp_path, "up", *OPTIONS, "--state", str(state), "--dry-run", "--format", "json")
    assert dry.code == 0, dry.err
    commands: list[str] = dry.document["data"]["commands"]
    # The files of these were made by the dry run, as it says.
    rest = [line for line in commands if words_of(line)[0][:1] not in (["certs"], ["node"])]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with terminals(elsewhere) as open_terminal:
        for line in rest:
            words, environ = words_of(line)
            if words[0] in ("server", "client"):
                open_terminal(words)
                if words[0] == "server":
                    until(lambda: (state / "coordinator" / "listening.json").exists(), "a coordinator")
                continue
            done = fedsim(elsewhere, *words, environ=environ)
            assert done.code == 0, (line, done.err)
        (run,) = (state / "coordinator" / "runs").iterdir()
        assert json.loads((run / "manifest.json").read_text())["outcome"] == "ok"


@contextmanager
def terminals(folder: Path) -> Iterator[Any]:
    """A function that starts a command and leaves it running; all are interrupted at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(words: list[str]) -> None:
        with (folder / f"{len(started)}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "fedsim", *words], cwd=folder, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )  # fmt: skip

    try:
        yield start
        for process in reversed(started):
            process.send_signal(signal.SIGINT)  # Ctrl-C
            assert process.wait(60) in (0, 130)
    finally:
        for process in started:
            process.kill()
            process.wait()


def _command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    return found

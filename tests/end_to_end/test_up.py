"""`fedsim up` as people type it: real processes over TLS on loopback, and nothing left of them afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc"),
]

FEDSIM = (sys.executable, "-m", "fedsim")
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ("--clients", "2", "--set", "run.rounds=2", "--format", "json")


def typed(words: Sequence[str], folder: Path, **more: str) -> subprocess.Popen[str]:
    """Start what somebody types in `folder`."""
    return subprocess.Popen(
        [*FEDSIM, *words], cwd=folder, env={**ENVIRON, **more}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def processes(mark: Path) -> list[int]:
    """Processes that name `mark` in their command line, but for this one's children of the test itself."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str(mark).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def wait_for(done: object, seconds: float = 120.0) -> None:
    pause, until = threading.Event(), time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        assert time.monotonic() < until, "it did not happen"
        pause.wait(0.1)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state folder; whatever runs on it when a test fails is ended."""
    folder = tmp_path / "state"
    yield folder
    for pid in processes(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_federation_runs_from_one_command_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with typed(["up", *SMALL], tmp_path, TMPDIR=str(tmp_path)) as up:
        out, err = up.communicate(timeout=240)
    assert up.returncode == 0, err
    data = json.loads(out)["data"]
    assert (data["outcome"], data["rounds"], data["failed_rounds"]) == ("ok", 2, 0)
    assert data["not_counted"] == {}
    folder = tmp_path / data["path"]
    assert (folder / "checkpoints" / "final.safetensors").is_file()
    assert [json.loads(line)["received"] for line in (folder / "metrics.jsonl").open()][1:] == [2, 2]
    shown = [line for line in err.splitlines() if line.startswith("$ ")]
    assert [line.split("fedsim ", 1)[1].split()[0] for line in shown] == [
        "certs", "node", "node", "node", "server", "client", "client", "connect", "run",
    ]  # fmt: skip
    assert "token" not in err
    assert processes(tmp_path) == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("fedsim-up-")] == []


def test_the_commands_that_it_prints_work_when_they_are_typed(tmp_path: Path, state: Path) -> None:
    with typed(["up", *SMALL, "--dry-run", "--state", str(state)], tmp_path) as up:
        out, err = up.communicate(timeout=120)
    assert up.returncode == 0, err
    commands = json.loads(out)["data"]["commands"]
    rest = [c for c in commands if shlex.split(c.partition("fedsim ")[2])[0] not in ("certs", "node")]
    assert len(rest) == 5
    running = []
    try:
        for line in rest[:3]:  # the coordinator and two clients, each in a terminal of its own
            running.append(typed(shlex.split(line)[1:], tmp_path))
        for line in rest[3:]:
            home, _, words = (shlex.split(line)[0], *shlex.split(line)[1:2], shlex.split(line)[2:])
            with typed([*words, "--format", "json"], tmp_path, FEDSIM_HOME=home.partition("=")[2]) as process:
                out, err = process.communicate(timeout=240)
            assert process.returncode == 0, f"{line}\n{err}"
        assert json.loads(out)["data"]["outcome"] == "ok"
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == 0
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind_however_it_ends(tmp_path: Path, state: Path, number: signal.Signals) -> None:
    words = ["up", "--clients", "2", "--set", "run.rounds=100000", "--state", str(state)]
    with typed(words, tmp_path) as up:
        wait_for(lambda: len(list(state.glob("coordinator/runs/*/metrics.jsonl"))) == 1)
        assert len(processes(state)) >= 4
        up.send_signal(number)
        _, err = up.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert up.returncode == -signal.SIGKILL
    else:
        assert up.returncode == 5, err
        assert "FS-INT-004" in err
    wait_for(lambda: processes(state) == [])

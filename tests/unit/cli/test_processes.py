"""Processes that a command starts: logged, watched over, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.cli.processes import Processes, command
from fedsim.errors import EnvironmentProblem


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path / "logs", {"OMP_NUM_THREADS": "1"})
    yield processes
    processes.stop(grace=0.0)


def gone(pid: int) -> bool:
    """Whether there is no such process any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(done: object) -> None:
    ended = threading.Event()
    for _ in range(500):
        if done():  # type: ignore[operator]
            return
        ended.wait(0.02)
    raise AssertionError("it did not happen")


def test_a_process_that_ends_by_itself_is_told_with_the_end_of_its_log(started: Processes) -> None:
    process = started.start("coordinator", ["no-such-command"])
    process.child.wait(30)
    with pytest.raises(EnvironmentProblem) as caught:
        started.check()
    error = caught.value
    assert error.code == "FS-SRV-029"
    assert "exit code 2" in error.what
    assert "FS-CFG-020" in str(error.why)
    assert "fedsim no-such-command" in str(error.hint)
    with pytest.raises(EnvironmentProblem):
        started.wait_until(lambda: False, seconds=5)


def test_what_does_not_end_in_time_is_killed_with_its_own_children(
    started: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "pids"
    stubborn = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(file)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}} ')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr("fedsim.cli.processes._BOOT", stubborn)
    started.start("client", [])
    wait_for(lambda: file.exists() and file.read_text().endswith(" "))
    pids = [int(pid) for pid in file.read_text().split()]
    started.stop(grace=0.2)
    assert started.running == []
    wait_for(lambda: all(gone(pid) for pid in pids))


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is one of Linux")
def test_processes_end_with_the_one_that_started_them_however_that_ends(tmp_path: Path) -> None:
    starter = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from fedsim.cli import processes\n"
        "processes._BOOT = processes._BOOT.replace('from fedsim.cli import main', 'import time')"
        ".replace('main()', 'print(\"up\", flush=True); time.sleep(600)')\n"
        f"started = processes.Processes(Path({str(tmp_path)!r}), {{}})\n"
        "child = started.start('client', [])\n"
        "assert started.wait_until(lambda: 'up' in child.tail(), seconds=60)\n"
        "print(child.child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child)
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: gone(child))


def test_a_command_can_be_typed_as_it_is_shown() -> None:
    shown = command(["client", "--name", "it's a name", "--state", "/a b"], {"FEDSIM_HOME": "/x y"})
    assert shown == "FEDSIM_HOME='/x y' fedsim client --name 'it'\"'\"'s a name' --state '/a b'"

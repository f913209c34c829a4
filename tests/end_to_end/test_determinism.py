"""Same seed, same bytes; killed or interrupted, resumed, same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = """
[run]
rounds = {rounds}
[data.partition]
clients = 12
alpha = 0.5
[round]
sample = 6
[client]
epochs = 1
batch_size = 16
lr = 0.02
momentum = 0.5
[strategy]
name = "{strategy}"
[engine]
name = "{engine}"
[evaluation]
clients = "every 3"
[output]
checkpoint_every = 3
report = false
plots = false
"""


ENDLESS = 100_000
"""Rounds of a run that somebody stops."""


def fedsim(*words: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedsim", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NO_COLOR": "1"},
    )


def write_config(folder: Path, *, engine: str, strategy: str = "fedavg", rounds: int = 8) -> Path:
    path = folder / "fedsim.toml"
    path.write_text(CONFIG.format(engine=engine, strategy=strategy, rounds=rounds))
    return path


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out


def run_folder(runs: Path) -> Path:
    (folder,) = [p for p in runs.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return folder


def lines_without_time(path: Path) -> list[str]:
    """The raw lines with the object `time` cut out: everything else must be the same bytes."""
    out = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        head, found, _ = line.rpartition(', "time": {')
        assert found
        assert json.loads(head + "}") == {k: v for k, v in record.items() if k != "time"}
        out.append(head)
    return out


@pytest.mark.parametrize("engine", [pytest.param("loop", marks=pytest.mark.slow), "stacked"])
def test_the_same_seed_gives_the_same_bytes_twice(tmp_path: Path, engine: str) -> None:
    config = write_config(tmp_path, engine=engine, rounds=4)
    for name in ("a", "b"):
        finished(fedsim("run", str(config), "--runs", str(tmp_path / name), "-q", cwd=tmp_path))
    a, b = (run_folder(tmp_path / name) for name in ("a", "b"))
    assert lines_without_time(a / "metrics.jsonl") == lines_without_time(b / "metrics.jsonl")
    assert (a / "clients.jsonl").read_bytes() == (b / "clients.jsonl").read_bytes()
    final = "checkpoints/final.safetensors"
    assert (a / final).read_bytes() == (b / final).read_bytes()


def killed_and_whole(folder: Path, config: Path, *, after: int) -> tuple[Path, Path]:
    """A run that was killed after some rounds and resumed, and one of as many rounds that nothing stopped.

    How many those are is known once it is dead: it cannot be over before, however long nobody looks.
    """
    runs = folder / "killed"
    process = fedsim("run", str(config), "--runs", str(runs), "-q", cwd=folder)
    wait_for_rounds(process, runs, after)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    killed = run_folder(runs)
    rounds = (killed / "metrics.jsonl").read_bytes().count(b"\n") + 10
    finished(fedsim("resume", str(killed), "--rounds", str(rounds), "-q", cwd=folder))
    config.write_text(config.read_text().replace(f"rounds = {ENDLESS}", f"rounds = {rounds}"))
    finished(fedsim("run", str(config), "--runs", str(folder / "whole"), "-q", cwd=folder))
    return killed, run_folder(folder / "whole")


@pytest.mark.parametrize(
    ("engine", "strategy"), [("stacked", "scaffold"), pytest.param("loop", "fedavg", marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_to_the_same_metrics(tmp_path: Path, engine: str, strategy: str) -> None:
    config = write_config(tmp_path, engine=engine, strategy=strategy, rounds=ENDLESS)
    killed, whole = killed_and_whole(tmp_path, config, after=random.Random(engine).randrange(4, 30))
    assert lines_without_time(killed / "metrics.jsonl") == lines_without_time(whole / "metrics.jsonl")
    assert (killed / "clients.jsonl").read_bytes() == (whole / "clients.jsonl").read_bytes()
    for name in ("final", "best"):
        file = f"checkpoints/{name}.safetensors"
        assert (killed / file).read_bytes() == (whole / file).read_bytes()


ASYNCHRONOUS = """
[scheduler]
name = "{scheduler}"
[devices]
name = "lognormal"
spread = 0.7
dropout = 0.1
[availability]
name = "markov"
probability = 0.6
max_activation = 0.4
[membership]
name = "churn"
late = 0.3
by = 10
"""


@pytest.mark.parametrize(
    ("engine", "scheduler", "strategy"),
    [
        ("stacked", 'buffer"\nsize = 3\npoll_seconds = 0.02\n#', "fedbuff"),
        pytest.param("loop", 'window"\nperiod_seconds = 0.03\n#', "fedfix", marks=pytest.mark.slow),
        pytest.param("stacked", 'immediate"\npoll_seconds = 0.02\n#', "fedvarp", marks=pytest.mark.slow),
    ],
)
def test_an_asynchronous_run_that_was_killed_resumes_with_its_tasks_in_flight(
    tmp_path: Path, engine: str, scheduler: str, strategy: str
) -> None:
    config = write_config(tmp_path, engine=engine, strategy=strategy, rounds=ENDLESS)
    config.write_text(config.read_text() + ASYNCHRONOUS.format(scheduler=scheduler))
    killed, whole = killed_and_whole(tmp_path, config, after=random.Random(scheduler).randrange(8, 30))
    assert lines_without_time(killed / "metrics.jsonl") == lines_without_time(whole / "metrics.jsonl")
    assert (killed / "clients.jsonl").read_bytes() == (whole / "clients.jsonl").read_bytes()
    file = "checkpoints/final.safetensors"
    assert (killed / file).read_bytes() == (whole / file).read_bytes()


def test_ctrl_c_commits_and_exits_5_and_the_run_resumes(tmp_path: Path) -> None:
    config = write_config(tmp_path, engine="stacked", rounds=ENDLESS)
    runs = tmp_path / "runs"
    process = fedsim("run", str(config), "--runs", str(runs), "-q", cwd=tmp_path)
    wait_for_rounds(process, runs, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 5, err
    assert "resume" in err
    folder = run_folder(runs)
    stopped = len((folder / "metrics.jsonl").read_text().splitlines())
    finished(
        fedsim("resume", folder.name, "--runs", str(runs), "--rounds", str(stopped + 2), "-q", cwd=tmp_path)
    )
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == stopped + 3


def wait_for_rounds(process: subprocess.Popen[str], runs: Path, count: int) -> None:
    """Until metrics.jsonl holds `count` lines; the file is looked at, no time is assumed."""
    while process.poll() is None:
        found = list(runs.glob("[!.]*/metrics.jsonl")) if runs.exists() else []
        if found and found[0].read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    out, err = process.communicate()
    raise AssertionError(f"the run ended early with exit {process.returncode}\n{out}\n{err}")

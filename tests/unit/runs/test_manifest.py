from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.runs import manifest
from fedsim.runs.folder import RunFolder

MakeRun = Callable[..., RunFolder]


def test_a_command_keeps_its_words_without_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", staticmethod(lambda: Path("/home/someone")))
    command = ["/home/someone/venv/bin/fedsim", "run", "/home/someone/a.toml", "--runs=/home/someone/r", "-v"]
    assert manifest.portable(command) == ["fedsim", "run", "~/a.toml", "--runs=~/r", "-v"]
    assert manifest.portable([]) == []


def test_no_name_of_the_user_or_the_machine_is_in_a_manifest(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER", "someone-private")
    monkeypatch.setenv("HOSTNAME", "a-private-host")
    monkeypatch.setattr("socket.gethostname", lambda: "a-private-host")
    text = json.dumps(make_run().manifest)
    assert "private" not in text
    assert str(Path.home()) + "/" not in text or str(Path.home()) == "/"


def test_seeds_are_those_of_the_resolved_configuration() -> None:
    assert manifest.seeds("[run]\nseed = 7\n[data.partition]\nseed = 3\n") == {"run": 7, "partition": 3}
    assert manifest.seeds("") == {}


def test_versions_name_what_the_numbers_depend_on() -> None:
    import numpy
    import torch

    found = manifest.software()
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["numpy"] == numpy.__version__
    assert "pytest" not in found["packages"], "tools of development do not change a run"
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert found["torch"]["cpu_capability"]


def test_hardware_has_the_cores_and_memory_that_a_run_can_use() -> None:
    found = manifest.hardware()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] is None or found["memory_bytes"] > 2**28
    assert isinstance(found["accelerators"], list)


def test_the_commit_of_the_working_folder_is_noted_and_whether_it_was_changed(tmp_path: Path) -> None:
    program = shutil.which("git")
    if program is None:
        pytest.skip("needs git")

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        command = [program, *who, *words]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert manifest.git(tmp_path) is None, "outside a repository"
    git("init", "-q")
    assert manifest.git(tmp_path) is None, "before the first commit"
    (tmp_path / "a.py").write_text("x = 1\n")
    git("add", "a.py")
    git("commit", "-qm", "first")
    assert manifest.git(tmp_path) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (tmp_path / "a.py").write_text("x = 2\n")
    found = manifest.git(tmp_path)
    assert found is not None
    assert found["modified"] is True


def test_a_machine_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert manifest.git(tmp_path) is None


def test_digests_leave_out_what_goes_on_changing(tmp_path: Path) -> None:
    for name in (
        "metrics.jsonl",
        "log.txt",
        "manifest.json",
        ".lock",
        "state/run",
        "exports/a.pt",
        "plots/a.svg",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    digests = manifest.file_digests(tmp_path)
    assert list(digests) == ["metrics.jsonl", "plots/a.svg"]
    assert digests["metrics.jsonl"] == "1c8c54c71bebf4326938dfe2a16b9e8a2117ea455ea96857f6df0fec7bf3c7c8"

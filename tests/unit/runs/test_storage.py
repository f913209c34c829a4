from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedsim.errors import EnvironmentProblem
from fedsim.runs.folder import RunFolder
from fedsim.storage import append_whole, write_atomically

posix = pytest.mark.skipif(os.name != "posix", reason="needs the limits of a POSIX system")


def limited(code: str, folder: Path, *, limit: int) -> str:
    """What a process prints that may write files of at most `limit` bytes."""
    setup = f"""
        import resource
        from pathlib import Path
        from fedsim.errors import EnvironmentProblem
        from fedsim import storage
        folder = Path({str(folder)!r})
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        def code_of(act):
            try:
                act()
            except EnvironmentProblem as error:
                return error.code
            return "written"
    """
    program = textwrap.dedent(setup) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@posix
def test_a_full_disk_leaves_the_lines_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"first\n")
    said = limited(
        "limit(); print(code_of(lambda: storage.append_whole(folder / 'lines', b'x' * 100)))",
        tmp_path,
        limit=60,
    )
    assert said == "FS-ENV-021"
    assert path.read_bytes() == b"first\n"


@posix
def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    said = limited(
        "limit(); print(code_of(lambda: storage.write_atomically(folder / 'old', b'x' * 100)))",
        tmp_path,
        limit=60,
    )
    assert said == "FS-ENV-021"
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


@posix
def test_a_model_that_does_not_fit_on_the_disk_is_an_error_and_leaves_the_old_checkpoint(
    tmp_path: Path,
) -> None:
    said = limited(
        """
        import torch
        from fedsim.runs.folder import RunFolder
        run = RunFolder.create(folder, "a", config_text="", facts={}, command=[])
        run.save_model({"w": torch.ones(4)}, "best")
        limit()
        print(code_of(lambda: run.save_model({"w": torch.zeros(4000)}, "best")))
        print(run.load_model("best")["w"].sum().item())
        print(sorted(p.name for p in (run.path / "checkpoints").iterdir()))
        """,
        tmp_path,
        limit=8000,
    )
    assert said.splitlines() == ["FS-ENV-021", "4.0", "['best.safetensors']"]


@posix
def test_a_run_that_cannot_be_begun_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    said = limited(
        """
        from fedsim.runs.folder import RunFolder
        limit()
        print(code_of(lambda: RunFolder.create(folder, "a", config_text="x = 1", facts={}, command=[])))
        """,
        tmp_path,
        limit=200,
    )
    assert said == "FS-ENV-021"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_without_space_is_told_as_such() -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        append_whole(Path("/dev/full"), b"line\n")
    assert caught.value.code == "FS-ENV-021"
    assert caught.value.where == "/dev/full"


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "runs"
    with pytest.raises(EnvironmentProblem) as caught:
        RunFolder.create(blocked, "a", config_text="", facts={}, command=[])
    assert caught.value.code == "FS-ENV-020"
    assert caught.value.exit_code == 6
    assert str(blocked) == caught.value.where
    assert "--runs" in (caught.value.hint or "")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_file_system_that_takes_no_files_cannot_be_written() -> None:
    for act in (
        lambda: write_atomically(Path("/proc/fedsim-test"), b""),
        lambda: append_whole(Path("/proc/fedsim-test"), b""),
        lambda: RunFolder.create(Path("/proc/fedsim-runs"), "a", config_text="", facts={}, command=[]),
    ):
        with pytest.raises(EnvironmentProblem) as caught:
            act()
        assert caught.value.code == "FS-ENV-020"


def test_writing_atomically_replaces_a_file_and_leaves_only_it(tmp_path: Path) -> None:
    path = tmp_path / "latest.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]

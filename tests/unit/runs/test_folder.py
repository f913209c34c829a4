from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedsim.errors import ConfigError, EnvironmentProblem
from fedsim.file_lock import try_lock
from fedsim.runs.find import list_runs
from fedsim.runs.folder import RunFolder
from fedsim.runs.lock import LOCK
from fedsim.runs.names import slug

MakeRun = Callable[..., RunFolder]


def test_a_new_run_has_its_configuration_manifest_and_folders(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("digits robust", rounds=0, finished=False)
    assert run.path.parent == tmp_path / "runs"
    assert run.path.name.split("_")[1] == "digits-robust"
    assert {p.name for p in run.path.iterdir()} >= {
        "config.toml",
        "manifest.json",
        "checkpoints",
        "plots",
        "state",
    }
    assert run.config_text.startswith("[run]")
    assert run.name == "digits robust"
    assert run.manifest["outcome"] == "running"
    assert run.manifest["seeds"] == {"run": 1, "partition": 0}
    assert run.manifest["sessions"][0]["command"] == ["fedsim", "run", "digits.toml"]
    assert [p.name for p in run.path.parent.iterdir()] == [run.path.name]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("..", "run"),
        ("", "run"),
        ("a\x00b\nc\x1b[2J", "a-b-c-2J"),
        ("/abs/path", "abs-path"),
        ("C:\\con", "C-con"),
        (".hidden", "hidden"),
        ("naïve Übung", "naive-Ubung"),
        ("日本", "run"),
        ("$(rm -rf ~)", "rm-rf"),
        ("x" * 500, "x" * 60),
        ("digits_v1.2-b", "digits_v1.2-b"),
    ],
)
def test_a_hostile_name_becomes_a_plain_part_of_one_folder_name(
    make_run: MakeRun, tmp_path: Path, name: str, safe: str
) -> None:
    assert slug(name) == safe
    run = make_run(name, rounds=0, finished=False)
    assert run.path.resolve().parent == (tmp_path / "runs").resolve()
    assert run.name == name


def test_two_runs_of_one_name_have_two_folders(make_run: MakeRun) -> None:
    assert len({make_run(rounds=0, finished=False).path for _ in range(5)}) == 5


@pytest.mark.parametrize("name", ["../final", "a/b", "", ".x", "a\n", "a b"])
def test_a_checkpoint_name_that_is_no_plain_file_name_is_refused(make_run: MakeRun, name: str) -> None:
    run = make_run(rounds=0, finished=False)
    with pytest.raises(ValueError, match="plain file name"):
        run.save_model({"w": torch.zeros(1)}, name)


def test_a_checkpoint_loads_in_plain_pytorch_also_with_tied_weights_and_views(make_run: MakeRun) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.arange(12.0)
            self.a = nn.Parameter(flat[:6].view(2, 3))
            self.b = nn.Parameter(flat[6:].view(3, 2).T)
            self.c = self.a
            self.register_buffer("steps", torch.tensor(7))

    model, other = Tied(), Tied()
    with torch.no_grad():
        other.a.zero_()
        other.b.zero_()
    path = make_run(rounds=0, finished=False).save_model(model.state_dict(), "final")
    other.load_state_dict(load_file(path))
    assert path.name == "final.safetensors"
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_checkpoint_that_is_not_there_is_an_error_that_lists_the_others(make_run: MakeRun) -> None:
    run = make_run(rounds=0, finished=False)
    run.save_model({"w": torch.zeros(1)}, "best")
    with pytest.raises(EnvironmentProblem) as caught:
        run.load_model("final")
    assert caught.value.code == "FS-ENV-026"
    assert "best" in (caught.value.hint or "")


def test_a_damaged_checkpoint_is_an_error(make_run: MakeRun) -> None:
    run = make_run(rounds=0, finished=False)
    path = run.save_model({"w": torch.zeros(100)}, "final")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(EnvironmentProblem) as caught:
        run.load_model()
    assert caught.value.code == "FS-ENV-026"


def test_clients_of_a_round_are_written_one_line_each_with_what_is_not_finite_named(
    make_run: MakeRun,
) -> None:
    run = make_run(rounds=1)
    rows = list(run.client_records())
    assert [row["client"] for row in rows] == [0, 4, 7]
    assert list(rows[0]) == ["round", "client", "verdict", "reason", "examples", "norm"]
    assert rows[2] == {
        "round": 1, "client": 7, "verdict": "refused", "reason": "the update is not finite", "examples": 30,
        "norm": None, "nonfinite": ["norm"],
    }  # fmt: skip


def test_columns_of_clients_that_are_not_equally_long_are_refused(make_run: MakeRun) -> None:
    run = make_run(rounds=0, finished=False)
    with pytest.raises(ValueError, match="shorter"):
        run.append_clients({"round": [1, 1], "client": [0]})
    assert not (run.path / "clients.jsonl").exists()


def test_truncating_forgets_later_rounds_in_both_files_and_a_torn_end(make_run: MakeRun) -> None:
    run = make_run(rounds=4, finished=False)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 5, "ver')
    run.truncate(2)
    assert [r["round"] for r in run.records()] == [0, 1, 2]
    assert [r["round"] for r in run.client_records()] == [1, 1, 1, 2, 2, 2]


def test_the_latest_checkpoint_is_remembered(make_run: MakeRun) -> None:
    run = make_run(rounds=0, finished=False)
    assert run.latest() is None
    run.write_latest(10, {"model": "round-00010.safetensors"})
    assert run.latest() == {"round": 10, "model": "round-00010.safetensors"}
    assert json.loads((run.path / "checkpoints/latest.json").read_text())["round"] == 10


def test_a_finished_run_has_a_table_an_outcome_and_digests_that_notice_any_change(make_run: MakeRun) -> None:
    run = make_run()
    manifest = run.manifest
    assert manifest["outcome"] == manifest["sessions"][-1]["outcome"] == "ok"
    assert manifest["ended"] >= manifest["started"]
    assert manifest["result"]["final"]["accuracy"] == 0.9
    assert set(manifest["files"]) == {"config.toml", "metrics.jsonl", "clients.jsonl", "rounds.csv"}
    assert run.changed_files() == {}
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b" ")
    (run.path / "clients.jsonl").unlink()
    assert run.changed_files() == {"metrics.jsonl": "changed", "clients.jsonl": "missing"}


def test_the_table_of_rounds_has_a_column_for_every_key_and_empty_cells_for_absent_ones(
    make_run: MakeRun,
) -> None:
    rows = (make_run(rounds=1).path / "rounds.csv").read_text().splitlines()
    assert rows[0] == (
        "round,version,outcome,cohort,received,refused,late,lost,accuracy,loss,train_loss,"
        "bytes_down,bytes_up,clock_seconds,time.at,time.phases.train,time.rss_mb,time.seconds"
    )
    assert rows[1].startswith("0,0,start,0,0,0,0,0,0.1,2.0,,0,0,0.0,")
    assert rows[2].startswith("1,1,ok,3,3,0,0,0,0.30000000000000004,1.0,0.95,300,200,1.0,")
    assert len(rows) == 3


def test_a_resumed_run_is_open_again_until_it_finishes(make_run: MakeRun) -> None:
    run = make_run()
    run.add_session(["fedsim", "resume", "digits"])
    assert run.manifest["outcome"] == "running"
    assert run.manifest["files"] == {}
    run.finish({"outcome": "interrupted"})
    assert [s["outcome"] for s in run.manifest["sessions"]] == ["ok", "interrupted"]


def test_facts_are_added_to_the_manifest(make_run: MakeRun) -> None:
    run = make_run()
    run.update_facts({"engine": "stacked", "loss_scale": float("inf")})
    assert run.manifest["facts"]["engine"] == "stacked"
    assert run.manifest["facts"]["loss_scale"] is None
    assert run.manifest["nonfinite"] == ["facts.loss_scale"]


def test_whoever_asks_whether_a_run_is_alive_does_not_keep_its_writer_away(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask takes the lock, if only for an instant; here for as long as the writer sees it taken."""
    run = make_run(finished=False)
    asking = os.open(run.path / LOCK, os.O_RDWR | os.O_CREAT)
    assert try_lock(asking)
    monkeypatch.setattr("fedsim.runs.lock.time.sleep", lambda seconds: os.close(asking))
    with run.locked():
        assert run.status() == "running"


def test_a_run_has_one_writer_and_says_whether_it_is_alive(make_run: MakeRun) -> None:
    run = make_run(finished=False)
    assert run.status() == "stopped"
    program = (
        "import sys; from pathlib import Path; from fedsim.runs.folder import RunFolder\n"
        "from fedsim.errors import EnvironmentProblem\n"
        f"run = RunFolder(Path({str(run.path)!r}))\n"
        "try:\n    run.locked().__enter__()\n"
        "except EnvironmentProblem as error: print(error.code, run.status())\n"
        "else: print('locked')"
    )

    def other_process() -> str:
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()

    with run.locked():
        assert run.status() == "running"
        assert other_process() == "FS-ENV-025 running"
    assert run.status() == "stopped"
    assert other_process() == "locked"  # and gave it up by ending
    with run.locked():
        pass


def test_a_run_is_found_by_path_folder_name_digits_beginning_and_name(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    old, new, other = make_run("digits"), make_run("digits"), make_run("mnist")
    name = other.path.name
    for typed in (str(other.path), name, name.rpartition("_")[2], name[: name.rindex("_")] + "_", "mnist"):
        assert RunFolder.open(runs, typed).path.name == name, typed
    assert RunFolder.open(runs, "digits").path == new.path, "the latest of two runs of one name"
    assert [run.path for run in list_runs(runs)] == [old.path, new.path, other.path]


def test_a_name_that_fits_no_run_or_several_is_an_error_that_lists_them(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    first = make_run("digits")
    make_run("mnist")
    with pytest.raises(ConfigError) as none:
        RunFolder.open(runs, "cifar")
    assert none.value.code == "FS-CFG-090"
    assert first.path.name in (none.value.why or "")
    with pytest.raises(ConfigError) as several:
        RunFolder.open(runs, first.path.name[:4])
    assert several.value.code == "FS-CFG-091"
    with pytest.raises(ConfigError) as empty:
        RunFolder.open(tmp_path / "nothing", "x")
    assert empty.value.code == "FS-CFG-090"


def test_folders_that_are_no_runs_are_passed_over(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "file").write_text("")
    assert [found.path for found in list_runs(tmp_path / "runs")] == [run.path]
    assert list_runs(tmp_path / "absent") == []


def test_a_damaged_manifest_is_an_error_that_names_it(make_run: MakeRun) -> None:
    run = make_run()
    (run.path / "manifest.json").write_text("{")
    with pytest.raises(EnvironmentProblem) as caught:
        _ = run.manifest
    assert caught.value.code == "FS-ENV-023"


@pytest.mark.parametrize("content", [b"[run", b"\xff", b"x = 1\x1b"])
def test_a_damaged_configuration_is_an_error_that_names_it(make_run: MakeRun, content: bytes) -> None:
    run = make_run()
    (run.path / "config.toml").write_bytes(content)
    with pytest.raises(EnvironmentProblem) as caught:
        _ = run.config
    assert caught.value.code == "FS-ENV-023"
    assert (caught.value.where or "").endswith("config.toml")


def test_the_log_keeps_what_was_said(make_run: MakeRun) -> None:
    run = make_run()
    handler = run.log_handler()
    logger = logging.getLogger("tests.runs.log")
    logger.addHandler(handler)
    try:
        logger.warning("round=%d refused=%d", 3, 1)
    finally:
        logger.removeHandler(handler)
        handler.close()
    said = (run.path / "log.txt").read_text()
    assert "WARNING" in said
    assert said.rstrip().endswith("tests.runs.log round=3 refused=1")


def test_a_log_on_a_full_disk_warns_once_and_lets_the_run_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    from fedsim.runs.log import open_log

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    handler = open_log(Path("/dev/full"))
    record: Any = logging.makeLogRecord({"msg": "hello", "levelno": logging.INFO, "levelname": "INFO"})
    handler.handle(record)
    handler.handle(record)
    handler.close()
    assert capsys.readouterr().err.count("cannot be written") == 1

"""Commands that run federations and look after their folders, called in this process."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.invoked import Program

SMALL = (
    "--set", "run.rounds=3", "--set", "data.partition.clients=8", "--set", "round.sample=4",
    "--set", "model.name=mlp",
)  # fmt: skip
QUIET_FOLDER = ("--set", "output.report=false", "--set", "output.plots=false")


def lines_of(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["time"]
    return records


def document(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out)
    assert found["schema"] == 1
    return found


@pytest.fixture
def finished(fedsim: Program, tmp_path: Path) -> Path:
    """The folder of one complete run called `first`."""
    out, _ = fedsim.ended("run", *SMALL, "--name", "first", "--seed", "3", "--format", "json")
    return tmp_path / str(document(out)["data"]["path"])


def test_the_folder_holds_what_the_shown_configuration_says(
    fedsim: Program,
    finished: Path,
) -> None:
    shown, _ = fedsim.ended("config", "show", *SMALL, "--set", "run.name=first", "--set", "run.seed=3")
    written, wanted = tomllib.loads((finished / "config.toml").read_text()), tomllib.loads(shown)
    assert written.pop("engine")["name"] == "fused"
    assert wanted.pop("engine")["name"] == "auto"
    assert written == wanted
    for name in ("manifest.json", "clients.jsonl", "rounds.csv", "log.txt", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "checkpoints" / "final.safetensors").exists()


def test_the_run_is_listed_shown_verified_and_exported(fedsim: Program, finished: Path) -> None:
    listed = document(fedsim.ended("ls", "--format", "json")[0])["data"]["runs"]
    assert [Path(run["path"]).name for run in listed] == [finished.name]
    shown, _ = fedsim.ended("show", "first")
    assert "3 of 3, 0 failed" in shown
    assert "Next: fedsim" in shown
    assert "digit for digit" in fedsim.ended("verify", "first")[0]
    files = document(fedsim.ended("export", "first", "--to", "numpy", "--format", "json")[0])["data"]["files"]
    assert all(Path(file).stat().st_size > 0 for file in files)
    compared = document(fedsim.ended("compare", "first", "--format", "json")[0])["data"]
    assert compared["metric"] == "accuracy"


def test_a_file_edited_after_the_run_does_not_verify(fedsim: Program, tmp_path: Path) -> None:
    out, _ = fedsim.ended("run", *SMALL, *QUIET_FOLDER, "--name", "x", "--format", "json")
    run = tmp_path / document(out)["data"]["path"]
    text = (run / "rounds.csv").read_text()
    (run / "rounds.csv").write_text(text.replace("ok", "OK"))
    out, err = fedsim.ended("verify", "x", "--rounds", "1", "--format", "json", code=1)
    data = document(out)["data"]
    assert (data["code"], data["changed"], data["differences"]) == (
        "FS-RUN-011",
        {"rounds.csv": "changed"},
        [],
    )
    assert "rounds.csv: changed" in err


def test_a_dry_run_checks_everything_and_writes_nothing(fedsim: Program, tmp_path: Path) -> None:
    out, _ = fedsim.ended("run", *SMALL, "--dry-run")
    assert tomllib.loads(out)["run"]["rounds"] == 3
    assert "model parameters" in out
    assert list(tmp_path.iterdir()) == []
    _, err = fedsim.ended("run", *SMALL, "--set", "round.sample=9", "--dry-run", code=2)
    assert "FS-CFG-061" in err


def test_jsonl_is_one_object_per_round_and_the_result_last(fedsim: Program, tmp_path: Path) -> None:
    out, _ = fedsim.ended("run", *SMALL, *QUIET_FOLDER, "--format", "jsonl")
    *rounds, last = [json.loads(line) for line in out.splitlines()]
    assert [r["data"]["round"] for r in rounds] == [0, 1, 2, 3]
    assert (last["final"], last["status"], last["data"]["outcome"]) == (True, "ok", "ok")


def test_a_run_that_is_extended_ends_like_one_that_was_longer(fedsim: Program, tmp_path: Path) -> None:
    fixed = (*SMALL, *QUIET_FOLDER, "--set", "evaluation.clients=never")
    fedsim.ended("run", *fixed, "--name", "short")
    again, _ = fedsim.ended("resume", "short")
    assert again.startswith("this run is complete")
    out, _ = fedsim.ended("resume", "short", "--rounds", "5", "--format", "json")
    short = tmp_path / document(out)["data"]["path"]
    out, _ = fedsim.ended("run", *fixed, "--set", "run.rounds=5", "--name", "long", "--format", "json")
    long = tmp_path / document(out)["data"]["path"]
    assert lines_of(short / "metrics.jsonl") == lines_of(long / "metrics.jsonl")
    assert tomllib.loads((short / "config.toml").read_text())["run"]["rounds"] == 5
    _, err = fedsim.ended("resume", "short", "--rounds", "4", code=2)
    assert "FS-CFG-023" in err


def test_a_target_that_is_required_decides_the_exit_code(fedsim: Program, tmp_path: Path) -> None:
    words = ("run", *SMALL, *QUIET_FOLDER, "--require", "--set")
    out, _ = fedsim.ended(*words, "evaluation.target=accuracy >= 0.01", "--format", "json")
    assert document(out)["data"]["outcome"] == "target"
    out, err = fedsim.ended(*words, "evaluation.target=accuracy >= 1.0", "--format", "json", code=1)
    data = document(out)["data"]
    assert (data["code"], data["outcome"], data["rounds"]) == ("FS-RUN-010", "ok", 3)
    assert "FS-RUN-010" in err
    assert "FS-CFG-022" in fedsim.ended("run", "--require", code=2)[1]


def test_a_run_whose_answers_are_all_refused_fails_and_keeps_its_folder(
    fedsim: Program, tmp_path: Path
) -> None:
    out, err = fedsim.ended(
        "run", *SMALL, *QUIET_FOLDER, "--set", "client.lr=1e30", "--format", "json", code=1
    )
    data = document(out)["data"]
    assert (data["outcome"], data["code"]) == ("failed", "FS-RUN-003")
    assert data["not_counted"]["refused"] > 0
    assert "not finite" in err
    assert (tmp_path / data["path"] / "metrics.jsonl").exists()


@pytest.mark.parametrize("baseline", ["centralised", "local"])
def test_baselines_are_runs_of_the_same_configuration(fedsim: Program, tmp_path: Path, baseline: str) -> None:
    words = ("run", *SMALL, *QUIET_FOLDER, "--set", "strategy.name=fedprox", "--baseline", baseline)
    data = document(fedsim.ended(*words, "--format", "json")[0])["data"]
    assert baseline in data["name"]
    last = lines_of(tmp_path / data["path"] / "metrics.jsonl")[-1]
    assert last["cohort"] == (1 if baseline == "centralised" else 8)
    if baseline == "local":
        first = lines_of(tmp_path / data["path"] / "metrics.jsonl")[0]
        assert last["loss"] == pytest.approx(first["loss"])  # nothing reaches the server
        assert data["over_clients"]["mean"] > data["final"]["accuracy"]
    out, _ = fedsim.ended("resume", data["name"], "--rounds", "4", "--format", "json")
    assert document(out)["data"]["rounds"] == 4


def test_a_folder_of_runs_that_cannot_be_made_is_an_error_before_training(
    fedsim: Program, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    _, err = fedsim.ended("run", *SMALL, "--runs", "file/runs", code=6)
    assert "error[FS-ENV-020]" in err
    assert "--runs DIR" in err


def test_a_model_of_ones_own_is_found_in_the_current_folder(fedsim: Program, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\n"
        "def net(*, classes: int, width: int = 4) -> nn.Module:\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))\n"
    )
    own = (*SMALL[:-2], *QUIET_FOLDER, "--set", "model.target=mine:net", "--set", "model.width=6")
    out, _ = fedsim.ended("run", *own, "--name", "own", "--format", "json")
    run = tmp_path / document(out)["data"]["path"]
    assert (
        json.loads((run / "manifest.json").read_text())["facts"]["model_parameters"] == 64 * 6 + 6 + 60 + 10
    )
    fedsim.ended("verify", "own", "--rounds", "1")
    _, err = fedsim.ended("run", "--set", "model.target=mine:nothing", code=2)
    assert "FS-MOD-002" in err


@pytest.mark.slow
def test_tune_recommends_an_engine_that_a_run_takes(fedsim: Program, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        "[data.partition]\nclients = 4\n[round]\nsample = 2\n[run]\nrounds = 1\n"
    )
    out, _ = fedsim.ended("tune", "mine.toml", "--rounds", "1", "--out", "tuned.toml", "--format", "json")
    recommended = document(out)["data"]["recommended"]
    written = tomllib.loads((tmp_path / "tuned.toml").read_text())
    assert written == {"extends": "mine.toml", "engine": recommended}
    out, _ = fedsim.ended("config", "show", "tuned.toml", "--format", "json")
    shown = document(out)["data"]["config"]
    assert (shown["engine"]["name"], shown["round"]["sample"]) == (recommended["name"], 2)
    assert shown["engine"]["workers"] == recommended["workers"]

"""The program as a real process: runs, their folders, exit codes, signals, a pipe and a terminal."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

SMALL = (
    "--set", "run.rounds=3", "--set", "data.partition.clients=8", "--set", "round.sample=4",
    "--set", "model.name=mlp",
)  # fmt: skip
QUIET_FOLDER = ("--set", "output.report=false", "--set", "output.plots=false")


def start(folder: Path, *words: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedsim", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
        **more,
    )


def fedsim(folder: Path, *words: str, code: int = 0, **more: Any) -> tuple[str, str]:
    process = start(folder, *words, **more)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err


def document(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out)
    assert found["schema"] == 1
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["time"]
    return records


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with one complete run called `first`, and the document that the run printed."""
    folder = tmp_path_factory.mktemp("work")
    out, err = fedsim(folder, "run", *SMALL, "--name", "first", "--seed", "3", "--format", "json")
    assert "round 3/3" in err
    return folder, document(out)


def test_a_run_prints_one_document_with_its_result(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, found = finished
    assert found["status"] == "ok"
    data = found["data"]
    assert {"path", "outcome", "rounds", "final", "best", "seconds"} <= set(data)
    assert (data["outcome"], data["rounds"]) == ("ok", 3)
    assert {"accuracy", "loss"} <= set(data["final"])
    records = lines_of(folder / data["path"] / "metrics.jsonl")
    assert [r["round"] for r in records] == [0, 1, 2, 3]
    assert records[-1]["accuracy"] == data["final"]["accuracy"]
    assert max(r["accuracy"] for r in records) == data["best"]["value"]


def test_the_folder_holds_what_the_shown_configuration_says(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = finished
    run = folder / found["data"]["path"]
    shown, _ = fedsim(folder, "config", "show", *SMALL, "--set", "run.name=first", "--set", "run.seed=3")
    written, wanted = tomllib.loads((run / "config.toml").read_text()), tomllib.loads(shown)
    assert written.pop("engine")["name"] in ("loop", "stacked")
    assert wanted.pop("engine")["name"] == "auto"
    assert written == wanted
    for name in ("manifest.json", "clients.jsonl", "rounds.csv", "log.txt", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "checkpoints" / "final.safetensors").exists()


def test_the_run_is_listed_shown_verified_and_exported(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, found = finished
    listed = document(fedsim(folder, "ls", "--format", "json")[0])["data"]["runs"]
    assert [Path(run["path"]).name for run in listed] == [Path(found["data"]["path"]).name]
    shown, _ = fedsim(folder, "show", "first")
    assert "3 of 3, 0 failed" in shown
    assert "Next: fedsim" in shown
    assert "digit for digit" in fedsim(folder, "verify", "first")[0]
    files = document(fedsim(folder, "export", "first", "--to", "numpy", "--format", "json")[0])["data"]["files"]
    assert all((folder / file).stat().st_size > 0 for file in files)
    compared = document(fedsim(folder, "compare", "first", "--format", "json")[0])["data"]
    assert compared["metric"] == "accuracy"


def test_a_file_edited_after_the_run_does_not_verify(tmp_path: Path) -> None:
    out, _ = fedsim(tmp_path, "run", *SMALL, *QUIET_FOLDER, "--name", "x", "--format", "json")
    run = tmp_path / document(out)["data"]["path"]
    text = (run / "rounds.csv").read_text()
    (run / "rounds.csv").write_text(text.replace("ok", "OK"))
    out, err = fedsim(tmp_path, "verify", "x", "--rounds", "1", "--format", "json", code=1)
    data = document(out)["data"]
    assert (data["code"], data["changed"], data["differences"]) == ("FS-RUN-011", {"rounds.csv": "changed"}, [])
    assert "rounds.csv: changed" in err


def test_a_dry_run_checks_everything_and_writes_nothing(tmp_path: Path) -> None:
    out, _ = fedsim(tmp_path, "run", *SMALL, "--dry-run")
    assert tomllib.loads(out)["run"]["rounds"] == 3
    assert "model parameters" in out
    assert list(tmp_path.iterdir()) == []
    _, err = fedsim(tmp_path, "run", *SMALL, "--set", "round.sample=9", "--dry-run", code=2)
    assert "FS-CFG-061" in err


def test_jsonl_is_one_object_per_round_and_the_result_last(tmp_path: Path) -> None:
    out, _ = fedsim(tmp_path, "run", *SMALL, *QUIET_FOLDER, "--format", "jsonl")
    *rounds, last = [json.loads(line) for line in out.splitlines()]
    assert [r["data"]["round"] for r in rounds] == [0, 1, 2, 3]
    assert (last["final"], last["status"], last["data"]["outcome"]) == (True, "ok", "ok")


def test_a_run_that_is_extended_ends_like_one_that_was_longer(tmp_path: Path) -> None:
    fixed = (*SMALL, *QUIET_FOLDER, "--set", "evaluation.clients=never")
    fedsim(tmp_path, "run", *fixed, "--name", "short")
    again, _ = fedsim(tmp_path, "resume", "short")
    assert again.startswith("this run is complete")
    out, _ = fedsim(tmp_path, "resume", "short", "--rounds", "5", "--format", "json")
    short = tmp_path / document(out)["data"]["path"]
    out, _ = fedsim(tmp_path, "run", *fixed, "--set", "run.rounds=5", "--name", "long", "--format", "json")
    long = tmp_path / document(out)["data"]["path"]
    assert lines_of(short / "metrics.jsonl") == lines_of(long / "metrics.jsonl")
    assert tomllib.loads((short / "config.toml").read_text())["run"]["rounds"] == 5
    _, err = fedsim(tmp_path, "resume", "short", "--rounds", "4", code=2)
    assert "FS-CFG-023" in err


def interrupted(folder: Path, *, twice: bool) -> tuple[int, str, str]:
    """Start a long run, send Ctrl-C in its third round."""
    process = start(
        folder, "run", *SMALL, *QUIET_FOLDER, "--set", "run.rounds=100000", "--set", "client.epochs=2",
        "--set", "output.checkpoint_every=1", "--name", "long",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if line.startswith("round 2/"):
            break
    process.send_signal(signal.SIGINT)
    if twice:
        for line in process.stderr:  # the first one was taken in
            if line.startswith("stopping"):
                break
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_ctrl_c_once_commits_and_says_how_to_go_on(tmp_path: Path) -> None:
    code, out, err = interrupted(tmp_path, twice=False)
    assert code == 5, err
    assert "interrupted, can be resumed" in out
    assert "error[FS-INT-001]" in err
    assert "fedsim resume" in err
    (run,) = (tmp_path / "runs").iterdir()
    done = lines_of(run / "metrics.jsonl")[-1]["round"]
    out, _ = fedsim(tmp_path, "resume", "long", "--rounds", str(done + 2), "--format", "json")
    assert document(out)["data"]["rounds"] == done + 2
    assert [r["round"] for r in lines_of(run / "metrics.jsonl")] == list(range(done + 3))


def test_ctrl_c_twice_stops_at_once_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    code, _, err = interrupted(tmp_path, twice=True)
    # A round may end between the two signals; then the first one has done its work.
    assert code in (130, 5), err
    assert "FS-INT-00" in err
    (run,) = (tmp_path / "runs").iterdir()
    done = lines_of(run / "metrics.jsonl")[-1]["round"]
    out, _ = fedsim(tmp_path, "resume", "long", "--rounds", str(done + 3), "--format", "json")
    assert document(out)["data"]["outcome"] == "ok"
    assert [r["round"] for r in lines_of(run / "metrics.jsonl")] == list(range(done + 4))


def test_a_target_that_is_required_decides_the_exit_code(tmp_path: Path) -> None:
    words = ("run", *SMALL, *QUIET_FOLDER, "--require", "--set")
    out, _ = fedsim(tmp_path, *words, "evaluation.target=accuracy >= 0.01", "--format", "json")
    assert document(out)["data"]["outcome"] == "target"
    out, err = fedsim(tmp_path, *words, "evaluation.target=accuracy >= 1.0", "--format", "json", code=1)
    data = document(out)["data"]
    assert (data["code"], data["outcome"], data["rounds"]) == ("FS-RUN-010", "ok", 3)
    assert "FS-RUN-010" in err
    assert "FS-CFG-022" in fedsim(tmp_path, "run", "--require", code=2)[1]


def test_a_run_whose_answers_are_all_refused_fails_and_keeps_its_folder(tmp_path: Path) -> None:
    out, err = fedsim(
        tmp_path, "run", *SMALL, *QUIET_FOLDER, "--set", "client.lr=1e30", "--format", "json", code=1
    )
    data = document(out)["data"]
    assert (data["outcome"], data["code"]) == ("failed", "FS-RUN-003")
    assert data["not_counted"]["refused"] > 0
    assert "not finite" in err
    assert (tmp_path / data["path"] / "metrics.jsonl").exists()


@pytest.mark.parametrize("baseline", ["centralised", "local"])
def test_baselines_are_runs_of_the_same_configuration(tmp_path: Path, baseline: str) -> None:
    words = ("run", *SMALL, *QUIET_FOLDER, "--set", "strategy.name=fedprox", "--baseline", baseline)
    data = document(fedsim(tmp_path, *words, "--format", "json")[0])["data"]
    assert baseline in data["name"]
    last = lines_of(tmp_path / data["path"] / "metrics.jsonl")[-1]
    assert last["cohort"] == (1 if baseline == "centralised" else 8)
    if baseline == "local":
        first = lines_of(tmp_path / data["path"] / "metrics.jsonl")[0]
        assert last["loss"] == pytest.approx(first["loss"])  # nothing reaches the server
        assert data["over_clients"]["mean"] > data["final"]["accuracy"]
    out, _ = fedsim(tmp_path, "resume", data["name"], "--rounds", "4", "--format", "json")
    assert document(out)["data"]["rounds"] == 4


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_a_full_disk_is_one_error_and_what_was_written_stays_whole(tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))

    out, err = fedsim(tmp_path, "run", *SMALL, "--format", "json", code=6, preexec_fn=limit)
    assert document(out)["data"]["code"] == "FS-ENV-021"
    assert "free some space" in err
    for run in (tmp_path / "runs").iterdir():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
        assert not list(run.rglob(".writing-*"))


def test_a_folder_of_runs_that_cannot_be_made_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, err = fedsim(tmp_path, "run", *SMALL, "--runs", "file/runs", code=6)
    assert "error[FS-ENV-020]" in err
    assert "--runs DIR" in err


def test_a_closed_pipe_ends_nothing_but_the_output(tmp_path: Path) -> None:
    process = start(tmp_path, "run", *SMALL, *QUIET_FOLDER, "--name", "piped")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0, errors
    assert document(fedsim(tmp_path, "show", "piped", "--format", "json")[0])["data"]["outcome"] == "ok"


def test_colours_appear_on_a_terminal_only_and_not_with_the_variable(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")

    def on_a_terminal(environment: dict[str, str], *words: str) -> str:
        parent, child = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsim", *words],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=child,
            stderr=child,
            env={k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")} | environment,
        )
        os.close(child)
        shown = b""
        while True:
            try:
                piece = os.read(parent, 65536)
            except OSError:  # the terminal is gone with its last user
                break
            if not piece:
                break
            shown += piece
        process.wait(timeout=120)
        os.close(parent)
        return shown.decode()

    wrong = ("run", "--set", "run.rounds=x")
    assert "\x1b[1;31merror" in on_a_terminal({"TERM": "xterm"}, *wrong)
    assert "\x1b[" not in on_a_terminal({"TERM": "xterm", "NO_COLOR": "1"}, *wrong)
    assert "\x1b[" not in on_a_terminal({"TERM": "xterm"}, *wrong, "--no-color")
    live = on_a_terminal({"TERM": "xterm"}, "run", *SMALL, *QUIET_FOLDER)
    assert "round 3/3" in live
    assert live.rstrip().splitlines()[-1].startswith("Next: ")
    assert "\x1b[?25h" in live  # the cursor is shown again


def test_a_model_of_ones_own_is_found_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\n"
        "def net(*, classes: int, width: int = 4) -> nn.Module:\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))\n"
    )
    own = (*SMALL[:-2], *QUIET_FOLDER, "--set", "model.target=mine:net", "--set", "model.width=6")
    out, _ = fedsim(tmp_path, "run", *own, "--name", "own", "--format", "json")
    run = tmp_path / document(out)["data"]["path"]
    assert json.loads((run / "manifest.json").read_text())["facts"]["model_parameters"] == 64 * 6 + 6 + 60 + 10
    fedsim(tmp_path, "verify", "own", "--rounds", "1")
    _, err = fedsim(tmp_path, "run", "--set", "model.target=mine:nothing", code=2)
    assert "FS-MOD-002" in err


def test_tune_recommends_an_engine_that_a_run_takes(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[data.partition]\nclients = 4\n[round]\nsample = 2\n[run]\nrounds = 1\n")
    out, _ = fedsim(tmp_path, "tune", "mine.toml", "--rounds", "1", "--out", "tuned.toml", "--format", "json")
    recommended = document(out)["data"]["recommended"]
    written = tomllib.loads((tmp_path / "tuned.toml").read_text())
    assert written == {"extends": "mine.toml", "engine": recommended}
    out, _ = fedsim(tmp_path, "config", "show", "tuned.toml", "--format", "json")
    shown = document(out)["data"]["config"]
    assert (shown["engine"]["name"], shown["round"]["sample"]) == (recommended["name"], 2)

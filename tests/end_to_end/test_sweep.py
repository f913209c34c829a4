"""`fedsim sweep` as people use it: to its end, again, with processes, interrupted, with cells that fail."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli import call
from fedsim.runs.folder import RunFolder
from fedsim.runs.lock import is_locked
from tests.processes import SMALL, assert_told, fedsim, records, start, wait_for_lines

STUDY = (
    SMALL.replace("rounds = 3", "rounds = 2")
    + """
[sweep]
title = "Two strategies"
seeds = [1, 2]
[sweep.report]
target = 0.05
baseline = "plain"
[sweep.variants.plain]
[sweep.variants.prox]
strategy.name = "fedprox"
strategy.mu = 1.0
[sweep.full]
run.rounds = 100000
"""
)
CELLS = ["plain_seed-1", "prox_seed-1", "plain_seed-2", "prox_seed-2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``study.toml``, the current one."""
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """The document and stderr of ``fedsim sweep`` with these words, called in this process."""
    found = call(["sweep", *words, "--format", "json"])
    captured = capsys.readouterr()
    assert found == code, f"exit {found}\n{captured.out}\n{captured.err}"
    data: dict[str, Any] = json.loads(captured.out)["data"]
    return data, captured.err


def numbers(sweep: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of every cell without their times."""
    return {run.name: records(run) for run in sorted((sweep / "cells").iterdir()) if run.is_dir()}


def until(holds: Callable[[], bool]) -> None:
    """Look again and again until it holds; a minute is far more than it takes."""
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to hold")


def alive(group: int) -> list[str]:
    """Processes of a group that still run; those that nobody has buried yet do not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue  # it has just ended
        state, _, process_group = rest.split()[:3]
        if int(process_group) == group and state != "Z":
            found.append(name)
    return found


def test_a_sweep_runs_reports_and_is_passed_over_the_next_time(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, err = told(capsys, "study.toml")
    out = here / "runs" / "sweep-study"
    assert data["path"] == "runs/sweep-study"
    assert [c["cell"] for c in data["cells"]] == CELLS
    assert {c["state"] for c in data["cells"]} == {"done"}
    assert [line.split()[2] for line in err.splitlines() if line.startswith("cell ")] == CELLS
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == [
        "cells", "plot.csv", "plot.png", "plot.svg", "results.csv", "results.json", "table.md",
    ]  # fmt: skip
    assert sorted(p.name for p in (out / "cells").iterdir()) == sorted(CELLS)
    plain, prox = data["groups"]
    finals = [c["values"]["final_accuracy"] for c in data["cells"] if c["at"]["variant"] == "plain"]
    assert plain["values"]["final_accuracy"]["mean"] == pytest.approx(sum(finals) / 2)
    assert prox["done"] == 2
    assert data["differences"][0]["values"]["final_accuracy"]["seeds"] == 2

    runs = {name: RunFolder(out / "cells" / name) for name in CELLS}
    for name, run in runs.items():
        assert (run.status(), run.manifest["run"]["folder"]) == ("ok", name)
        assert run.changed_files() == {}
    # One seed, one start: what differs between variants is the strategy.
    for one, other in (CELLS[:2], CELLS[2:]):
        facts = [runs[name].manifest["facts"] for name in (one, other)]
        assert facts[0]["data_digest"] == facts[1]["data_digest"]
        assert runs[one].records()[0]["loss"] == runs[other].records()[0]["loss"]
    assert runs[CELLS[0]].records()[0]["loss"] != runs[CELLS[2]].records()[0]["loss"]

    before = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/metrics.jsonl")}
    table = (out / "table.md").read_bytes()
    again, err = told(capsys, "study.toml")
    assert again["groups"] == data["groups"]
    assert "4 ended before" in err
    assert "\ncell " not in err
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/metrics.jsonl")} == before
    assert (out / "table.md").read_bytes() == table

    status, _ = told(capsys, "study.toml", "--status")
    assert status["counts"]["done"] == 4
    (out / "table.md").unlink()
    told(capsys, "study.toml", "--report")
    assert (out / "table.md").read_bytes() == table
    # A cell is an ordinary run for the other commands.
    assert call(["show", str(out / "cells" / CELLS[0])]) == 0
    assert call(["verify", str(out / "cells" / CELLS[0])]) == 0
    assert call(["compare", "--runs", str(out / "cells"), *CELLS]) == 0
    assert "mean" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_how_many_processes_there_are(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(capsys, "study.toml", "--out", "one")
    told(capsys, "study.toml", "--out", "three", "--workers", "3")
    assert list(numbers(here / "one")) == sorted(CELLS)
    assert numbers(here / "one") == numbers(here / "three")
    for name in ("table.md", "plot.svg", "plot.csv"):
        assert (here / "one" / name).read_bytes() == (here / "three" / name).read_bytes()


def test_a_cell_gives_the_numbers_of_the_same_run_alone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(capsys, "study.toml", "--axis", "variant=prox", "--seeds", "2", "--set", "client.epochs=2",
         "--set", "output.report=false", code=2)  # fmt: skip
    (here / "study.toml").write_text(STUDY.replace('baseline = "plain"', ""))
    told(capsys, "study.toml", "--axis", "variant=prox", "--seeds", "2", "--set", "client.epochs=2")
    (here / "fedsim.toml").write_text(SMALL.replace("rounds = 3", "rounds = 2"))
    alone = [
        "run", "--seed", "2", "--set", "strategy.name=fedprox", "--set", "strategy.mu=1.0", "--set",
        "client.epochs=2", "--runs", "alone",
    ]  # fmt: skip
    assert call(alone) == 0
    (run,) = (here / "alone").iterdir()
    assert numbers(here / "runs" / "sweep-study") == {"prox_seed-2": records(run)}


def test_a_dry_run_lists_every_cell_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, _ = told(capsys, "study.toml", "--size", "full", "--axis", "client.lr=0.1,0.2", "--dry-run")
    assert [c["at"]["client.lr"] for c in data["cells"]] == [0.1, 0.1, 0.2, 0.2] * 2
    assert {c["config"]["run"]["rounds"] for c in data["cells"]} == {100000}
    assert data["path"] == "runs/sweep-study-full"
    assert sorted(p.name for p in here.iterdir()) == ["study.toml"]


def test_a_wrong_cell_is_refused_before_any_cell_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, _ = told(capsys, "study.toml", "--axis", "round.sample=4,40", code=2)
    assert data["code"] == "FS-CFG-061"
    assert "plain_round.sample-40_seed-1" in data["where"]
    told(capsys, "study.toml", "--report", code=2)
    told(capsys, "study.toml", "--report", "--status", code=2)
    assert sorted(p.name for p in here.iterdir()) == ["study.toml"]


OWN = """
import os, sys
from torch import nn
print("a word of the model")
class Net(nn.Linear):
    def __init__(self):
        super().__init__(600, 2)
        if os.path.exists("die"):
            sys.stderr.write("about to die")
            sys.stderr.flush()
            os._exit(7)
"""


def test_failing_cells_are_told_and_the_others_go_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "own.py").write_text(OWN)
    text = SMALL.replace("features = 600", "features = 600\nclasses = 2").replace("rounds = 3", "rounds = 1")
    (here / "own.toml").write_text(
        text.replace('name = "logistic"', "")
        + """
[sweep]
seeds = [1]
[sweep.variants.dies]
model.target = "own:Net"
[sweep.variants.diverges]
model.name = "logistic"
client.lr = 1e38
[sweep.variants.missing]
model.target = "nowhere:Net"
[sweep.variants.works]
model.name = "logistic"
"""
    )
    (here / "die").touch()
    data, err = told(capsys, "own.toml", code=1)
    assert data["code"] == "FS-SWP-009"
    assert "3 of 4 cells failed" in data["what"]
    states = {c["at"]["variant"]: (c["state"], (c["error"] or {}).get("code")) for c in data["cells"]}
    assert states["works"] == ("done", None)
    assert states["dies"] == ("failed", "FS-SWP-010")
    assert states["diverges"][0] == states["missing"][0] == "failed"
    assert str(states["diverges"][1]).startswith("FS-RUN-")
    assert str(states["missing"][1]).startswith("FS-MOD-")
    out = here / "runs" / "sweep-own"
    table = (out / "table.md").read_text()
    assert "0 of 1, 1 failed" in table
    assert "- dies_seed-1: FS-SWP-010 the process of the cell died (with exit code 7)" in table
    printed = (out / "cells" / "dies_seed-1.txt").read_text()
    assert "a word of the model" in printed
    assert "about to die" in printed
    assert "about to die" not in err

    # What the machine did is tried again, what the numbers did is not, unless one asks.
    (here / "die").unlink()
    data, err = told(capsys, "own.toml", code=1)
    assert "2 of 4 cells failed" in data["what"]
    assert [line.split()[2] for line in err.splitlines() if line.startswith("cell ")] == [
        "dies_seed-1", "missing_seed-1",
    ]  # fmt: skip
    assert not (out / "cells" / "dies_seed-1.error").exists()
    _, err = told(capsys, "own.toml", "--retry", code=1)
    assert "diverges_seed-1  failed" in err


def test_ctrl_c_once_saves_says_how_to_go_on_and_gives_the_numbers_of_a_sweep_without_a_stop(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("sweep", "study.toml", "--out", "stopped", "--set", "output.checkpoint_every=5")
    going = start(here, *words, "--size", "full", "--workers", "2")
    run = wait_for_lines(going, here / "stopped" / "cells", 8)
    going.send_signal(signal.SIGINT)
    out, err = going.communicate(timeout=240)
    assert going.returncode == 5, f"{out}\n{err}"
    assert "error[FS-INT-001]: interrupted after 0 of 4 cells" in err
    assert "help: go on with fedsim sweep study.toml --size full" in err
    assert "--out stopped --workers 2" in err
    assert "4 of 4 cells are not done" in out
    cells = [RunFolder(p) for p in (here / "stopped" / "cells").iterdir() if p.is_dir()]
    assert run.name in {c.path.name for c in cells}
    assert all(c.status() == "interrupted" for c in cells)

    # The same sweep with an end in sight: the interrupted rounds are kept and the rest is added.
    rounds = max(c.latest()["round"] for c in cells if c.latest()) + 3  # type: ignore[index]
    (here / "study.toml").write_text(STUDY.replace("rounds = 2", f"rounds = {rounds}"))
    for cell in cells:
        config = cell.path / "config.toml"
        config.write_text(config.read_text().replace("rounds = 100000", f"rounds = {rounds}"))
    told(capsys, *words[1:])
    told(capsys, "study.toml", "--out", "whole")
    assert numbers(here / "stopped") == numbers(here / "whole")
    sessions = [len(RunFolder(c.path).manifest["sessions"]) for c in cells]
    assert sessions == [2] * len(cells)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes by /proc")
def test_ctrl_c_twice_stops_at_once_and_leaves_no_process(here: Path) -> None:
    words = ("sweep", "study.toml", "--size", "full", "--workers", "2", "--set", "client.epochs=300")
    going = start(here, *words, start_new_session=True)
    wait_for_lines(going, here / "runs" / "sweep-study-full" / "cells", 2)
    going.send_signal(signal.SIGINT)
    for line in going.stderr:  # the first one was taken in
        if line.startswith("stopping"):
            break
    going.send_signal(signal.SIGINT)
    out, err = going.communicate(timeout=240)
    # The rounds may end between the two signals; then the first one has done its work.
    assert going.returncode in (130, 5), f"{out}\n{err}"
    assert "FS-INT-00" in err
    assert "go on with fedsim sweep study.toml" in err
    until(lambda: alive(going.pid) == [])


@pytest.mark.slow
def test_a_sweep_that_is_killed_takes_its_cells_along_and_can_go_on(here: Path) -> None:
    words = ("sweep", "study.toml", "--size", "full")
    going = start(here, *words, start_new_session=True)
    run = wait_for_lines(going, here / "runs" / "sweep-study-full" / "cells", 3)
    second = fedsim(here, *words)
    assert_told(second, code="FS-SWP-011", exit_code=6, naming=("sweep-study-full",))
    going.kill()
    going.communicate(timeout=60)
    # Its end of the pipe is gone: the cell saves and ends by itself.
    until(lambda: RunFolder(run).status() == "interrupted" and not is_locked(run))
    before = len(records(run))
    again = start(here, *words)
    wait_for_lines(again, here / "runs" / "sweep-study-full" / "cells", before + 3)
    again.send_signal(signal.SIGTERM)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 5, f"{out}\n{err}"
    assert [s["outcome"] for s in RunFolder(run).manifest["sessions"]] == ["interrupted"] * 2
    assert [r["round"] for r in records(run)] == list(range(len(records(run))))

"""A coordinator killed at each of its fail points goes on as if nothing had happened (R1 to R6, R29)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsim.server.failpoints import KILLED, POINTS
from tests.fleet import toml_of
from tests.wired import config

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parent.parent / "crashing_run.py"
ROUNDS = 4
# Points of the service's own are reached by what crosses a socket.
OF_UPLOADS = {"object_renamed", "upload_synced"}
HERE = sorted(set(POINTS) - OF_UPLOADS)
ONCE = ["before_finish", "after_end"]
"""Reached at the end of a run alone."""
EVERY_ROUND = [point for point in HERE if point not in (*ONCE, "after_settle")]


def cases(folder: Path, values: dict[str, Any], points: list[list[str]]) -> list[dict[str, Any]]:
    """What became of each case."""
    wanted = {"config": toml_of(values), "clients": 4, "cases": points}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(case["codes"][-1] == 0 for case in found), done.stderr
    return found


def settings(strategy: str, **tables: Any) -> dict[str, Any]:
    values = config(strategy, **tables)
    values["run"]["rounds"] = ROUNDS
    values["round"].setdefault("sample", 4)
    values["output"] = {"report": False, "plots": False}
    values["deployment"] = {"min_clients": 4, **tables.get("deployment", {})}
    return values


def test_a_round_goes_on_after_a_crash_at_each_point_to_the_very_same_model(tmp_path: Path) -> None:
    values = settings("scaffold")
    points = [[]] + [[f"{point}:2"] for point in EVERY_ROUND]
    points += [*([point] for point in ONCE), ["after_plan:2", "after_state:2", "after_accept:3"]]
    whole, *crashed = cases(tmp_path, values, points)
    assert whole["state"] == "ok"
    assert whole["digest"] == whole["replayed"]
    for case in crashed:
        assert case["codes"][:-1] == [KILLED] * len(case["points"]), case
        same = ("state", "digest", "replayed", "rounds", "received", "clients")
        assert {n: case[n] for n in same} == {n: whole[n] for n in same}, case["points"]


def test_a_round_that_closes_without_everybody_closes_with_the_same_answers_again(tmp_path: Path) -> None:
    values = settings("fedavg", round={"sample": 2, "overcommit": 2.0})
    for case in cases(tmp_path, values, [["after_settle:2"], ["one_folded:3"], ["after_commit:2"]]):
        assert case["codes"] == [KILLED, 0]
        assert (case["state"], case["digest"]) == ("ok", case["replayed"])


@pytest.mark.parametrize("every", [1, 3])
def test_an_asynchronous_run_equals_the_replay_of_its_ledger_after_crashes(
    tmp_path: Path, every: int
) -> None:
    values = settings(
        "fedbuff",
        scheduler={"name": "buffer", "size": 2},
        round={"sample": 3},
        deployment={"checkpoint_every": every},
    )
    values["run"]["rounds"] = 7
    points = [["after_commit:3"], ["after_plan:3"], ["one_folded:3"]]
    if every > 1:
        points = [[f"{point}:2"] for point in EVERY_ROUND] + [[point] for point in ONCE]
    for case in cases(tmp_path, values, [*points, ["after_accept:2", "after_plan:4", "one_folded:5"]]):
        assert case["codes"][-1] == 0
        assert KILLED in case["codes"], case["points"]
        assert (case["state"], case["digest"]) == ("ok", case["replayed"]), case["points"]
        assert case["received"] == case["replayed_received"]
        assert case["rounds"] == list(range(8))

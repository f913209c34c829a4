"""What there is of a sweep on disk, and what the next call does with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.errors import ConfigError, EnvironmentProblem
from fedsim.runs.folder import CONFIG, MANIFEST
from fedsim.sweep.run import held, to_do
from fedsim.sweep.state import STARTING, Place
from tests.unit.sweep.conftest import MakePlan, curve, fill

SEEDS = "[run]\nrounds = 3\n[sweep]\nseeds = '1..5'\n"


def test_what_is_done_or_failed_is_passed_over_and_the_rest_is_taken_up(
    planned: MakePlan, tmp_path: Path
) -> None:
    plan, place = planned(SEEDS), Place(tmp_path / "out")
    fill(place, plan, "seed-1", curve([0.1, 0.2]))
    fill(place, plan, "seed-2", curve([0.1, 0.2]), outcome="failed", error={"code": "FS-RUN-003"})
    fill(place, plan, "seed-3", curve([0.1, 0.2]), outcome="interrupted")
    fill(place, plan, "seed-4", curve([0.1]), outcome=None)
    assert [place.state(c.name).word for c in plan.cells] == [
        "done", "failed", "interrupted", "interrupted", "waiting",
    ]  # fmt: skip
    assert [c.name for c in to_do(plan, place, retry=False)] == ["seed-3", "seed-4", "seed-5"]
    assert [c.name for c in to_do(plan, place, retry=True)] == ["seed-2", "seed-3", "seed-4", "seed-5"]


@pytest.mark.parametrize("outcome", ["target", "early_stop", "clock_limit"])
def test_every_end_of_its_own_is_an_end(outcome: str, planned: MakePlan, tmp_path: Path) -> None:
    plan, place = planned(SEEDS), Place(tmp_path / "out")
    fill(place, plan, "seed-1", curve([0.1, 0.2]), outcome=outcome)
    assert place.state("seed-1").word == "done"


def test_a_cell_whose_process_died_is_failed_and_tried_again(planned: MakePlan, tmp_path: Path) -> None:
    plan, place = planned(SEEDS), Place(tmp_path / "out")
    fill(place, plan, "seed-1", curve([0.1]), outcome=None)
    place.keep_error("seed-1", {"code": "FS-SWP-010", "what": "the process died"})
    place.keep_error("seed-2", {"code": "FS-MOD-001", "what": "no model"})
    for name in ("seed-1", "seed-2"):
        assert place.state(name).word == "failed"
        assert place.state(name).error
    assert {c.name for c in to_do(plan, place, retry=False)} >= {"seed-1", "seed-2"}
    place.keep_error("seed-2", None)
    assert place.state("seed-2").word == "waiting"


def test_a_run_of_another_configuration_is_refused_with_the_keys_that_differ(
    planned: MakePlan, tmp_path: Path
) -> None:
    plan, place = planned(SEEDS), Place(tmp_path / "out")
    fill(place, plan, "seed-2", curve([0.1, 0.2]))
    other = planned(SEEDS, sets=("client.lr=0.7", "run.rounds=9", "output.report=true"))
    with pytest.raises(ConfigError) as caught:
        to_do(other, place, retry=False)
    assert caught.value.code == "FS-SWP-008"
    assert "client.lr: 0.2 then, 0.7 now" in str(caught.value)
    assert "run.rounds: 3 then, 9 now" in str(caught.value)
    assert "output" not in str(caught.value.why)
    assert to_do(planned(SEEDS), place, retry=False)


def test_a_key_that_fedsim_has_learned_since_does_not_make_another_run_of_it(
    planned: MakePlan, tmp_path: Path
) -> None:
    plan, place = planned(SEEDS), Place(tmp_path / "out")
    folder = fill(place, plan, "seed-1", curve([0.1, 0.2]))
    manifest = folder.path / MANIFEST
    manifest.write_text(manifest.read_text().replace(plan.cells[0].digest, "0" * 64))
    written = (folder.path / CONFIG).read_text()
    (folder.path / CONFIG).write_text(
        written.replace("max_failed = 3\n", "").replace('name = "auto"', 'name = "fused"')
    )
    place.check(plan.cells)


def test_two_sweeps_do_not_write_into_one_folder(tmp_path: Path) -> None:
    place = Place(tmp_path / "out")
    with held(place), pytest.raises(EnvironmentProblem) as caught, held(place):
        pass
    assert caught.value.code == "FS-SWP-011"
    with held(place):
        pass


def test_what_a_killed_process_was_about_to_begin_is_cleared_away(tmp_path: Path) -> None:
    place = Place(tmp_path / "out")
    place.prepare()
    (place.cells / f"{STARTING}abcd" / "run").mkdir(parents=True)
    with held(place):
        assert list(place.cells.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EnvironmentProblem) as caught, held(Place(tmp_path / "out")):
        pass
    assert caught.value.code == "FS-ENV-020"

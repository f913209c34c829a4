from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedsim.errors import ConfigError
from fedsim.runs.compare import compare, comparison_figure, save_comparison
from fedsim.runs.folder import RunFolder
from fedsim.runs.theme import style

MakeRun = Callable[..., RunFolder]


def test_runs_that_differ_only_in_their_seed_are_one_row_with_mean_and_deviation(make_run: MakeRun) -> None:
    # After two rounds 0.1 + 0.2 * 2 + shift: 0.5, 0.52, 0.54; mean 0.52, sample deviation 0.02.
    same = [make_run("a", seed=s, rounds=2, shift=0.02 * s) for s in range(3)]
    other = make_run("b", alpha=1.0, rounds=2)
    found = compare([*same, other])
    first, second = found.groups
    assert (first.label, second.label) == ("a", "b")
    assert first.seeds == (0, 1, 2)
    assert first.final is not None
    assert first.final.mean == pytest.approx(0.52)
    assert first.final.deviation == pytest.approx(0.02)
    assert second.final is not None
    assert second.final.deviation is None
    assert first.differs == {"data.partition.alpha": 0.3}
    assert second.differs == {"data.partition.alpha": 1.0}
    header, rows = found.table()
    assert header == ["run", "seeds", "final accuracy", "best accuracy", "rounds", "time", "bytes",
                      "data.partition.alpha"]  # fmt: skip
    assert rows[0] == ["a", "3", "0.52 ± 0.02", "0.52 ± 0.02", "2", "1.5 s", "1 kB", "0.3"]
    assert rows[1][2] == "0.5"
    json.dumps(found.document(), allow_nan=False)


def test_a_run_given_twice_counts_once(make_run: MakeRun) -> None:
    run = make_run()
    assert compare([run, RunFolder(run.path)]).groups[0].folders == (run.path.name,)


def test_groups_of_one_name_are_told_apart(make_run: MakeRun) -> None:
    found = compare([make_run("a"), make_run("a", alpha=1.0)])
    assert [group.label for group in found.groups] == ["a (1)", "a (2)"]


def test_a_loss_is_best_where_it_is_smallest(make_run: MakeRun) -> None:
    group = compare([make_run(rounds=3)], metric="loss").groups[0]
    assert group.best is not None
    assert group.best.mean == 0.25


def test_seeds_of_different_length_are_averaged_over_the_rounds_they_share(make_run: MakeRun) -> None:
    found = compare([make_run(seed=1, rounds=2), make_run(seed=2, rounds=4, shift=0.1)])
    with style():
        line = comparison_figure(found).axes[0].get_lines()[0]
    np.testing.assert_allclose(line.get_xydata(), [[0, 0.15], [1, 0.35], [2, 0.55]])


def test_the_picture_comes_with_the_numbers_of_every_run(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a", seed=1), make_run("a", seed=2), make_run("b", alpha=1.0)]
    paths = save_comparison(compare(runs), tmp_path / "fedavg.v1.svg")
    assert [p.name for p in paths] == ["fedavg.v1.svg", "fedavg.v1.png", "fedavg.v1.csv"]
    with paths[2].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5
    assert rows[0] == {"group": "a", "run": runs[0].path.name, "seed": "1", "round": "0", "accuracy": "0.1"}


def test_nothing_to_compare_is_an_error(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError) as none:
        compare([])
    with pytest.raises(ConfigError) as unknown:
        compare([make_run()], metric="auc")
    assert none.value.code == unknown.value.code == "FS-CFG-094"
    assert "accuracy" in (unknown.value.why or "")


def test_a_run_that_never_measured_the_metric_has_no_value_beside_one_that_did(make_run: MakeRun) -> None:
    bare = make_run("bare", alpha=9.0, finished=False)
    bare.truncate(-1)
    bare.append_record({"round": 1, "outcome": "ok", "accuracy": math.nan})
    found = compare([make_run("a"), bare])
    assert found.groups[1].final is None
    assert found.table()[1][1][2] == "–"
    with style():
        assert len(comparison_figure(found).axes[0].get_lines()) == 1

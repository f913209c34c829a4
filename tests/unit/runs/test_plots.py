from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.data.dataset import Dataset, Split, make_dataset
from fedsim.data.federated import FederatedData
from fedsim.data.transforms import Transforms
from fedsim.errors import EnvironmentProblem
from fedsim.runs import compare, curves, measures, plots, spread, theme
from fedsim.runs.folder import RunFolder

MakeRun = Callable[..., RunFolder]
HOSTILE = '<script>alert("x")</script> $\\frac$ & \x1b[2J'


def tiny_data(clients: int, names: tuple[str, ...] = ()) -> FederatedData:
    """Two examples of three classes for each client."""
    examples = 2 * clients
    train = Split(torch.zeros(examples, 2), torch.arange(examples) % 3)
    plain = Transforms(train=lambda x, keys: x, evaluate=lambda x: x, random=False)
    dataset: Dataset = make_dataset(
        "tiny", "classification", train=train, test=None, transforms=plain, classes=3
    )
    index = np.arange(examples, dtype=np.int64)
    offsets = np.arange(0, examples + 1, 2, dtype=np.int64)
    return FederatedData(dataset, index, offsets, names=names, description="by hand, seed 0")


def evaluation(clients: int) -> dict[str, object]:
    accuracy = np.linspace(1.0, 0.2, clients)
    accuracy[-1] = np.nan
    return {
        "client": np.arange(clients, dtype=np.float64),
        "accuracy": accuracy,
        "examples": np.full(clients, 2),
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_picture_is_there_as_svg_and_png_with_its_numbers(make_run: MakeRun) -> None:
    run = make_run()
    drawn = plots.draw(run, data=tiny_data(20), client_evaluation=evaluation(20))
    assert drawn == ["accuracy", "loss", "fairness", "communication", "partition"]
    for name in drawn:
        svg, png = (run.path / "plots" / f"{name}.{ending}" for ending in ("svg", "png"))
        assert ET.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    accuracy = rows_of(run.path / "plots/accuracy.csv")
    assert [(r["round"], float(r["accuracy"])) for r in accuracy] == [
        (str(r["round"]), r["accuracy"]) for r in run.records()
    ]
    sent = rows_of(run.path / "plots/communication.csv")
    assert [int(r["bytes_down"]) for r in sent] == [0, 300, 300, 300, 300]
    fairness = rows_of(run.path / "plots/fairness.csv")
    assert [r["client"] for r in fairness] == [str(i) for i in range(20)]
    assert (float(fairness[0]["accuracy"]), fairness[-1]["accuracy"]) == (1.0, "")


def test_drawing_again_from_the_folder_alone_gives_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run()
    first = plots.draw(run, data=tiny_data(20), client_evaluation=evaluation(20))
    before = {p.name: p.read_bytes() for p in (run.path / "plots").iterdir()}
    assert plots.draw(run) == first
    assert {p.name: p.read_bytes() for p in (run.path / "plots").iterdir()} == before


def test_a_run_without_evaluation_has_only_the_pictures_that_it_has_numbers_for(make_run: MakeRun) -> None:
    run = make_run(finished=False)
    run.truncate(-1)
    run.append_record({"round": 1, "outcome": "ok", "bytes_down": 5, "bytes_up": 5})
    assert plots.draw(run) == ["communication"]


def test_a_run_of_one_record_and_a_run_without_records_can_be_drawn(make_run: MakeRun) -> None:
    run = make_run(rounds=0, finished=False)
    assert plots.draw(run) == ["accuracy", "loss"]
    run.truncate(-1)
    assert RunFolder(run.path).records() == []
    plots.draw(run)


def test_a_metric_with_a_hostile_name_leaves_the_folder_alone(make_run: MakeRun) -> None:
    run = make_run(rounds=0, finished=False)
    run.update_facts({"metrics": ["../../evil"]})
    run.append_record({"round": 1, "../../evil": 0.5})
    assert "evil" in plots.draw(run)
    assert (run.path / "plots/evil.svg").exists()


def test_the_target_is_drawn_where_it_is_of_the_metric(make_run: MakeRun) -> None:
    run = make_run()
    plots.draw(run)
    assert "target 0.8" in (run.path / "plots/accuracy.svg").read_text()
    assert "target" not in (run.path / "plots/loss.svg").read_text()


def test_names_of_clients_are_literal_text_in_the_numbers_and_no_formulas(make_run: MakeRun) -> None:
    run = make_run()
    names = (HOSTILE, "=cmd()", "Ünïcode", "+1")
    plots.draw(run, data=tiny_data(4, names), client_evaluation=evaluation(4))
    assert [r["name"] for r in rows_of(run.path / "plots/fairness.csv")] == [
        HOSTILE,
        "'=cmd()",
        "Ünïcode",
        "'+1",
    ]


@pytest.mark.parametrize("clients", [1, 3, 59, 61, 1000, 100_000])
def test_fairness_of_any_number_of_clients_is_a_picture_of_bounded_size(tmp_path: Path, clients: int) -> None:
    found = measures.fairness(np.linspace(0, 1, clients))
    assert found is not None
    with theme.style():
        svg, _ = theme.save(spread.fairness_figure(found, "accuracy"), tmp_path, "fairness")
    assert svg.stat().st_size < 100_000
    assert "worst 10" in svg.read_text()


def test_a_thousand_rounds_do_not_crowd_a_picture_with_markers(tmp_path: Path) -> None:
    records = [{"round": k, "accuracy": k / 1000} for k in range(1001)]
    with theme.style():
        drawing = curves.metric_figure(records, "accuracy")
        assert drawing is not None
        svg, _ = theme.save(drawing, tmp_path, "accuracy")
    assert svg.read_text().count("<use") < 60


def test_lines_differ_in_more_than_colour() -> None:
    records = [{"round": k, "loss": 1.0 + k, "train_loss": 2.0 + k} for k in range(5)]
    with theme.style():
        drawing = curves.loss_figure(records)
    assert drawing is not None
    test, training = drawing.axes[0].get_lines()
    assert test.get_linestyle() != training.get_linestyle()
    assert test.get_marker() != training.get_marker()


def test_losses_over_many_decades_are_on_a_logarithmic_axis_with_plain_numbers(tmp_path: Path) -> None:
    records = [{"round": k, "loss": 10.0**-k} for k in range(5)]
    with theme.style():
        drawing = curves.loss_figure(records)
        assert drawing is not None
        svg, _ = theme.save(drawing, tmp_path, "loss")
    assert drawing.axes[0].get_yscale() == "log"
    assert ">0.01<" in svg.read_text()


def test_drawing_leaves_the_settings_of_matplotlib_as_they_were(make_run: MakeRun) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.draw(make_run())
    assert dict(matplotlib.rcParams) == before


def test_pictures_that_cannot_be_written_are_an_error(make_run: MakeRun) -> None:
    run = make_run()
    (run.path / "plots").rmdir()
    (run.path / "plots").write_text("in the way")
    with pytest.raises(EnvironmentProblem) as caught:
        plots.draw(run)
    assert caught.value.code == "FS-ENV-020"


def test_a_hostile_label_in_a_comparison_is_drawn_as_text(make_run: MakeRun, tmp_path: Path) -> None:
    comparison = compare.compare([make_run(HOSTILE), make_run("plain", alpha=1.0)])
    svg = compare.save_comparison(comparison, tmp_path / "both.svg")[0]
    texts = [element.text or "" for element in ET.parse(svg).iter() if element.tag.endswith("text")]
    assert any('<script>alert("x")</script> $\\frac$ & ?[2J' in text for text in texts)

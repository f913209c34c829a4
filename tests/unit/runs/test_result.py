from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from fedsim.errors import ConfigError, EnvironmentProblem, ModelError
from fedsim.runs.folder import RunFolder
from fedsim.runs.result import RunResult

MakeRun = Callable[..., RunFolder]


def test_a_result_has_the_outcome_and_the_numbers_of_its_run(make_run: MakeRun) -> None:
    run = make_run()
    result = RunResult.open(run.path)
    assert (result.path, result.outcome, result.seconds) == (run.path, "ok", 2.5)
    assert result.records == run.records()
    assert result.final == {"accuracy": 0.9, "loss": 0.125}
    assert result.metric == "accuracy"
    assert result.best() == result.best("accuracy") == pytest.approx(0.9)
    assert result.best("loss") == 0.125
    assert str(run.path.name) in repr(result)
    assert "records" not in repr(result)


@pytest.mark.parametrize("metric", [None, "accuracy", "loss", "train_loss", "communication"])
def test_a_result_draws_itself(make_run: MakeRun, metric: str | None) -> None:
    drawing = RunResult.open(make_run().path).plot(metric)
    assert isinstance(drawing, Figure)
    assert drawing.axes[0].get_lines()


def test_a_metric_that_was_never_measured_is_an_error_that_lists_the_others(make_run: MakeRun) -> None:
    result = RunResult.open(make_run().path)
    for act in (result.best, result.plot):
        with pytest.raises(ConfigError) as caught:
            act("auc")
        assert caught.value.code == "FS-CFG-093"
        assert "accuracy" in (caught.value.why or "")


def test_a_notebook_shows_the_result_with_its_curve_and_every_text_escaped(make_run: MakeRun) -> None:
    html = RunResult.open(make_run("<b>&").path)._repr_html_()
    assert "best accuracy" in html
    assert "<svg" in html
    assert "<b>&" not in html


def test_a_run_without_evaluation_is_shown_without_a_curve(make_run: MakeRun) -> None:
    run = make_run(finished=False)
    run.truncate(-1)
    html = RunResult.open(run.path)._repr_html_()
    assert "stopped" in html
    assert "<svg" not in html


def test_the_model_of_a_run_started_from_python_is_a_copy_with_the_trained_weights(make_run: MakeRun) -> None:
    run, module = make_run(), nn.Linear(2, 1)
    run.save_model({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, "final")
    run.save_model({"weight": torch.full((1, 2), 2.0), "bias": torch.zeros(1)}, "best")
    result = RunResult.open(run.path, module=module)
    trained = result.model()
    assert trained.state_dict()["weight"].tolist() == [[1.0, 1.0]]
    assert result.model("best").state_dict()["weight"].tolist() == [[2.0, 2.0]]
    assert not trained.training
    assert trained is not module
    assert module.weight.tolist() != [[1.0, 1.0]]


def test_a_run_opened_from_its_folder_gives_tensors_and_says_how_to_get_the_model(make_run: MakeRun) -> None:
    run = make_run()
    run.save_model({"weight": torch.ones(1, 2)}, "final")
    result = RunResult.open(run.path)
    assert result.tensors()["weight"].tolist() == [[1.0, 1.0]]
    with pytest.raises(ModelError) as caught:
        result.model()
    assert caught.value.code == "FS-MOD-039"
    assert "load_state_dict" in (caught.value.hint or "")
    with pytest.raises(EnvironmentProblem) as absent:
        result.tensors("best")
    assert absent.value.code == "FS-ENV-026"

"""Does a model fit its data: one batch, shapes compared, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.errors import ModelError
from fedsim.models import check_model, has_batchnorm, has_dropout

IMAGES = torch.rand(4, 1, 8, 8)
CLASSES = torch.tensor([0, 1, 2, 2])
TEXT = torch.randint(0, 30, (4, 12))


class Returns(nn.Module):
    """Answers every batch with the same thing."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, inputs: Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "targets", "task", "classes"),
    [
        (torch.zeros(4, 3), CLASSES, "classification", 3),
        (torch.zeros(4, 2), CLASSES % 2, "binary", 2),
        (torch.zeros(4, 12, 30), TEXT, "next-token", 30),
        (torch.zeros(4), torch.rand(4), "regression", None),
        (torch.zeros(4, 1), torch.rand(4), "regression", None),
        (torch.zeros(4, 3, dtype=torch.float64), CLASSES, "classification", 3),
    ],
)
def test_outputs_that_fit_are_accepted(
    answer: Tensor, targets: Tensor, task: str, classes: int | None
) -> None:
    check_model(Returns(answer), IMAGES, targets=targets, task=task, classes=classes)


@pytest.mark.parametrize(
    ("answer", "targets", "task", "classes", "hint"),
    [
        (torch.zeros(4, 2), CLASSES, "classification", 3, "last layer 3 wide"),
        (torch.zeros(4, 5), CLASSES, "classification", 3, "last layer 3 wide"),
        (torch.zeros(4, 1), CLASSES % 2, "binary", 2, "two outputs"),
        (torch.zeros(4), CLASSES % 2, "binary", 2, "two outputs"),
        (torch.zeros(4, 30), TEXT, "next-token", 30, "every position"),
        (torch.zeros(4, 12, 30), CLASSES, "classification", 30, "last position only"),
        (torch.zeros(3, 3), CLASSES, "classification", 3, "one row of outputs"),
        (torch.zeros(3), CLASSES, "classification", 3, "one row of outputs"),
        (torch.zeros(4, 2), torch.rand(4), "regression", None, "one row of outputs"),
        (torch.zeros(4, 3, dtype=torch.int64), CLASSES, "classification", 3, "3 wide"),
    ],
)
def test_outputs_that_do_not_fit_are_refused_with_both_shapes(
    answer: Tensor, targets: Tensor, task: str, classes: int | None, hint: str
) -> None:
    with pytest.raises(ModelError, match="does not fit the labels") as caught:
        check_model(Returns(answer), IMAGES, targets=targets, task=task, classes=classes)
    assert caught.value.code == "FS-MOD-007"
    assert f"got {list(answer.shape)}" in str(caught.value.why)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("answer", [(torch.zeros(4, 3), torch.zeros(1)), {"logits": 1}, None])
def test_anything_but_one_tensor_is_refused(answer: Any) -> None:
    with pytest.raises(ModelError, match="does not return one tensor") as caught:
        check_model(Returns(answer), IMAGES, targets=CLASSES, task="classification", classes=3)
    assert caught.value.code == "FS-MOD-007"


def test_a_forward_pass_that_fails_says_what_the_inputs_were() -> None:
    with pytest.raises(ModelError) as caught:
        check_model(nn.Linear(64, 3), IMAGES, targets=CLASSES, task="classification", classes=3)
    assert caught.value.code == "FS-MOD-006"
    assert "inputs: [4, 1, 8, 8] float32" in str(caught.value.why)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_before_training_are_refused(value: float) -> None:
    answer = torch.zeros(4, 3)
    answer[1, 2] = value
    with pytest.raises(ModelError, match="not finite") as caught:
        check_model(Returns(answer), IMAGES, targets=CLASSES, task="classification", classes=3)
    assert caught.value.code == "FS-MOD-008"
    assert "1 of 12" in str(caught.value.why)


def test_the_check_leaves_buffers_mode_and_random_numbers_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    check_model(model, IMAGES, targets=CLASSES, task="classification", classes=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (nn.BatchNorm1d(2), True),
        (nn.Sequential(nn.Sequential(nn.BatchNorm2d(2))), True),
        (nn.SyncBatchNorm(2), True),
        (nn.GroupNorm(1, 2), False),
        (nn.LayerNorm(2), False),
        (nn.InstanceNorm2d(2), False),
    ],
)
def test_batch_normalisation_is_found(module: nn.Module, found: bool) -> None:
    assert has_batchnorm(module) == found


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (nn.Dropout(0.1), True),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout2d(0.1)), True),
        (nn.Dropout(0.0), False),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.3), True),
        (nn.LSTM(2, 2), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), False),
        (nn.Linear(2, 2), False),
    ],
)
def test_dropout_is_found(module: nn.Module, found: bool) -> None:
    assert has_dropout(module) == found

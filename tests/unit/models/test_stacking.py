"""Which models can be trained as a stack of clients, and why others cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.errors import ModelError
from fedsim.models import make_model, stackable

INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Computes(nn.Module):
    """A linear layer, and then what the test says."""

    def __init__(self, then: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.then = then

    def forward(self, inputs: Tensor) -> Any:
        return self.then(self.layer(inputs), inputs)


def branches(hidden: Tensor, inputs: Tensor) -> Tensor:
    return hidden if hidden.sum() > 0 else -hidden


class MixesClients(torch.autograd.Function):
    """An operation whose batching rule is wrong: it hands every client the mean of all."""

    @staticmethod
    def forward(hidden: Tensor) -> Tensor:
        return hidden * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2

    @staticmethod
    def vmap(info: Any, in_dims: Any, hidden: Tensor) -> tuple[Tensor, int]:
        return (hidden * 2).mean(dim=in_dims[0], keepdim=True).expand_as(hidden), in_dims[0]


@pytest.mark.parametrize(
    "then",
    [
        lambda hidden, inputs: hidden,
        lambda hidden, inputs: F.relu(hidden),
        lambda hidden, inputs: hidden.softmax(-1) * inputs.mean(),
    ],
    ids=["linear", "relu", "softmax"],
)
def test_ordinary_models_can_be_stacked(then: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert stackable(Computes(then), INPUTS) == (True, "")


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (branches, "vmap refuses it"),
        (lambda hidden, inputs: hidden * inputs.sum().item(), "vmap refuses it"),
        (lambda hidden, inputs: hidden[inputs[:, 0].nonzero()[:, 0]], "dynamic shape"),
        (lambda hidden, inputs: (hidden, inputs), "returns tuple"),
        (lambda hidden, inputs: MixesClients.apply(hidden), "differ by"),  # type: ignore[no-untyped-call]
    ],
    ids=["branch", "item", "nonzero", "tuple", "mixing"],
)
def test_models_that_cannot_be_stacked_say_why(then: Callable[[Tensor, Tensor], Any], said: str) -> None:
    verdict = stackable(Computes(then), INPUTS)
    assert not verdict.possible
    assert said in verdict.reason
    assert "\n" not in verdict.reason


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)),
        Computes(lambda hidden, inputs: F.dropout(hidden, 0.5, training=True)),
        Computes(lambda hidden, inputs: hidden + torch.randn_like(hidden)),
    ],
    ids=["layer", "function", "noise"],
)
def test_random_layers_can_be_stacked_but_draw_other_numbers(model: nn.Module) -> None:
    verdict = stackable(model, INPUTS)
    assert verdict.possible
    assert "not same numbers" in verdict.reason


def test_dropout_does_not_matter_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).eval()
    assert stackable(model, INPUTS) == (True, "")


def test_batch_normalisation_can_be_stacked_with_buffers_of_its_own() -> None:
    model = make_model("small_cnn", input_shape=(1, 8, 8), classes=3, params={"norm": "batch"})
    assert stackable(model, torch.rand(4, 1, 8, 8)) == (True, "")


def test_a_model_without_trainable_parameters_cannot_be_stacked() -> None:
    assert not stackable(nn.Linear(6, 3).requires_grad_(False), INPUTS).possible


def test_a_frozen_part_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(6, 5).requires_grad_(False), nn.Linear(5, 3))
    assert stackable(model, INPUTS) == (True, "")


def test_a_model_that_cannot_take_the_inputs_is_an_error() -> None:
    with pytest.raises(ModelError) as caught:
        stackable(nn.Linear(7, 3), INPUTS)
    assert caught.value.code == "FS-MOD-006"


def test_the_trial_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    stackable(model, INPUTS)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

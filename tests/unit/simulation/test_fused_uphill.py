"""The fused engine along gradients taken uphill: the numbers of the loop, and nothing of a model's size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.data.dataset import Split, make_dataset
from fedsim.data.federated import FederatedData
from fedsim.data.transforms import identity
from fedsim.grads import LOSSES
from fedsim.local import LocalSpec, affine
from fedsim.simulation import onednn
from fedsim.simulation.flat import FlatTrainer
from fedsim.simulation.fused import FusedTrainer
from fedsim.simulation.fused_fit import why_not_fused
from fedsim.strategies.perturbation import perturbed
from fedsim.strategy import Strategy, make_strategy
from fedsim.training.loop import LoopTrainer
from tests.federations import CLASSES, SIZES, Small, build

PLAIN = LocalSpec(epochs=2, batch_size=4, lr=0.1)
EXACT = 1e-10
UPHILL: dict[str, dict[str, Any]] = {
    "fedsam": {"rho": 0.2},
    "fedspeed": {"alpha": 0.7},
    "fedgamma": {},
}


def uphill(name: str) -> Strategy:
    return make_strategy(name, **UPHILL[name])


def both(strategy: Strategy, *, block: int = 3, **parameters: Any) -> tuple[Small, Small]:
    parameters = {"spec": PLAIN} | parameters
    loop = build(strategy, trainer=LoopTrainer, **parameters)
    return loop, build(strategy, trainer=lambda place: FusedTrainer(place, block), **parameters)


def assert_rounds_agree(strategy: Strategy, *, exact: float = EXACT, **parameters: Any) -> None:
    loop, fused = both(strategy, **parameters)
    for _ in range(2):
        before = loop.federation.model.clone()
        one, other = (small.federation.run_window().record for small in (loop, fused))
        moved = (loop.federation.model - before).norm()
        assert moved > 0
        assert (loop.federation.model - fused.federation.model).norm() <= exact * moved
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=10 * exact)


@pytest.mark.parametrize("name", UPHILL)
@pytest.mark.parametrize(
    "spec",
    [
        PLAIN,
        replace(PLAIN, weight_decay=0.05, batch_size=3),
        replace(PLAIN, batch_size=0),
        replace(PLAIN, steps=1),
        replace(PLAIN, batch_size=1, epochs=1),
    ],
)
def test_any_local_training_agrees_with_the_loop(name: str, spec: LocalSpec) -> None:
    assert_rounds_agree(uphill(name), spec=spec)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("name", UPHILL)
def test_a_large_first_layer_that_waits_with_its_update_ends_where_it_would(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.simulation.fused._IN_ROWS_BYTES", 100)
    monkeypatch.setattr("fedsim.simulation.fused._WINDOW_ROWS", rows)
    assert_rounds_agree(uphill(name), block=4)
    assert_rounds_agree(uphill(name), block=4, spec=replace(PLAIN, batch_size=3), model=odd_mlp)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")
def test_products_by_onednn_end_where_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda: True)
    monkeypatch.setattr("fedsim.simulation.fused._IN_ROWS_BYTES", 100)
    # A smooth model: float32 differences do not jump over the kink of a ReLU.
    model = lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES))  # noqa: E731
    assert_rounds_agree(uphill("fedspeed"), exact=1e-5, dtype=torch.float32, model=model)


def odd_mlp() -> nn.Module:
    """Activations on the inputs, several in a row, after the last layer; a layer without bias; nested."""
    return nn.Sequential(
        nn.Tanh(),
        nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Sigmoid()),
        nn.Linear(9, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, CLASSES),
        nn.Tanh(),
    )


@pytest.mark.parametrize("make", [odd_mlp, lambda: nn.Linear(6, CLASSES)], ids=["many layers", "one layer"])
def test_other_models_agree(make: Callable[[], nn.Module]) -> None:
    assert_rounds_agree(uphill("fedspeed"), model=make)


def regression_data(targets: Callable[[torch.Tensor], torch.Tensor]) -> FederatedData:
    inputs = torch.randn(sum(SIZES), 6, generator=torch.Generator().manual_seed(1))
    split = Split(inputs, targets(inputs))
    dataset = make_dataset(
        "random", "regression", train=split, test=None, transforms=identity(), classes=None
    )
    offsets = np.concatenate([[0], np.cumsum(SIZES)]).astype(np.int64)
    return FederatedData(dataset, np.arange(sum(SIZES)), offsets)


@pytest.fixture
def squared_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` takes the loss of classification for every model."""
    monkeypatch.setitem(LOSSES, "classification", LOSSES["regression"])


@pytest.mark.usefixtures("squared_errors")
def test_squared_errors_agree() -> None:
    assert_rounds_agree(
        uphill("fedspeed"),
        model=lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)),
        data=regression_data(lambda inputs: inputs[:, :2] - inputs[:, 2:4]),
        spec=replace(PLAIN, lr=0.01),
    )


@pytest.mark.usefixtures("squared_errors")
@pytest.mark.parametrize("lr", [0.1, 1e-320])
def test_where_nothing_pulls_nothing_moves(lr: float) -> None:
    def flat_out() -> nn.Module:
        module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
        for parameter in module[2].parameters():
            nn.init.zeros_(parameter)
        return module

    data = regression_data(lambda inputs: torch.zeros(len(inputs), 2))
    small = build(
        uphill("fedsam"), model=flat_out, data=data, spec=replace(PLAIN, lr=lr),
        trainer=lambda place: FusedTrainer(place, 3),
    )  # fmt: skip
    before = small.federation.model.clone()
    small.federation.run_window()
    assert torch.equal(small.federation.model, before)


def test_no_gradient_and_no_perturbed_point_is_ever_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = lambda: nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 200))  # noqa: E731
    small = build(uphill("fedspeed"), model=wide, spec=PLAIN, trainer=lambda p: FusedTrainer(p, 5))
    trainer = small.engine.trainer
    assert isinstance(trainer, FusedTrainer)
    small.federation.run_window()  # the memory that rounds share is there from now on
    from fedsim.simulation.fused_uphill import Climb
    from tests.unit.simulation.test_fused import LargestNew

    steps, mode = Climb.steps, LargestNew()

    def watched(*args: Any) -> None:
        with mode:
            steps(*args)

    monkeypatch.setattr(Climb, "steps", watched)
    small.federation.run_window()
    assert any("baddbmm_" in name for name in mode.seen)
    assert not any("autograd" in name or "clone" in name for name in mode.seen)
    stack = 5 * 300 * 200 * 8
    assert 0 < mode.largest < stack / 10


def test_the_gradient_of_the_model_taken_uphill_is_the_only_other_one_that_fits() -> None:
    place = build(uphill("fedsam")).place

    def reason(gradient: Any) -> str | None:
        return why_not_fused(place, PLAIN, affine(gradient), plain=True)

    once = perturbed(place.grad_fn, rho=0.1)
    assert reason(place.grad_fn) is None
    assert reason(once) is None
    assert "direction" in str(reason(perturbed(once, rho=0.1)))
    assert "direction" in str(reason(lambda x, batch: place.grad_fn(x, batch)))
    assert "direction" in str(reason(perturbed(lambda x, batch: place.grad_fn(x, batch), rho=0.1)))
    claimed = affine(place.grad_fn)._replace(gradient=once)
    assert "direction" in str(why_not_fused(place, PLAIN, claimed, plain=True))


@pytest.mark.parametrize("name", UPHILL)
def test_the_flat_engine_takes_both_gradients(name: str) -> None:
    """Its shorter way for affine directions is for the model's own gradient."""
    loop = build(uphill(name), spec=PLAIN)
    flat = build(uphill(name), spec=PLAIN, trainer=FlatTrainer)
    for small in (loop, flat):
        small.federation.run_window()
    assert (loop.federation.model - flat.federation.model).norm() <= EXACT * loop.federation.model.norm()

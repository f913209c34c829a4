"""The flat engine against the loop engine, number for number, and how little it does per client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.local import LocalSpec
from fedsim.personal import personalise
from fedsim.registry import load
from fedsim.simulation.flat import FlatTrainer
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.fedsam import fedsam
from fedsim.strategies.scaffold import scaffold
from fedsim.strategy import Strategy
from fedsim.types import GradFn
from tests.contract.registered import STRATEGIES, registered
from tests.federations import SIZES, SPEC, Small, accepted, build, random_data

PLAIN = LocalSpec(epochs=2, batch_size=4, lr=0.1)


def flat(strategy: Strategy, *, options: dict[str, Any] | None = None, **parameters: Any) -> Small:
    """A federation trained by the flat engine."""
    small = build(strategy, **parameters)
    trainer = FlatTrainer(small.place, **(options or {}))
    small.engine.trainer, small.engine.place = trainer, trainer.place

    def algorithm(spec: LocalSpec) -> Any:
        made = strategy.local(trainer.grad_fn, spec)
        return personalise(made, small.place.spec.personal) if small.place.spec.personal else made

    small.engine.algorithm = algorithm
    return small


def assert_equal(
    make: Callable[[], Strategy],
    *,
    windows: int = 2,
    tolerance: float = 1e-10,
    options: dict[str, Any] | None = None,
    **parameters: Any,
) -> None:
    """Same updates, kept states, buffers and losses after some windows."""
    one, other = build(make(), **parameters), flat(make(), options=options, **parameters)
    start = one.federation.model.clone()
    for _ in range(windows):
        records = [small.federation.run_window().record for small in (one, other)]
    moved = (one.federation.model - start).norm()
    assert moved > 0
    assert (one.federation.model - other.federation.model).norm() <= tolerance * moved
    assert records[0]["train_loss"] == pytest.approx(records[1]["train_loss"], rel=tolerance)
    for kept, again in zip(one.federation.state.buffers, other.federation.state.buffers, strict=True):
        torch.testing.assert_close(kept, again, rtol=tolerance, atol=tolerance)
    ids = torch.arange(len(SIZES)).numpy()
    assert one.store.layout.keys() == other.store.layout.keys()
    held = one.store.has(ids)
    assert (held == other.store.has(ids)).all()
    mine, theirs = (small.store.read(ids[held]) if held.any() else {} for small in (one, other))
    for name, rows in mine.items():
        torch.testing.assert_close(rows, theirs[name], rtol=tolerance, atol=tolerance * float(moved))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_registered_strategy_moves_as_in_the_loop(name: str) -> None:
    spec = accepted(registered(name), replace(SPEC, epochs=1))
    assert_equal(lambda: registered(name), spec=spec)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedsmoo"])
@pytest.mark.parametrize(
    ("model", "layout"),
    [("conv", "contiguous"), ("conv", "channels_last"), ("lstm", "auto"), ("batch_norm", "auto")],
)
def test_convolutions_recurrence_and_batch_statistics_move_as_in_the_loop(
    name: str, model: str, layout: str
) -> None:
    assert_equal(
        load("strategies", name),
        model=model,
        data=random_data(model, sizes=(9, 2, 8, 3, 7)),  # a batch of one has no batch statistics
        spec=LocalSpec(steps=2, batch_size=0, lr=0.1),
        options={"layout": layout},
    )


@pytest.mark.parametrize(
    "spec",
    [
        PLAIN,
        LocalSpec(epochs=2, batch_size=4, lr=0.1, momentum=0.9),
        LocalSpec(epochs=2, batch_size=4, lr=0.1, weight_decay=0.01),
        LocalSpec(epochs=2, batch_size=4, lr=0.1, clip_norm=0.05),
        LocalSpec(steps=5, batch_size=4, lr=0.01, optimizer="adam"),
        LocalSpec(steps=5, batch_size=0, lr=0.01, optimizer="adamw", weight_decay=0.1),
    ],
    ids=["plain", "momentum", "decay", "clip", "adam", "adamw"],
)
@pytest.mark.parametrize("name", ["fedavg", "feddyn"])
def test_every_optimiser_moves_as_in_the_loop(spec: LocalSpec, name: str) -> None:
    assert_equal(load("strategies", name), spec=spec)


@pytest.mark.parametrize("make", [fedavg, scaffold, lambda: scaffold(option=1), fedsam])
def test_personal_parameters_stay_with_their_client(make: Callable[[], Strategy]) -> None:
    assert_equal(make, personal=("2.",), windows=3)


def test_kept_values_are_not_those_of_the_next_client() -> None:
    """The state of a client must not lie in the buffer that the next one is trained in."""
    small = flat(fedavg(), personal=("2.",))
    small.federation.run_window()
    rows = small.store.read(torch.arange(len(SIZES)).numpy())
    assert all(len(torch.unique(values, dim=0)) == len(SIZES) for values in rows.values())


def test_a_replaced_gradient_function_is_called_as_it_is() -> None:
    calls = []

    def halved(grad_fn: GradFn) -> GradFn:
        def half(x: Any, batch: Any) -> Any:
            calls.append(len(batch.targets))
            gradient, aux = grad_fn(x, batch)
            return 0.5 * gradient, aux

        return half

    assert_equal(fedavg, grad=halved, spec=PLAIN, windows=1)
    expected = sum(2 * -(-size // 4) for size in SIZES)
    assert len(calls) == 2 * expected


def test_an_algorithm_made_with_another_gradient_function_runs_too() -> None:
    one, other = build(fedsam()), build(fedsam())
    other.engine.trainer = FlatTrainer(other.place)
    for small in (one, other):
        small.federation.run_window()
    torch.testing.assert_close(one.federation.model, other.federation.model, rtol=0, atol=1e-11)


class Unused(nn.Module):
    """A classifier with a parameter that the loss does not see, a shared one and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.line.weight
        self.spare = nn.Parameter(torch.ones(3, 2))
        self.fixed = nn.Parameter(torch.ones(6), requires_grad=False)
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.again(self.line(inputs)) * self.fixed
        logits: torch.Tensor = self.head(hidden)
        return logits


@pytest.mark.parametrize("make", [fedavg, fedsam])
def test_unused_shared_and_frozen_parameters(make: Callable[[], Strategy]) -> None:
    assert_equal(make, model=Unused, spec=PLAIN)
    small = flat(make(), model=Unused, spec=PLAIN)
    before = small.federation.model.clone()
    small.federation.run_window()
    spare = small.place.spec.slices()["spare"]
    assert torch.equal(small.federation.model[spare], before[spare])


def test_clients_without_examples_do_nothing() -> None:
    assert_equal(fedavg, data=random_data(sizes=(4, 0, 6, 1, 0)))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedsam"])
def test_float32_in_channels_last_is_near_the_loop(name: str) -> None:
    assert_equal(
        load("strategies", name),
        model=images,
        data=random_data("conv"),
        dtype=torch.float32,
        spec=PLAIN,
        tolerance=1e-3,
        options={"layout": "channels_last"},
    )


def test_bfloat16_is_near_the_loop_and_keeps_float32_weights() -> None:
    small = flat(
        fedavg(),
        model=images,
        data=random_data("conv"),
        dtype=torch.float32,
        spec=PLAIN,
        options={"precision": "bfloat16"},
    )
    kinds: set[tuple[str, torch.dtype]] = set()
    module = small.engine.trainer.live.module  # type: ignore[attr-defined]
    for layer in (module[0], module[-1]):
        layer.register_forward_hook(lambda m, i, out: kinds.add((type(m).__name__, out.dtype)))
    small.federation.run_window()
    assert kinds == {("Conv2d", torch.bfloat16), ("Linear", torch.float32)}
    assert small.federation.model.dtype == torch.float32
    reference = build(fedavg(), model=images, data=random_data("conv"), dtype=torch.float32, spec=PLAIN)
    start = reference.federation.model.clone()
    reference.federation.run_window()
    moved = (reference.federation.model - start).norm()
    assert 0 < (reference.federation.model - small.federation.model).norm() <= 0.05 * moved


class Counted(TorchDispatchMode):
    """Counts the operations that write or make something as large as the model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        view = func.is_view
        if isinstance(out, torch.Tensor) and out.numel() == self.size and not view:
            name = func.__name__.split(".")[0]
            self.seen[name] = self.seen.get(name, 0) + 1
        return out


def test_a_client_costs_one_copy_in_and_one_difference_out(monkeypatch: pytest.MonkeyPatch) -> None:
    small = flat(fedavg(), spec=PLAIN)
    small.federation.run_window()
    trainer = small.engine.trainer
    found: list[dict[str, int]] = []
    train = trainer.train

    def counted(*arguments: Any) -> Any:
        with Counted(small.place.spec.size) as mode:
            trained = train(*arguments)
        found.append(mode.seen)
        return trained

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("not on the hot path")

    monkeypatch.setattr(trainer, "train", counted)
    monkeypatch.setattr(torch.func, "functional_call", forbidden)
    monkeypatch.setattr("fedsim.grads.functional_call", forbidden)
    monkeypatch.setattr(nn.Module, "state_dict", forbidden)
    monkeypatch.setattr(nn.Module, "load_state_dict", forbidden)
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", forbidden)
    small.federation.run_window()
    assert found == [{"copy_": 1, "sub": 1}] * len(SIZES)


def test_a_perturbed_point_is_evaluated_in_a_second_model_without_functional_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("not on the hot path")

    monkeypatch.setattr("fedsim.grads.functional_call", forbidden)
    small = flat(
        fedsam(),
        model="batch_norm",
        spec=LocalSpec(steps=2, batch_size=0, lr=0.1),
        data=random_data(sizes=(9, 2, 8)),
    )
    small.federation.run_window()
    assert torch.isfinite(small.federation.model).all()


def test_the_users_module_is_left_alone() -> None:
    small = flat(fedavg())
    before = {name: value.clone() for name, value in small.place.module.state_dict().items()}
    small.federation.run_window()
    assert all(torch.equal(value, before[name]) for name, value in small.place.module.state_dict().items())

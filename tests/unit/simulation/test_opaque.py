"""Opaque clients: a user's own training function, in the loop engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.errors import AllRefused, ConfigError, QuorumNotReached
from fedsim.flat import flat_of
from fedsim.local import LocalSpec
from fedsim.opaque_client import LocalData, LocalTask, Result, opaque
from fedsim.simulation.opaque import OpaqueTrainer
from fedsim.simulation.run import Simulation
from fedsim.strategies.fedavg import fedavg
from tests.federations import SIZES, Small, build

SPEC = LocalSpec(epochs=2, batch_size=4, lr=0.2, lr_decay=0.5)


def full_batch(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
    """Three steps of plain SGD on all data."""
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
    loss = torch.zeros(())
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data.inputs), data.targets)
        loss.backward()
        optimizer.step()
    return Result(model, metrics={"loss": float(loss)})


def with_client(train: Any, **parameters: Any) -> Small:
    client = opaque(train)
    parameters.setdefault("spec", SPEC)
    return build(fedavg(), trainer=lambda place: OpaqueTrainer(place, client), **parameters)


def test_a_training_function_of_ones_own_equals_the_local_algorithm() -> None:
    spec = LocalSpec(steps=3, batch_size=0, lr=0.2)
    own, built_in = with_client(full_batch, spec=spec), build(fedavg(), spec=spec)
    for _ in range(3):
        assert own.federation.run_window().error is None
        built_in.federation.run_window()
    torch.testing.assert_close(own.federation.model, built_in.federation.model, rtol=0, atol=1e-12)


def test_it_sees_its_own_data_this_rounds_rate_and_a_seed_of_its_own() -> None:
    tasks: list[LocalTask] = []
    lengths: dict[int, int] = {}

    def noting(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
        tasks.append(task)
        lengths[task.client] = len(data)
        return full_batch(model, data, task)

    small = with_client(noting)
    for _ in range(2):
        small.federation.run_window()
    assert lengths == dict(enumerate(SIZES))
    assert {(t.round, t.lr) for t in tasks} == {(0, 0.2), (1, 0.1)}
    assert len({t.seed for t in tasks}) == 10
    assert tasks[0].get("batch_size") == 4
    assert tasks[0].get("unheard_of", "default") == "default"


def test_every_client_starts_from_the_broadcast_model() -> None:
    starts: list[torch.Tensor] = []

    def noting(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
        starts.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        return full_batch(model, data, task)

    small = with_client(noting)
    x = small.federation.model.clone()
    small.federation.run_window()
    assert all(torch.equal(start, x) for start in starts)
    assert torch.equal(flat_of(small.place.module, small.place.spec), x)


def test_a_function_that_raises_is_that_clients_failure_and_the_round_goes_on() -> None:
    def fragile(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
        if task.client == 2:
            raise RuntimeError("no camera")
        return full_batch(model, data, task)

    small = with_client(fragile)
    outcome = small.federation.run_window()
    assert outcome.error is None
    assert (outcome.record["received"], outcome.record["lost"]) == (4, 1)
    assert outcome.reasons == ((2, "RuntimeError: no camera"),)


def test_a_round_in_which_every_function_raises_fails() -> None:
    def broken(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
        raise RuntimeError("no camera")

    outcome = with_client(broken).federation.run_window()
    assert isinstance(outcome.error, QuorumNotReached)
    assert "no camera" in str(outcome.error)


def test_something_else_than_a_result_is_that_clients_failure() -> None:
    outcome = with_client(lambda model, data, task: model).federation.run_window()
    assert isinstance(outcome.error, QuorumNotReached)
    assert "not fedsim.Result" in str(outcome.error)


def test_a_model_gone_astray_is_refused() -> None:
    def diverging(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return Result(model)

    outcome = with_client(diverging).federation.run_window()
    assert isinstance(outcome.error, AllRefused)


def test_the_weight_is_what_the_function_says() -> None:
    def said(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(float(task.client))
        return Result(model, examples=1 if task.client == 4 else 3)

    small = with_client(said, cohort=2)
    small.federation.sample = lambda *_: np.array([0, 4])
    before = small.federation.model.clone()
    small.federation.run_window()
    torch.testing.assert_close(small.federation.model, before + 1.0, rtol=0, atol=1e-12)


def test_a_function_may_return_another_module() -> None:
    import copy

    def elsewhere(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
        other = copy.deepcopy(model)
        return full_batch(other, data, task)

    one, other = with_client(elsewhere), with_client(full_batch)
    one.federation.run_window()
    other.federation.run_window()
    assert torch.equal(one.federation.model, other.federation.model)


def test_metrics_of_the_function_are_recorded() -> None:
    outcome = with_client(full_batch).federation.run_window()
    assert len(outcome.clients.columns["loss"]) == 5
    assert outcome.record["train_loss"] > 0


def test_normalisation_statistics_of_a_users_model_travel_too() -> None:
    def forward_only(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
        with torch.no_grad():
            model(data.inputs)
        return Result(model)

    small = with_client(forward_only, model="batch_norm")
    small.federation.sample = lambda *_: np.array([0])
    small.federation.run_window()
    inputs = small.place.clients.data.dataset.train.inputs[
        torch.from_numpy(small.place.clients.data.rows(0))
    ].double()
    module = small.place.module
    assert isinstance(module, nn.Sequential)
    expected = 0.1 * module[0](inputs).mean(0)
    torch.testing.assert_close(
        small.federation.state.buffers.floating[:8], expected.detach(), rtol=0, atol=1e-12
    )
    assert small.federation.state.buffers.integers.tolist() == [1]


def test_loading_goes_once_over_the_data_in_an_order_of_the_seed() -> None:
    data = LocalData(torch.arange(10.0)[:, None], torch.arange(10))
    batches = list(data.loader(batch_size=4, seed=3))
    assert [len(t) for _, t in batches] == [4, 4, 2]
    order = torch.cat([t for _, t in batches])
    assert sorted(order.tolist()) == list(range(10))
    assert all(torch.equal(x[:, 0], t.float()) for x, t in batches)
    assert torch.equal(order, torch.cat([t for _, t in data.loader(batch_size=4, seed=3)]))
    assert not torch.equal(order, torch.cat([t for _, t in data.loader(batch_size=4, seed=4)]))
    assert torch.equal(torch.cat([t for _, t in data.loader(batch_size=3)]), torch.arange(10))
    assert data[2][1] == 2


def test_random_layers_repeat_for_each_client_and_round() -> None:
    def drawing(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        return Result(model)

    models = []
    for _ in range(2):
        torch.manual_seed(int(torch.randint(0, 1000, ()).item()))
        small = with_client(drawing)
        small.federation.run_window()
        models.append(small.federation.model)
    assert torch.equal(models[0], models[1])


def test_gradients_that_a_function_leaves_behind_do_not_reach_the_next_client() -> None:
    found: list[bool] = []

    def leaving(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
        found.append(any(p.grad is not None for p in model.parameters()))
        nn.functional.cross_entropy(model(data.inputs), data.targets).backward()
        return Result(model)

    with_client(leaving).federation.run_window()
    assert len(found) > 1
    assert not any(found)


@pytest.mark.parametrize("strategy", ["scaffold", "fednova", "afa_cd"])
def test_a_strategy_that_has_to_know_the_local_steps_takes_no_opaque_function(strategy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Simulation(strategy=strategy, client=opaque(lambda model, data, task: Result(model)), rounds=1)
    assert caught.value.code == "FS-CFG-071"

"""Personal parameters: trained on the client, kept there, never seen by the server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsim.local import LocalSpec
from fedsim.personal import personalise
from fedsim.registry import load, names
from fedsim.strategies.fedavg import fedavg
from fedsim.strategy import Strategy
from fedsim.transform import Observed
from tests.federations import SPEC, Small, build, random_data

ENGINES = ["loop", "stacked"]
HEAD = ("2.",)


def own_head(small: Small, client: int) -> torch.Tensor:
    """[D] what this client evaluates with."""
    federation = small.federation
    algorithm = personalise(
        federation.strategy.local(small.place.grad_fn, federation.spec), small.place.spec.personal
    )
    message = federation.strategy.broadcast(federation.state.strategy)
    state = small.engine.state_of(np.array([client]), message, algorithm)
    assert algorithm.personal is not None
    from fedsim.training.work import client_message

    return small.place.spec.flatten(algorithm.personal(client_message(message, small.place.spec), state))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_server_neither_sees_nor_moves_a_personal_parameter(engine: str) -> None:
    seen: list[Observed] = []
    small = build(fedavg(), engine=engine, personal=HEAD, observers=[seen.append])
    private = ~small.place.spec.shared_mask()
    start = small.federation.model.clone()
    for _ in range(3):
        small.federation.run_window()
    assert torch.equal(small.federation.model[private], start[private])
    assert not torch.equal(small.federation.model[~private], start[~private])
    assert seen
    assert not any(o.block.vectors["delta"][:, private].any() for o in seen)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_client_evaluates_with_the_shared_model_and_its_own_values(engine: str) -> None:
    small = build(fedavg(), engine=engine, personal=HEAD)
    private = ~small.place.spec.shared_mask()
    assert torch.equal(own_head(small, 0), small.federation.model)  # before it ever took part
    for _ in range(2):
        small.federation.run_window()
    models = [own_head(small, client) for client in range(5)]
    for model in models:
        assert torch.equal(model[~private], small.federation.model[~private])
        assert not torch.equal(model[private], small.federation.model[private])
    assert not torch.equal(models[0], models[2])


def test_its_values_are_those_with_which_it_ended_the_last_task() -> None:
    spec = LocalSpec(steps=3, batch_size=0, lr=0.2)
    small = build(fedavg(), personal=HEAD, spec=spec, data=random_data(sizes=(6,)))
    for _ in range(4):
        small.federation.run_window()
    # One client: personal and shared parts together are plain training without a server.
    plain = build(fedavg(), spec=spec, data=random_data(sizes=(6,)))
    for _ in range(4):
        plain.federation.run_window()
    torch.testing.assert_close(own_head(small, 0), plain.federation.model, rtol=0, atol=1e-12)


def test_engines_agree_with_personal_parameters() -> None:
    results = []
    for engine in ENGINES:
        small = build(fedavg(), engine=engine, personal=HEAD, spec=SPEC)
        for _ in range(3):
            small.federation.run_window()
        results.append(torch.stack([own_head(small, client) for client in range(5)]))
    assert (results[0] - results[1]).norm() <= 1e-10 * results[0].norm()


def strategy_or_skip(name: str, **parameters: Any) -> Strategy:
    if name not in names("strategies"):
        pytest.skip(f"no strategy {name!r} is installed")
    strategy = load("strategies", name)(**parameters)
    assert isinstance(strategy, Strategy)
    return strategy


@pytest.mark.parametrize(("name", "parameters"), [("fedprox", {"mu": 1.0}), ("scaffold", {}), ("feddyn", {})])
def test_anchors_and_duals_of_an_algorithm_do_not_hold_back_a_personal_parameter(
    name: str, parameters: dict[str, Any]
) -> None:
    """All parameters are personal: whatever the strategy, each client then trains alone.

    FedProx pulls towards where this task started, here the client's own values.
    """
    strategy = strategy_or_skip(name, **parameters)
    spec = LocalSpec(steps=1, batch_size=0, lr=0.2)  # one step: a proximal term is zero at its start
    data = random_data(sizes=(6, 9))
    with_strategy = build(strategy, personal=("",), spec=spec, data=data)
    alone = build(fedavg(), personal=("",), spec=spec, data=data)
    for _ in range(4):
        with_strategy.federation.run_window()
        alone.federation.run_window()
    for client in range(2):
        torch.testing.assert_close(
            own_head(with_strategy, client), own_head(alone, client), rtol=0, atol=1e-12
        )


def test_a_refused_update_leaves_the_clients_own_values() -> None:
    fault = {"now": False}

    def breaking(inner: Any) -> Any:
        def grad_fn(x: Any, batch: Any) -> Any:
            g, aux = inner(x, batch)
            return (g * float("nan") if fault["now"] else g), aux

        return grad_fn

    small = build(fedavg(), personal=HEAD, grad=breaking)
    small.federation.run_window()
    before = own_head(small, 0)
    fault["now"] = True
    assert small.federation.run_window().error is not None
    assert torch.equal(own_head(small, 0), before)


def test_personal_values_are_not_counted_as_sent() -> None:
    whole, part = build(fedavg(), spec=SPEC), build(fedavg(), personal=HEAD, spec=SPEC)
    spec = part.place.spec
    private = 8 * sum(
        part.place.spec.unflatten(torch.empty(spec.size)).tensors[n].numel() for n in spec.personal
    )
    assert private > 0
    records = [small.federation.run_window().record for small in (whole, part)]
    for key in ("bytes_down", "bytes_up"):
        assert records[0][key] - records[1][key] == private * records[0]["cohort"]

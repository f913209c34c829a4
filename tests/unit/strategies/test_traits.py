"""What the strategies say of themselves in `Traits`, measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from fedsim.errors import AllRefused
from fedsim.federation import Federation
from fedsim.local import LocalSpec
from fedsim.outcome import Outcome
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.fedavgm import fedavgm
from fedsim.strategies.feddyn import feddyn
from fedsim.strategies.fednova import fednova
from fedsim.strategies.fedopt import fedadagrad, fedadam, fedyogi
from fedsim.strategies.fedprox import fedprox
from fedsim.strategies.median import median
from fedsim.strategies.scaffold import scaffold
from fedsim.strategy import Strategy
from fedsim.transform import Observed
from fedsim.types import Batch, Message
from fedsim.vector import Vector
from tests.quadratics import client_held, federate, heterogeneous, quadratic_grad, run

STRATEGIES: dict[str, Strategy] = {
    "fedavg": fedavg(),
    "fedavgm": fedavgm(),
    "fedprox": fedprox(mu=0.5),
    "fedadagrad": fedadagrad(),
    "fedadam": fedadam(),
    "fedyogi": fedyogi(),
    "scaffold": scaffold(),
    "scaffold, option 1": scaffold(option=1),
    "scaffold, gradients": scaffold(control="gradients"),
    "scaffold at the server": scaffold(state_at="server"),
    "scaffold at the server, option 1": scaffold(state_at="server", option=1),
    "scaffold at the server, gradients": scaffold(state_at="server", control="gradients"),
    "feddyn": feddyn(alpha=0.5),
    "feddyn at the server": feddyn(alpha=0.5, state_at="server"),
    "fednova": fednova(),
    "fednova with server momentum": fednova(server_momentum=0.5),
    "fednova with mu": fednova(mu=0.5),
    "median": median(),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
D, N = 8, 3
PROBLEM = heterogeneous(clients=N, dimensions=D)


def one_round(strategy: Strategy, spec: LocalSpec | None = None) -> tuple[Federation, Outcome]:
    federation = federate(PROBLEM, strategy, steps=2, spec=spec)
    return federation, federation.run_window()


@every_strategy
def test_the_factors_count_the_model_sized_vectors_that_travel(strategy: Strategy) -> None:
    """Scalars beside the vectors are 8 bytes each, together less than one vector of D doubles."""
    record = one_round(strategy)[1].record
    assert record["bytes_down"] // (N * D * 8) == strategy.traits.down_factor
    assert record["bytes_up"] // (N * D * 8) == strategy.traits.up_factor


@every_strategy
def test_the_server_keeps_the_vectors_that_it_declares(strategy: Strategy) -> None:
    federation, _ = one_round(strategy)
    leaves = pytree.tree_leaves(federation.state.strategy)
    vectors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel() == D]
    assert len(vectors) - 1 == strategy.traits.server_vectors
    assert len(federation.rows.layout) == strategy.traits.server_vectors_per_client


@every_strategy
def test_a_state_of_each_client_persists_where_it_is_declared(strategy: Strategy) -> None:
    federation, _ = one_round(strategy)
    assert bool(federation.rows.layout) == (strategy.traits.client_state == "server")
    if strategy.traits.client_state == "client":
        assert (np.abs(client_held(federation)).max(axis=1) > 0).all()
    else:
        assert not client_held(federation).any()


@every_strategy
def test_the_reduction_is_the_one_that_is_declared(strategy: Strategy) -> None:
    assert (strategy.fold == "gather") == (strategy.traits.reduction == "gather")


@every_strategy
def test_an_affine_direction_is_the_gradient_plus_a_x_plus_b(strategy: Strategy) -> None:
    """The declared gradient and terms against the direction itself, at states that are not zero."""
    algorithm = strategy.local(quadratic_grad, LocalSpec())
    assert (algorithm.terms is not None) == strategy.traits.affine
    if algorithm.terms is None:
        return
    rng = np.random.default_rng(0)

    def vector(*_: object) -> Vector:
        return Vector({"x": torch.from_numpy(rng.normal(size=D))})

    msg = Message({"x": vector(), "c": vector()})
    lent = {"correction": vector(), "dual": vector()}
    state = pytree.tree_map(vector, algorithm.fresh(msg), is_leaf=lambda node: isinstance(node, Vector))
    x, batch = vector(), one_example(0)
    direction, _, _ = algorithm.phases[0].direction(msg, lent, state, x, (), batch)
    a, b = algorithm.terms(msg, lent, state)
    assert algorithm.gradient is not None
    expected = algorithm.gradient(x, batch)[0] + a * x
    expected = expected if b is None else expected + b
    torch.testing.assert_close(direction.vector.tensors["x"], expected.tensors["x"], rtol=1e-13, atol=1e-13)


def one_example(client: int) -> Batch:
    """The only example of a client as a batch."""
    row = np.concatenate([PROBLEM.A[client].ravel(), PROBLEM.b[client]])
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    flag = torch.tensor(True)
    return Batch(
        torch.from_numpy(row)[None], one, one, zero + 0.1, zero.long(), zero.long(), flag, flag, one[0]
    )


@every_strategy
def test_an_optimiser_without_normaliser_is_refused_by_those_that_need_one(strategy: Strategy) -> None:
    adam = LocalSpec(steps=2, batch_size=1, lr=0.1, optimizer="adam")
    federation, outcome = one_round(strategy, adam)
    if strategy.traits.needs_normaliser:
        assert isinstance(outcome.error, AllRefused)
        assert not federation.model.any()
    else:
        assert outcome.error is None


@every_strategy
def test_those_without_hooks_train_by_plain_sgd_and_the_others_do_not(strategy: Strategy) -> None:
    """In the third round, when every state has become something."""
    federation = federate(PROBLEM, strategy, steps=3)
    run(federation, 2)
    x, seen = federation.model.numpy().copy(), list[Observed]()
    federation.observers = (seen.append,)
    run(federation, 1)
    reported = torch.cat([o.block.vectors["delta"] for o in seen]).numpy()
    plain = [PROBLEM.descend(i, x, steps=3, lr=0.1) - x for i in range(N)]
    distance = np.abs(reported - plain).max()
    assert distance > 1e-4 if strategy.traits.client_hooks else distance < 1e-12

"""The contract of a strategy's client half: pure, padding changes nothing, shapes do not depend on data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.local import LocalAlgorithm, Phase, run_local
from fedsim.training.work import client_lent, client_message
from fedsim.types import Batch, Message
from fedsim.vector import Vector
from tests.contract.registered import STRATEGIES, registered
from tests.federations import SPEC, Small, build


class Client:
    """Everything that the functions of one client's algorithm are given, after a round of training."""

    def __init__(self, name: str) -> None:
        strategy = registered(name)
        small: Small = build(strategy)
        small.federation.run_window()
        self.algorithm: LocalAlgorithm = strategy.local(small.place.grad_fn, small.federation.spec)
        state = small.federation.state.strategy
        ids = small.federation.sample(0, 0, 5, np.empty(0, np.int64))[:1]
        self.layout = small.place.spec
        self.msg: Message = client_message(strategy.broadcast(state), self.layout)
        lent = client_lent(strategy.lend(state, small.federation.rows, ids), self.layout)
        self.lent = pytree.tree_map(lambda leaf: leaf[0], lent)
        self.state = small.engine.state_of(ids, strategy.broadcast(state), self.algorithm)
        data = small.place.clients
        self.inputs = data.inputs[:4].double()
        self.targets = data.targets[:4]

    def batch(self, *, rows: int = 4, padded: int = 0, index: int = 0) -> Batch:
        inputs = torch.cat([self.inputs[:rows], self.inputs[:1].repeat(padded, 1)])
        targets = torch.cat([self.targets[:rows], self.targets[:1].repeat(padded)])
        real = torch.float64
        return Batch(
            inputs,
            targets,
            torch.tensor([1.0] * rows + [0.0] * padded, dtype=real),
            torch.tensor(0.1, dtype=real),
            torch.tensor(index),
            torch.tensor(3),
            torch.tensor(index == 0),
            torch.tensor(True),
            torch.tensor(0.5, dtype=real),
        )


def copied(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def assert_unchanged(tree: Any, before: Any) -> None:
    pairs = zip(pytree.tree_leaves(tree), pytree.tree_leaves(before), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_function_changes_its_arguments(name: str) -> None:
    client = Client(name)
    algorithm, fixed = client.algorithm, (client.msg, client.lent, client.state)
    before = copied(fixed)
    algorithm.fresh(client.msg)
    x, carry = algorithm.init(*fixed)
    for phase in algorithm.phases:
        given = (x, carry, client.batch())
        kept = copied(given)
        phase.direction(*fixed, *given)
        assert_unchanged(given, kept)
    at_the_end = (x, carry, torch.tensor(0.3, dtype=torch.float64))
    kept = copied(at_the_end)
    algorithm.finish(*fixed, *at_the_end)
    assert_unchanged(at_the_end, kept)
    assert_unchanged(fixed, before)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_arguments_give_the_same_answer(name: str) -> None:
    client = Client(name)

    def answer() -> Any:
        return run_local(
            client.algorithm,
            client.msg,
            client.lent,
            client.state,
            lambda phase, spec: [client.batch(index=i) for i in range(3)],
            spec=SPEC,
        )

    assert_unchanged(answer(), answer())


@pytest.mark.parametrize("name", STRATEGIES)
def test_moving_in_place_or_out_of_place_is_the_same(name: str) -> None:
    client = Client(name)
    answers = [
        run_local(
            client.algorithm,
            client.msg,
            client.lent,
            client.state,
            lambda phase, spec: [client.batch(index=i) for i in range(3)],
            spec=SPEC,
            differentiable=differentiable,
        ).result.vectors
        for differentiable in (False, True)
    ]
    for part, vector in answers[0].items():
        one, other = client.layout.flatten(vector), client.layout.flatten(answers[1][part])
        assert (one - other).norm() <= 1e-13 * one.norm()


@pytest.mark.parametrize("name", STRATEGIES)
def test_rows_of_padding_change_nothing(name: str) -> None:
    client = Client(name)
    algorithm = client.algorithm
    x, carry = algorithm.init(client.msg, client.lent, client.state)
    for phase in algorithm.phases:
        answers = [
            phase.direction(client.msg, client.lent, client.state, x, carry, batch)
            for batch in (client.batch(rows=3), client.batch(rows=3, padded=2))
        ]
        for one, other in zip(*map(pytree.tree_leaves, answers), strict=True):
            one, other = torch.as_tensor(one), torch.as_tensor(other)
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", STRATEGIES)
def test_carry_and_state_keep_their_structure_shapes_and_dtypes(name: str) -> None:
    client = Client(name)
    algorithm = client.algorithm

    def kinds(tree: Any) -> Any:
        leaves, structure = pytree.tree_flatten(tree)
        assert all(isinstance(leaf, Tensor) for leaf in leaves)
        return structure, [(leaf.dtype, leaf.shape) for leaf in leaves]

    x, carry = algorithm.init(client.msg, client.lent, client.state)
    for phase in algorithm.phases:
        direction, new_carry, _ = phase.direction(
            client.msg, client.lent, client.state, x, carry, client.batch()
        )
        assert kinds(new_carry) == kinds(carry)
        assert isinstance(direction.vector, Vector)
        assert kinds(direction.vector) == kinds(x)
    fresh = algorithm.fresh(client.msg)
    assert fresh is not None
    result, state, metrics = algorithm.finish(
        client.msg, client.lent, client.state, x, carry, torch.tensor(0.1, dtype=torch.float64)
    )
    assert kinds(state) == kinds(fresh)
    assert all(kinds(vector) == kinds(x) for vector in result.vectors.values())
    assert all(value.ndim == 0 for value in (*result.scalars.values(), *metrics.values()))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_client_that_takes_no_step_reports_no_movement_and_stays_finite(name: str) -> None:
    client = Client(name)

    def none(phase: Phase, spec: Any) -> list[Batch]:
        return [] if phase.data == "batches" else [client.batch()]

    outcome = run_local(client.algorithm, client.msg, client.lent, client.state, none, spec=SPEC)
    assert outcome.steps == 0
    x, _ = client.algorithm.init(client.msg, client.lent, client.state)
    expected = client.layout.flatten(x - client.msg.x)
    assert torch.equal(client.layout.flatten(outcome.result.vectors["delta"]), expected)
    leaves = [*pytree.tree_leaves(outcome.result.vectors), *pytree.tree_leaves(outcome.client_state)]
    assert all(leaf.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("name", STRATEGIES)
def test_its_answer_can_be_differentiated_with_respect_to_the_data(name: str) -> None:
    client = Client(name)
    inputs = client.inputs.clone().requires_grad_()
    outcome = run_local(
        client.algorithm,
        client.msg,
        client.lent,
        client.state,
        lambda phase, spec: [client.batch(index=i)._replace(inputs=inputs) for i in range(2)],
        spec=SPEC,
        differentiable=True,
    )
    delta = client.layout.flatten(outcome.result.vectors["delta"])
    (gradient,) = torch.autograd.grad(delta.square().sum(), inputs)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0

"""The loop driver: plans, rates, and what it counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.buffers import no_buffers
from fedsim.grads import LOSSES, batch_loss
from fedsim.local import (
    Direction,
    LocalAlgorithm,
    LocalSpec,
    Phase,
    Result,
    affine,
    from_broadcast,
    report_delta,
    run_local,
    stateless,
)
from fedsim.strategies.fedavg import fedavg
from fedsim.training.clients import Schedule
from fedsim.types import Batch, GradFn, Message, Task
from fedsim.vector import Vector
from tests.federations import SIZES, SPEC, build, random_data
from tests.halves import answers, with_local

ENGINES = ["loop", "stacked"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_gives_each_client_its_own_number_of_steps(engine: str) -> None:
    wanted = np.array([2, 5, 1, 0, 3])
    strategy = fedavg()._replace(plan=lambda state, spec, window, ids: (spec, wanted[ids]))
    small = build(strategy, engine=engine, spec=LocalSpec(epochs=1, batch_size=4, lr=0.1))
    seen = answers(small)
    assert {client: answer[2] for client, answer in seen.items()} == dict(enumerate(wanted.tolist()))
    assert {client: answer[3] for client, answer in seen.items()} == pytest.approx(
        dict(enumerate(0.1 * wanted)), rel=1e-12
    )


def test_engines_agree_when_a_plan_makes_step_counts_and_sizes_disagree() -> None:
    wanted = np.array([1, 6, 2, 5, 3])  # the most steps for the least data
    strategy = fedavg()._replace(plan=lambda state, spec, window, ids: (spec, wanted[ids]))
    models = []
    for engine in ENGINES:
        small = build(strategy, engine=engine, block=5)
        for _ in range(2):
            small.federation.run_window()
        models.append(small.federation.model)
    assert (models[0] - models[1]).norm() <= 1e-10 * models[0].norm()


def test_a_plan_can_change_the_rate_of_a_round() -> None:
    strategy = fedavg()._replace(
        plan=lambda state, spec, window, ids: (LocalSpec(steps=1, lr=0.5 / (window + 1)), None)
    )
    small = build(strategy)
    assert all(answer[3] == pytest.approx(0.5) for answer in answers(small).values())
    assert all(answer[3] == pytest.approx(0.25) for answer in answers(small).values())


def test_the_rate_decays_by_round() -> None:
    spec = LocalSpec(lr=0.4, lr_decay=0.5)
    assert spec.at_round(3) == LocalSpec(lr=0.05, lr_decay=1.0)
    small = build(fedavg(), spec=LocalSpec(steps=1, lr=0.4, lr_decay=0.5))
    assert all(answer[3] == pytest.approx(0.1) for answer in answers(small, windows=3).values())


@pytest.mark.parametrize("engine", ENGINES)
def test_rates_of_single_steps_scale_movement_and_normaliser(engine: str) -> None:
    def falling(grad_fn: GradFn) -> LocalAlgorithm:
        def direction(msg: Any, lent: Any, state: Any, x: Vector, carry: Any, batch: Batch) -> Any:
            g, aux = grad_fn(x, batch)
            return Direction(g.map(torch.ones_like), 1.0 / (batch.index + 1).double()), carry, aux

        return LocalAlgorithm(stateless, from_broadcast, (Phase(direction),), report_delta)

    small = build(with_local(falling), engine=engine, spec=LocalSpec(steps=3, batch_size=4, lr=0.1))
    for vectors, _, _, normaliser, _ in answers(small).values():
        expected = 0.1 * (1 + 1 / 2 + 1 / 3)
        assert normaliser == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(vectors["delta"], torch.full_like(vectors["delta"], -expected))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_direction_is_told_which_step_it_takes(engine: str) -> None:
    class Told(NamedTuple):
        index: Tensor
        starts: Tensor
        total: Tensor
        active: Tensor

    def noting(grad_fn: GradFn) -> LocalAlgorithm:
        def direction(msg: Any, lent: Any, state: Any, x: Vector, carry: Told, batch: Batch) -> Any:
            g, aux = grad_fn(x, batch)
            told = Told(
                carry.index + batch.index,
                carry.starts + batch.epoch_start,
                torch.maximum(carry.total, batch.total),
                carry.active + batch.active,
            )
            return Direction(g), told, aux

        def init(msg: Any, lent: Any, state: Any) -> Any:
            return msg.x, Told(*(torch.zeros((), dtype=torch.int64) for _ in range(4)))

        def finish(msg: Any, lent: Any, state: Any, x: Vector, carry: Told, normaliser: Tensor) -> Any:
            return (
                Result({"delta": x - msg.x}, {n: v.double() for n, v in carry._asdict().items()}),
                state,
                {},
            )

        return LocalAlgorithm(stateless, init, (Phase(direction),), finish)

    small = build(with_local(noting), engine=engine, spec=LocalSpec(epochs=3, batch_size=4, lr=0.1))
    for client, (_, scalars, steps, _, _) in answers(small).items():
        assert steps == 3 * -(-SIZES[client] // 4)
        assert scalars == {"index": sum(range(steps)), "starts": 3, "total": steps, "active": steps}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_training_loss_is_the_mean_over_the_examples_seen(engine: str) -> None:
    # At rate zero every loss is that of the broadcast model.
    small = build(fedavg(), engine=engine, spec=LocalSpec(epochs=2, batch_size=4, lr=0.0))
    data, module = small.place.clients.data, small.place.module
    outcome = small.federation.run_window()
    losses = dict(zip(outcome.clients.columns["client"], outcome.clients.columns["loss"], strict=True))
    total = 0.0
    for client, n in enumerate(SIZES):
        rows = torch.from_numpy(data.rows(client))
        batch = Batch(
            data.dataset.train.inputs[rows].double(),
            data.dataset.train.targets[rows],
            *[torch.ones(n, dtype=torch.float64)] * 7,
        )
        named = {name: p.detach() for name, p in module.named_parameters()}
        exact, _ = batch_loss(module, LOSSES["classification"])(named, batch)
        assert losses[client] == pytest.approx(float(exact), rel=1e-12)
        total += n * float(exact)
    assert outcome.record["train_loss"] == pytest.approx(total / sum(SIZES), rel=1e-12)


def test_terms_of_an_affine_algorithm_are_added_to_the_gradient() -> None:
    def grad_fn(x: Vector, batch: Batch) -> Any:
        return x.map(torch.ones_like), None

    def terms(msg: Any, lent: Any, state: Any) -> Any:
        return 0.5, msg.x * 2.0

    x = Vector({"w": torch.tensor([1.0, -2.0])})
    algorithm = affine(grad_fn, terms)
    assert algorithm.terms is terms
    direction, _, _ = algorithm.phases[0].direction(Message({"x": x}), (), (), x, (), None)
    assert torch.equal(direction.vector.tensors["w"], 1 + 0.5 * x.tensors["w"] + 2 * x.tensors["w"])


def test_training_changes_neither_the_message_nor_the_clients_old_state() -> None:
    small = build(fedavg())
    spec = small.place.spec
    flat = small.federation.model.clone()
    message = Message({"x": spec.unflatten(flat)})
    ids = np.array([0])
    task = Task(ids, 0, 0, 0, Message({"x": flat}), lambda some: (), no_buffers(), SPEC)
    steps = small.place.clients.steps(task, ids)
    outcome = run_local(
        affine(small.place.grad_fn),
        message,
        (),
        (),
        lambda phase, s: Schedule(
            small.place.clients, ids, np.zeros(1, np.int64), steps, phases=[phase], number=0, spec=s
        ),
        spec=SPEC,
    )
    assert outcome.steps == 8
    assert torch.equal(flat, small.federation.model)
    assert spec.flatten(outcome.result.vectors["delta"]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", ENGINES)
def test_sums_over_many_steps_do_not_stall_in_low_precision(engine: str, dtype: torch.dtype) -> None:
    spec = LocalSpec(steps=400, batch_size=1, lr=0.125)
    small = build(fedavg(), engine=engine, dtype=dtype, spec=spec, data=random_data(sizes=(2, 3)))
    for _, _, steps, normaliser, metrics in answers(small).values():
        assert steps == 400
        assert normaliser == pytest.approx(50.0, rel=1e-6)
        assert np.isfinite(metrics["loss"])

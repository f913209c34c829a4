"""Phases of local training: full passes, parts of a model, tables and optimisers of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.flat import flat_of, write_flat
from fedsim.local import (
    Direction,
    LocalAlgorithm,
    LocalSpec,
    Phase,
    Result,
    affine,
    from_broadcast,
    report_delta,
    stateless,
)
from fedsim.strategies.fedavg import fedavg
from fedsim.types import Batch, GradFn
from fedsim.vector import Vector
from tests.federations import SIZES, build, random_data
from tests.halves import answers, plain_direction, with_local

ENGINES = ["loop", "stacked"]


class Sum(NamedTuple):
    """What a full pass adds up."""

    gradient: Vector
    share: Tensor


def summing(grad_fn: GradFn) -> LocalAlgorithm:
    """One full pass at fixed x; reports the mean gradient as `gradient`, and the shares' sum."""

    def direction(msg: Any, lent: Any, state: Any, x: Vector, carry: Sum, batch: Batch) -> Any:
        g, aux = grad_fn(x, batch)
        return Direction(g), Sum(carry.gradient + batch.weight * g, carry.share + batch.weight), aux

    def init(msg: Any, lent: Any, state: Any) -> Any:
        return msg.x, Sum(msg.x.zeros_like(), torch.zeros((), dtype=torch.float64))

    def finish(msg: Any, lent: Any, state: Any, x: Vector, carry: Sum, normaliser: Tensor) -> Any:
        return Result({"delta": x - msg.x, "gradient": carry.gradient}, {"share": carry.share}), state, {}

    phases = (Phase(direction, data="full"), Phase(plain_direction(grad_fn)))
    return LocalAlgorithm(stateless, init, phases, finish)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "spec",
    [
        LocalSpec(epochs=1, batch_size=4, lr=0.1),
        LocalSpec(steps=2, batch_size=4, lr=0.1),
        LocalSpec(epochs=1, batch_size=0, lr=0.1),
    ],
    ids=["a pass", "two steps", "all data at once"],
)
def test_a_full_pass_carries_the_exact_gradient_of_all_of_a_clients_data(
    spec: LocalSpec, engine: str
) -> None:
    small = build(with_local(summing), engine=engine, spec=spec, block=5)
    x = small.federation.model.clone()
    module, layout = small.place.module, small.place.spec
    write_flat(module, layout, x)
    data = small.place.clients.data
    for client, (vectors, scalars, *_) in answers(small).items():
        rows = torch.from_numpy(data.rows(client))
        inputs = data.dataset.train.inputs[rows].double()
        loss = torch.nn.functional.cross_entropy(module(inputs), data.dataset.train.targets[rows])
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
        assert scalars["share"] == pytest.approx(1.0, abs=1e-12)
        torch.testing.assert_close(vectors["gradient"], exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_pass_is_no_local_step_and_does_not_move_x(engine: str) -> None:
    def only_full(grad_fn: GradFn) -> LocalAlgorithm:
        both = summing(grad_fn)
        return both._replace(phases=both.phases[:1])

    small = build(with_local(only_full), engine=engine)
    for vectors, _, steps, normaliser, _ in answers(small).values():
        assert not vectors["delta"].any()
        assert (steps, normaliser) == (0, 0.0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "spec",
    [
        LocalSpec(epochs=1, batch_size=4, lr=0.1),
        LocalSpec(epochs=1, batch_size=4, lr=0.1, momentum=0.9, weight_decay=0.1),
        LocalSpec(epochs=1, batch_size=4, lr=0.1, weight_decay=0.1, optimizer="adamw"),
    ],
    ids=["plain", "momentum and weight decay", "adamw"],
)
def test_a_phase_moves_the_parameters_that_it_trains_and_no_other(spec: LocalSpec, engine: str) -> None:
    def head_only(grad_fn: GradFn) -> LocalAlgorithm:
        phase = Phase(plain_direction(grad_fn), trains=("2.",))
        return LocalAlgorithm(stateless, from_broadcast, (phase,), report_delta)

    small = build(with_local(head_only), engine=engine, spec=spec)
    for vectors, *_ in answers(small).values():
        delta = small.place.spec.unflatten(vectors["delta"]).tensors
        assert delta["2.weight"].any()
        assert not delta["0.weight"].any()
        assert not delta["0.bias"].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_norm_clip_sees_the_trained_parameters_only(engine: str) -> None:
    def head_only(grad_fn: GradFn) -> LocalAlgorithm:
        phase = Phase(plain_direction(grad_fn), trains=("2.",))
        return LocalAlgorithm(stateless, from_broadcast, (phase,), report_delta)

    spec = LocalSpec(steps=1, batch_size=0, lr=1.0, clip_norm=1e-2)
    small = build(with_local(head_only), engine=engine, spec=spec)
    for vectors, *_ in answers(small).values():
        assert float(vectors["delta"].norm()) == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_phase_with_its_own_table_uses_all_of_it(engine: str) -> None:
    own = LocalSpec(epochs=3, batch_size=2, lr=0.05)

    def two_phases(grad_fn: GradFn) -> LocalAlgorithm:
        first, second = Phase(plain_direction(grad_fn)), Phase(plain_direction(grad_fn), spec=own)
        return LocalAlgorithm(stateless, from_broadcast, (first, second), report_delta)

    spec = LocalSpec(epochs=1, batch_size=4, lr=0.1)
    small = build(with_local(two_phases), engine=engine, spec=spec, block=5)
    for client, (_, _, steps, normaliser, _) in answers(small).items():
        n = SIZES[client]
        first, second = -(-n // 4), 3 * -(-n // 2)
        assert steps == first + second
        assert normaliser == pytest.approx(0.1 * first + 0.05 * second, rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_optimiser_that_is_kept_continues_in_the_next_task(engine: str) -> None:
    def keeping(grad_fn: GradFn) -> LocalAlgorithm:
        return affine(grad_fn)._replace(keeps_optimizer=True)

    sizes = (4, 4, 4)
    spec = LocalSpec(steps=2, batch_size=0, lr=0.01, optimizer="adam")
    kept = build(with_local(keeping), engine=engine, spec=spec, data=random_data(sizes=sizes), cohort=1)
    # The same client three times: one run of six steps of Adam.
    kept.federation.sample = lambda *_: np.array([1])
    for _ in range(3):
        kept.federation.run_window()
    rows = torch.from_numpy(kept.place.clients.data.rows(1))
    train = kept.place.clients.data.dataset.train
    module = kept.place.module
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(train.inputs[rows].double()), train.targets[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(kept.federation.model, flat_of(module, kept.place.spec), rtol=0, atol=1e-12)
    reset = build(fedavg(), engine=engine, spec=spec, data=random_data(sizes=sizes), cohort=1)
    reset.federation.sample = lambda *_: np.array([1])
    for _ in range(3):
        reset.federation.run_window()
    assert (reset.federation.model - kept.federation.model).norm() > 1e-4


def test_one_client_in_one_phase_of_several_keeps_no_optimiser_between_phases() -> None:
    def twice(grad_fn: GradFn) -> LocalAlgorithm:
        phase = Phase(plain_direction(grad_fn))
        return LocalAlgorithm(stateless, from_broadcast, (phase, phase), report_delta)

    small = build(with_local(twice), spec=LocalSpec(steps=2, batch_size=0, lr=0.1, momentum=0.9))
    # Momentum starts anew: 2 · (1 + 1.9) and not 1 + 1.9 + 2.71 + 3.439.
    assert all(answer[3] == pytest.approx(0.1 * 2 * 2.9) for answer in answers(small).values())

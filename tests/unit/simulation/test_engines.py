"""The simulated engine: its clock, its blocks, whose state is kept, and how the engines compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.buffers import no_buffers
from fedsim.engine import Arrived, Drained, Failed, Timer
from fedsim.flat import flat_of
from fedsim.local import LocalSpec
from fedsim.simulation.devices import instant
from fedsim.strategies.fedavg import fedavg
from fedsim.training.work import by_size
from fedsim.types import Message, Task, UpdateBlock
from tests.federations import SIZES, SPEC, Small, build, mlp, random_data

ENGINES = ["loop", "stacked"]


def submit(small: Small, ids: list[int]) -> Task:
    state = small.federation.state.strategy
    message: Message = small.federation.strategy.broadcast(state)
    task = Task(np.array(ids), 0, 0, 0, message, lambda some: (), no_buffers(), SPEC)
    small.engine.submit(task)
    return task


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_one_client_in_federated_averaging_is_plain_sgd(
    engine: str, momentum: float, weight_decay: float
) -> None:
    spec = LocalSpec(steps=6, batch_size=0, lr=0.1, momentum=momentum, weight_decay=weight_decay)
    small = build(fedavg(), engine=engine, spec=spec, data=random_data(sizes=(9,)))
    small.federation.run_window()
    torch.manual_seed(0)
    module = mlp().double()
    train = small.place.clients.data.dataset.train
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(train.inputs.double()), train.targets).backward()
        optimizer.step()
    torch.testing.assert_close(small.federation.model, flat_of(module, small.place.spec), rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_step_on_all_data_is_centralised_gradient_descent(engine: str) -> None:
    small = build(fedavg(), engine=engine, spec=LocalSpec(steps=1, batch_size=0, lr=0.3))
    for _ in range(3):
        small.federation.run_window()
    torch.manual_seed(0)
    module = mlp().double()
    train = small.place.clients.data.dataset.train
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(train.inputs.double()), train.targets).backward()
        optimizer.step()
    torch.testing.assert_close(small.federation.model, flat_of(module, small.place.spec), rtol=0, atol=1e-12)


def test_events_come_in_time_and_the_clock_follows() -> None:
    seconds = np.array([3.0, 1.0, 2.0, 1.0, 5.0])
    devices = instant()._replace(
        seconds=lambda ids, steps, window: seconds[ids], lost=lambda ids, window: ids == 2
    )
    small = build(fedavg(), devices=devices)
    submit(small, [0, 1, 2, 3, 4])
    small.engine.set_timer("deadline", 4.0)
    events = [(small.engine.next_event(), small.engine.now) for _ in range(6)]
    kinds = [(type(event), at) for event, at in events]
    assert kinds == [
        (Arrived, 1.0),
        (Failed, 2.0),
        (Arrived, 3.0),
        (Timer, 4.0),
        (Arrived, 5.0),
        (Drained, 5.0),
    ]
    first = events[0][0]
    assert isinstance(first, Arrived)
    assert first.ids.tolist() == [1, 3]
    assert first.base_version.tolist() == [0, 0]


def test_only_what_is_collected_is_computed() -> None:
    computed: list[float] = []

    def counting(inner: Any) -> Any:
        def grad_fn(x: Any, batch: Any) -> Any:
            computed.append(float(batch.total))
            return inner(x, batch)

        return grad_fn

    small = build(fedavg(), grad=counting)
    submit(small, [0, 1, 2, 3, 4])
    small.engine.next_event()
    assert computed == []
    (block,) = small.engine.collect(np.array([3]), np.zeros(1, np.int64))
    assert isinstance(block, UpdateBlock)
    assert len(computed) == int(block.local_steps[0])


def test_cancelling_forgets_tasks_timers_and_states() -> None:
    small = build(fedavg())
    submit(small, [0, 1])
    small.engine.set_timer("deadline", 4.0)
    small.engine.cancel()
    assert isinstance(small.engine.next_event(), Drained)
    assert list(small.engine.collect(np.array([0, 1]), np.zeros(2, np.int64))) == []


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8])
def test_blocks_hold_the_clients_with_most_steps_first_and_everyone_once(block: int) -> None:
    steps = np.array([3, 9, 9, 0, 4, 1])
    blocks = by_size(steps, block)
    assert all(len(b) <= block for b in blocks)
    order = np.concatenate(blocks)
    assert sorted(order.tolist()) == list(range(6))
    assert order.tolist() == [1, 2, 4, 0, 5, 3]


def test_no_more_than_one_block_of_updates_is_alive_for_a_linear_strategy() -> None:
    small = build(fedavg(), engine="stacked", block=2)
    submit(small, [0, 1, 2, 3, 4])
    collected = small.engine.collect(np.arange(5), np.zeros(5, np.int64))
    sizes = [len(b) for b in collected if isinstance(b, UpdateBlock)]
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_is_a_function_of_its_seed(engine: str) -> None:
    def models(seed: int) -> list[torch.Tensor]:
        small = build(fedavg(), engine=engine, seed=seed, cohort=3)
        out = []
        for _ in range(3):
            small.federation.run_window()
            out.append(small.federation.model)
        return out

    assert all(torch.equal(a, b) for a, b in zip(models(1), models(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(models(1), models(2), strict=True))


class WithScalar(nn.Module):
    """A classifier with a learned temperature, a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 3)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.line(inputs) * self.temperature
        return logits


def assert_engines_agree(windows: int = 2, **parameters: Any) -> None:
    runs = [build(fedavg(), engine=engine, **parameters) for engine in ENGINES]
    for _ in range(windows):
        records = [small.federation.run_window().record for small in runs]
        one, other = (small.federation.model for small in runs)
        assert (one - other).norm() <= 1e-10 * one.norm()
        counts = ("received", "refused", "late", "lost", "bytes_up", "bytes_down", "clock_seconds")
        assert all(records[0][name] == records[1][name] for name in counts)
        assert records[0]["train_loss"] == pytest.approx(records[1]["train_loss"], rel=1e-10)


def test_engines_agree_on_a_model_with_a_scalar_parameter() -> None:
    assert_engines_agree(model=WithScalar)


def test_engines_agree_with_clients_that_have_no_examples() -> None:
    assert_engines_agree(data=random_data(sizes=(4, 0, 6, 1, 0)), block=5)


def test_engines_agree_when_stragglers_do_part_of_the_work() -> None:
    devices = instant()._replace(
        limit=lambda ids, steps, window: np.where(ids % 2, np.maximum(1, steps // 3), steps)
    )
    assert_engines_agree(devices=devices, block=5, spec=replace(SPEC, epochs=5))


def test_engines_agree_when_some_devices_drop_out_or_are_late() -> None:
    devices = instant()._replace(
        seconds=lambda ids, steps, window: 1.0 + (ids + window) % 3, lost=lambda ids, window: ids == window
    )
    assert_engines_agree(devices=devices, deadline=2.5)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "clip_norm"), [("sgd", None), ("adam", 0.1)])
@pytest.mark.parametrize("mode", [{"epochs": 1}, {"epochs": 3}, {"steps": 1}, {"steps": 7}], ids=str)
@pytest.mark.parametrize("batch_size", [0, 1, 4, 100])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 5, 5), SIZES, (17, 2)], ids=str)
def test_engines_agree_for_every_shape_of_local_training(
    sizes: tuple[int, ...], batch_size: int, mode: dict[str, int], optimizer: Any, clip_norm: float | None
) -> None:
    spec = LocalSpec(
        batch_size=batch_size,
        lr=0.02,
        momentum=0.9,
        weight_decay=0.01,
        clip_norm=clip_norm,
        optimizer=optimizer,
        **mode,  # type: ignore[arg-type]
    )
    assert_engines_agree(data=random_data(sizes=sizes), spec=spec, block=2)


def test_dropout_draws_a_clients_own_numbers_in_the_loop_engine_whoever_is_beside_it() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    deltas = []
    for cohort in ([1, 3], [0, 1, 2, 3, 4], [3]):
        seen: dict[int, torch.Tensor] = {}
        small = build(
            fedavg(),
            model=net,
            observers=[lambda o, seen=seen: seen.update({int(o.block.ids[0]): o.block.vectors["delta"][0]})],
        )
        small.federation.sample = lambda window, draw, count, busy, ids=cohort: np.array(ids)
        small.federation.run_window()
        deltas.append(seen[3])
    assert torch.equal(deltas[0], deltas[1])
    assert torch.equal(deltas[0], deltas[2])


def test_dropout_in_the_stacked_engine_repeats_and_differs_between_clients() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))

    def run() -> torch.Tensor:
        small = build(fedavg(), engine="stacked", model=net)
        small.federation.run_window()
        return small.federation.model

    assert torch.equal(run(), run())

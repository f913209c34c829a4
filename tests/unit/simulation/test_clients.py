"""The virtual clients' batches: one array, gathered by index, the same alone and in a block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.buffers import no_buffers
from fedsim.data.federated import FederatedData
from fedsim.data.transforms import Transforms
from fedsim.local import LocalSpec, Phase
from fedsim.training.clients import ClientData, Schedule
from fedsim.types import Batch, Message, Task
from tests.federations import SIZES, random_data

SPEC = LocalSpec(epochs=2, batch_size=4, lr=0.25)
EVERYONE = np.arange(len(SIZES))


def clients_of(data: FederatedData, dtype: torch.dtype = torch.float64) -> ClientData:
    return ClientData(data, seed=5, dtype=dtype, device=torch.device("cpu"))


def schedule(clients: ClientData, ids: np.ndarray, spec: LocalSpec = SPEC, *, full: bool = False) -> Schedule:
    phase = Phase(lambda *_: None, data="full" if full else "batches")  # type: ignore[arg-type, return-value]
    task = Task(EVERYONE, 0, 2, 0, Message({}), lambda some: (), no_buffers(), spec)
    rounds, steps = np.full(len(ids), 2, np.int64), clients.steps(task, ids)
    return Schedule(clients, ids, rounds, steps, phases=[phase], number=0, spec=spec)


def keyed_noise() -> Transforms:
    """A random transform whose outcome shows the key of each example."""

    def train(inputs: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        noise = (keys % 1000).to(inputs.dtype) / 1000
        return inputs + noise.reshape(*noise.shape, *[1] * (inputs.ndim - noise.ndim))

    return Transforms(train=train, evaluate=lambda inputs: inputs, random=True)


def rows_of(batch: Batch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    real = batch.mask[row] > 0
    return batch.inputs[row][real], batch.targets[row][real]


@pytest.mark.parametrize("random", [False, True], ids=["plain", "augmented"])
def test_a_client_gets_the_same_batches_alone_and_in_a_block(random: bool) -> None:
    data = random_data()
    if random:
        data = replace(data, dataset=replace(data.dataset, transforms=keyed_noise()))
    clients = clients_of(data)
    # As the engine sorts a block: most steps first.
    order = np.argsort(-np.array(SIZES), kind="stable")
    together = schedule(clients, order)
    for row, client in enumerate(order):
        alone = list(schedule(clients, np.array([client])))
        assert len(alone) == together.steps[row]
        for step, batch in enumerate(alone):
            inputs, targets = rows_of(together.stacked(step, row + 1), row)
            assert torch.equal(batch.inputs, inputs)
            assert torch.equal(batch.targets, targets)
            assert bool(batch.mask.all())


def test_a_clients_batches_hold_its_own_examples_and_no_others() -> None:
    data = random_data()
    clients = clients_of(data)
    for client in EVERYONE:
        own = data.dataset.train.inputs[torch.from_numpy(data.rows(client))].double()
        first_pass = [b.inputs for b in schedule(clients, np.array([client]), replace(SPEC, epochs=1))]
        seen = torch.cat(first_pass)
        assert torch.equal(seen[seen[:, 0].argsort()], own[own[:, 0].argsort()])


def test_every_step_of_an_example_draws_its_augmentation_anew() -> None:
    data = random_data(sizes=(8,))
    data = replace(data, dataset=replace(data.dataset, transforms=keyed_noise()))
    clients = clients_of(data)
    batches = list(schedule(clients, np.array([0]), LocalSpec(epochs=4, batch_size=8)))
    plain = data.dataset.train.inputs[torch.from_numpy(data.rows(0))].double()
    noises = []
    for batch in batches:
        distance = torch.cdist(
            batch.inputs - batch.inputs.mean(1, keepdim=True), plain - plain.mean(1, keepdim=True)
        )
        noises.append((batch.inputs - plain[distance.argmin(1)])[:, 0])
    assert len(torch.cat(noises).round(decimals=6).unique()) > 28


def test_a_full_pass_is_in_order_without_augmentation_and_its_weights_sum_to_one() -> None:
    data = random_data()
    data = replace(data, dataset=replace(data.dataset, transforms=keyed_noise()))
    clients = clients_of(data)
    for client in EVERYONE:
        batches = list(schedule(clients, np.array([client]), full=True))
        own = data.dataset.train.inputs[torch.from_numpy(data.rows(client))].double()
        assert torch.equal(torch.cat([b.inputs for b in batches]), own)
        assert float(sum(b.weight for b in batches)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_batch_has_the_models_dtype_and_its_shapes(dtype: torch.dtype) -> None:
    batch = schedule(clients_of(random_data(), dtype), EVERYONE).stacked(0, 3)
    assert (batch.inputs.dtype, batch.mask.dtype, batch.lr.dtype, batch.weight.dtype) == (dtype,) * 4
    assert batch.inputs.shape == (3, 4, 6)
    assert batch.targets.shape == batch.mask.shape == (3, 4)
    assert batch.lr.shape == batch.index.shape == ()
    for field in (batch.total, batch.epoch_start, batch.active, batch.weight):
        assert field.shape == (3,)
    single = next(iter(schedule(clients_of(random_data(), dtype), np.array([0]))))
    fields: list[Any] = [
        single.total,
        single.epoch_start,
        single.active,
        single.weight,
        single.lr,
        single.index,
    ]
    assert all(field.shape == () for field in fields)
    assert float(single.lr) == 0.25


def test_characters_stay_whole_numbers() -> None:
    batch = schedule(clients_of(random_data("lstm")), EVERYONE).stacked(0, 2)
    assert batch.inputs.dtype == torch.int64
    assert batch.inputs.shape == (2, 4, 5)


def test_a_block_with_a_client_without_examples_can_be_made() -> None:
    clients = clients_of(random_data(sizes=(4, 0, 6)))
    task = Task(np.arange(3), 0, 2, 0, Message({}), lambda some: (), no_buffers(), SPEC)
    assert clients.steps(task, np.arange(3)).tolist() == [2, 0, 4]
    order = np.array([2, 0, 1])
    made = schedule(clients, order)
    assert len(made) == 4
    assert list(schedule(clients, np.array([1]))) == []


def test_steps_of_a_task_are_those_of_the_clients_asked_for() -> None:
    clients = clients_of(random_data())
    task = Task(
        np.array([1, 3, 4]), 0, 0, 0, Message({}), lambda some: (), no_buffers(), SPEC, np.array([7, 8, 9])
    )
    assert clients.steps(task, np.array([4, 1])).tolist() == [9, 7]

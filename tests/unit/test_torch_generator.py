"""One generator serves the process; runs in other threads must not hear of each other's draws."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import Simulation
from fedsim.build import build_data, build_model
from fedsim.config import from_dict
from fedsim.keys import own_torch_generator
from tests.wired import config

RUNS = 4


class Dropping(nn.Module):
    """Large enough that its initial weights are not drawn in one go; drops half of what it hides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 300), nn.Linear(300, 300), nn.Dropout(0.5), nn.Linear(300, 3)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.layers(inputs)
        return found


def values_of(seed: int) -> dict[str, Any]:
    values = config(round={"sample": 4})
    values["run"] = {"seed": seed, "rounds": 2}
    return values


def trained(seed: int) -> dict[str, Tensor]:
    simulation = Simulation(values_of(seed), model=Dropping)
    for _ in simulation:
        pass
    return simulation.model_tensors()


def weights(seed: int) -> list[Tensor]:
    values = from_dict(values_of(seed))
    return [p.detach() for p in build_model(values, build_data(values), Dropping).parameters()]


def test_simulations_in_threads_beside_each_other_are_those_of_their_seeds() -> None:
    wanted = [trained(seed) for seed in range(RUNS)]
    with ThreadPoolExecutor(RUNS) as threads:
        found = list(threads.map(trained, range(RUNS)))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_initial_weights_drawn_in_threads_beside_each_other_are_those_of_their_seeds() -> None:
    seeds = range(40)
    wanted = [weights(seed) for seed in seeds]
    with ThreadPoolExecutor(RUNS) as threads:
        found = list(threads.map(weights, seeds))
    assert all(
        torch.equal(a, b) for f, w in zip(found, wanted, strict=True) for a, b in zip(f, w, strict=True)
    )


def test_who_has_the_generator_has_it_alone_and_leaves_it_as_it_was() -> None:
    before = torch.random.get_rng_state()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with own_torch_generator(), own_torch_generator():  # by the same thread as often as it likes
            inside.set()
            assert leave.wait(60)
            torch.rand(3)

    with ThreadPoolExecutor(2) as threads:
        holder = threads.submit(first)
        assert inside.wait(60)
        second = threads.submit(weights, 1)
        with pytest.raises(TimeoutError):
            second.result(0.1)
        leave.set()
        holder.result(60)
        second.result(60)
    assert torch.equal(torch.random.get_rng_state(), before)

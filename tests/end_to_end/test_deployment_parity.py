"""Real client processes and the simulator make the same model, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from fedsim.cli import call
from tests.deployed import Deployment
from tests.deployed_values import large, values_of


def test_two_client_processes_make_the_model_of_the_simulator(fleet: Deployment) -> None:
    """With control variates on both sides, over TLS."""
    fleet.ready(2)
    values = values_of("scaffold", clients=2, rounds=2)
    fleet.submit(values).assert_as_simulated(values)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "fedau", "fedspeed", "fedhyper"])
def test_five_client_processes_make_the_model_of_the_simulator(fleet: Deployment, strategy: str) -> None:
    fleet.ready(5)
    # Three of five: who is drawn, and what clients keep while they are not, belongs to it.
    values = values_of(strategy, clients=5, rounds=5, round={"sample": 3})
    fleet.submit(values).assert_as_simulated(values)


@pytest.mark.slow
def test_a_run_that_begins_beside_the_rounds_of_another_has_the_model_of_its_seed(fleet: Deployment) -> None:
    """Their initial weights are drawn from one generator of the coordinator's process."""
    fleet.ready(2)
    seeds = {}
    for seed in range(4):
        values = values_of("fedavg", clients=2, rounds=1)
        values["run"]["seed"] = seed
        seeds[seed] = large(values, 12.0)
        fleet.simulated(seeds[seed])
    busy = fleet.submit(values_of("scaffold", clients=2, rounds=10_000))
    busy.await_round(2)
    for values in seeds.values():
        fleet.submit(values).assert_as_simulated(values)
    assert not busy.get().over
    fleet.operator.stop(busy.run_id, now=True)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("strategy", ["fedbuff", "fedasync"])
def test_an_asynchronous_run_equals_the_replay_of_its_ledger(
    fleet: Deployment, strategy: str, every: int
) -> None:
    fleet.ready(5)
    buffer: dict[str, Any] = {"name": "buffer", "size": 2}
    scheduler = buffer if strategy == "fedbuff" else {"name": "immediate"}
    values = values_of(
        strategy, clients=5, rounds=12, round={"sample": 4}, scheduler=scheduler,
        deployment={"checkpoint_every": every, "min_clients": 5},
    )  # fmt: skip
    run = fleet.submit(values)
    run.ok()
    assert run.digest == run.replayed()
    # And as anybody would see it: files as the manifest has them, every number of every version again.
    assert call(["verify", str(run.folder.path), "--rounds", "12", "--quiet"]) == 0

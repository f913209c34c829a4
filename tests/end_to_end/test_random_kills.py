"""A coordinator that is killed again and again, when nobody expects it, ends as if nothing had happened.

``FEDSIM_KILLS=50 pytest -s -m slow tests/end_to_end/test_random_kills.py`` kills as often as it promises.
The seed of the moments is printed; ``FEDSIM_KILLS_SEED`` repeats them, as far as processes can.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.deployed import Deployment, Run, until
from tests.deployed_values import values_of

pytestmark = pytest.mark.slow

# Read at once: tests clear the environment of whatever a user has set.
KILLS = int(os.environ.get("FEDSIM_KILLS", "5"))
SEED = int(os.environ.get("FEDSIM_KILLS_SEED", "0"))


@contextmanager
def through_the_proxy(fleet: Deployment, name: str) -> Iterator[None]:
    """This client speaks through the proxy too."""
    fleet.members[name].stop()
    fleet.start_client(name, "--server", fleet.proxy.address)
    try:
        fleet.await_online(name)
        yield
    finally:
        fleet.members[name].stop()


def killed(fleet: Deployment, run: Run, rng: random.Random) -> list[int]:
    """Kill the coordinator `KILLS` times and start it again; the rounds that were done each time.

    The proxy lives in this process. So a run whose every round needs a client that speaks through it stands
    still while this process does, and cannot be over before its last kill because nobody looked.

    Most kills come a little after one to three more rounds. One in five comes while the coordinator takes
    the run up, but never five times in a row: that would be a crash loop, which pauses a run.
    """
    done: list[int] = []
    soon = 0
    for _ in range(KILLS):
        if done and soon < 3 and rng.random() < 0.2:
            soon += 1
            time.sleep(rng.uniform(0.0, 0.3))
        else:
            soon = 0
            more = len(run.records) + rng.randint(1, 3)
            until(lambda more=more: len(run.records) >= more or run.get().over, "progress")
            time.sleep(rng.uniform(0.0, 0.15))
        fleet.coordinator.kill()
        done.append(len(run.records) - 1)
        fleet.start_coordinator()
    return done


def seed() -> int:
    """Of the moments, printed."""
    found = SEED or random.SystemRandom().randrange(1, 1 << 32)
    print(f"FEDSIM_KILLS_SEED={found} FEDSIM_KILLS={KILLS}")
    return found


def rounds(per_kill: int) -> int:
    """Enough for a run to outlive the kills."""
    return per_kill * (KILLS + 1)


def test_a_run_survives_kills_at_random_moments_with_the_very_same_model(fleet: Deployment) -> None:
    """R1 to R6 at moments that no list names; every answer counted exactly once."""
    fleet.ready(3)
    values: dict[str, Any] = values_of("scaffold", rounds=rounds(12))
    fleet.simulated(values)
    run = fleet.submit(values)
    done = killed(fleet, run, random.Random(seed()))
    print(f"rounds done at the kills: {done}")
    assert done[-1] < values["run"]["rounds"], "the run was over before the last kill"
    run.assert_as_simulated(values)


def test_an_asynchronous_run_survives_kills_as_its_ledger_says(fleet: Deployment) -> None:
    """The same with a buffer: the model is that of the journal, gone through again by the simulator."""
    fleet.ready(3)
    values = values_of(
        "fedbuff", rounds=rounds(20), round={"sample": 3}, scheduler={"name": "buffer", "size": 2},
        deployment={"checkpoint_every": 3, "min_clients": 3},
    )  # fmt: skip
    # A version takes the answers of two clients: one of the two must be at the proxy.
    with through_the_proxy(fleet, "client-2"):
        run = fleet.submit(values)
        done = killed(fleet, run, random.Random(seed()))
        run.ok()
    print(f"versions done at the kills: {done}")
    assert done[-1] < values["run"]["rounds"], "the run was over before the last kill"
    assert run.digest == run.replayed()
    arrived = [line["payload"]["task"] for line in run.journal if line["kind"] == "arrived"]
    assert len(arrived) == len(set(arrived))
    assert sum(record["lost"] + record["refused"] + record["late"] for record in run.records[1:]) == 0
    # What was acknowledged was folded, but for answers that came when the last version was there. A window
    # may hold one alone: where the other clients have not found their coordinator again, nobody can be asked.
    assert 0 <= len(arrived) - sum(record["received"] for record in run.records) <= 3

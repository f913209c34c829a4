"""Flower on Ray: its simulation with two actors, one core and one thread each; it draws its own cohorts.

The leader is heard where Flower evaluates on the server, between two rounds.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import Any

import numpy as np

from benchmarks.speed.peers.planned import Planned
from benchmarks.speed.turns import Turns

ACTORS = 2


@functools.cache
def planned(path: str) -> Planned:
    """The arrays, read once by each actor."""
    return Planned(path)


@functools.cache
def model(path: str) -> Any:
    """The model, made once by each actor."""
    import torch

    from benchmarks.speed.peers.torch_models import model_of

    torch.set_num_threads(1)
    plan = planned(path)
    return model_of(plan.model, plan.parameters)


def fit(path: str, client: int, weights: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Local SGD of one client, by hand as in `benchmarks.speed.sequential`."""
    import torch

    plan, net = planned(path), model(path)
    net.load_state_dict({n: torch.from_numpy(w) for n, w in zip(net.state_dict(), weights, strict=True)})
    rows = np.random.default_rng().permutation(plan.owned(client))
    optimizer = torch.optim.SGD(net.parameters(), lr=plan.lr)
    for first in range(0, len(rows), plan.batch):
        batch = rows[first : first + plan.batch]
        optimizer.zero_grad()
        inputs, targets = torch.from_numpy(plan.inputs[batch]), torch.from_numpy(plan.targets[batch])
        torch.nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return [value.numpy().copy() for value in net.state_dict().values()], len(rows)


class Led:
    """Waits for the leader in the server's evaluation."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.left, self.began = turns, 0, 0.0
        self.seconds: list[float] = []

    def __call__(self, server_round: int, weights: Any, config: Any) -> None:
        import flwr

        if server_round:
            self.seconds.append(time.perf_counter() - self.began)
            self.left -= 1
        else:
            self.turns.say(ready=True, version=flwr.__version__)
        if self.seconds and not self.left:
            self.turns.say(seconds=self.seconds, evaluated=[False] * len(self.seconds))
            self.seconds = []
        while self.left <= 0:
            wish = self.turns.hear()
            if wish is None:
                os._exit(0)  # Ray's processes end with the one that started them
            if "save" in wish:
                self.turns.say(saved=False)
            self.left = wish.get("rounds", 0)
        self.began = time.perf_counter()


def main() -> None:
    """Serve turns: PLAN."""
    turns = Turns()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import Context, ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    path = sys.argv[1]
    plan = Planned(path)
    clients, cohort = int(plan.arrays["clients"]), plan.cohorts.shape[1]
    led = Led(turns)

    class Client(NumPyClient):  # type: ignore[misc, unused-ignore]
        """A client with the rows of its number."""

        def __init__(self, number: int) -> None:
            self.number = number

        def fit(self, parameters: Any, config: Any) -> Any:
            weights, examples = fit(path, self.number, parameters)
            return weights, examples, {}

    def client_fn(context: Context) -> Any:
        return Client(int(context.node_config["partition-id"])).to_client()

    def server_fn(context: Context) -> Any:
        strategy = FedAvg(
            fraction_fit=cohort / clients,
            min_fit_clients=cohort,
            fraction_evaluate=0.0,
            min_available_clients=clients,
            evaluate_fn=led,
            initial_parameters=ndarrays_to_parameters(list(plan.parameters.values())),
        )
        rounds = ServerConfig(num_rounds=len(plan.cohorts) + 1)  # the leader ends it
        return ServerAppComponents(strategy=strategy, config=rounds)

    run_simulation(
        server_app=ServerApp(server_fn=server_fn),
        client_app=ClientApp(client_fn=client_fn),
        num_supernodes=clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": ACTORS, "include_dashboard": False, "log_to_driver": False},
        },
    )


if __name__ == "__main__":
    main()

"""pfl-research in two processes: its federated averaging on a PyTorch model, one thread each.

Each *user* is one client of one planned round, with its examples in the planned order, so that the
global model can be compared. Between turns the second process waits for the first in a broadcast.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks.speed.peers.planned import Planned
from benchmarks.speed.turns import Turns

GO_ON, STOP = 1, 0


def second_process() -> subprocess.Popen[bytes]:
    """Start this program as rank 1 of two, and become rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["PFL_WORKER_ADDRESSES"] = f"127.0.0.1:{port},127.0.0.1:{port}"
    os.environ["PFL_WORKER_RANK"] = "0"
    words = [sys.executable, "-m", "benchmarks.speed.peers.pfl_research", *sys.argv[1:]]
    return subprocess.Popen(words, env={**os.environ, "PFL_WORKER_RANK": "1"}, stdin=subprocess.DEVNULL)


def main() -> None:
    """Serve turns: PLAN."""
    first = "PFL_WORKER_RANK" not in os.environ
    turns = Turns() if first else None
    os.environ["OMP_NUM_THREADS"] = "1"
    other = second_process() if first else None
    try:
        train(turns, Planned(sys.argv[1]))
    finally:
        if other is not None:
            other.wait(60)


def train(turns: Turns | None, plan: Planned) -> None:
    """Run until the leader has gone; `turns` is None in the second process."""
    import pfl
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    from benchmarks.speed.peers.torch_models import model_of

    torch.set_num_threads(1)
    inputs, targets = torch.from_numpy(plan.inputs), torch.from_numpy(plan.targets)

    class Learner(torch.nn.Module):
        """The model with the loss that pfl asks for."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model_of(plan.model, plan.parameters)

        def loss(self, x: Any, y: Any) -> Any:
            return torch.nn.functional.cross_entropy(self.model(x), y)

        def metrics(self, x: Any, y: Any) -> dict[str, Any]:
            return {}

    class Led(TrainingProcessCallback):  # type: ignore[misc, unused-ignore]
        """Waits for the leader between rounds, and keeps both processes together."""

        def __init__(self) -> None:
            self.left, self.began = 0, 0.0
            self.seconds: list[float] = []

        def on_train_begin(self, *, model: Any) -> Any:
            if turns is not None:
                turns.say(ready=True, version=getattr(pfl, "__version__", "0.6"))
            self._wait()
            return Metrics()

        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> Any:
            self.seconds.append(time.perf_counter() - self.began)
            self.left -= 1
            return self._wait(), Metrics()

        def _wait(self) -> bool:
            word = torch.tensor([self._asked() if turns is not None else GO_ON])
            torch.distributed.broadcast(word, 0)
            self.began = time.perf_counter()
            return int(word) == STOP

        def _asked(self) -> int:
            assert turns is not None
            if self.left > 0:
                return GO_ON
            if self.seconds:
                turns.say(seconds=self.seconds, evaluated=[False] * len(self.seconds))
            self.seconds = []
            while self.left <= 0:
                wish = turns.hear()
                if wish is None:
                    return STOP
                if "save" in wish:
                    values = learner.model.state_dict().values()
                    named = zip(plan.parameters, values, strict=True)
                    np.savez(wish["save"], **{n: v.numpy() for n, v in named})
                    turns.say(saved=True)
                self.left = wish.get("rounds", 0)
            return GO_ON

    users = iter(range(plan.counts.size))
    cohort = plan.cohorts.shape[1]

    def dataset(user: int) -> Any:
        rows = torch.from_numpy(plan.rows(user // cohort, user % cohort))
        return PyTorchTensorDataset((inputs[rows], targets[rows]), user_id=str(user))

    learner = Learner()
    model = PyTorchModel(
        learner,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(learner.parameters(), 1.0),
    )
    federated = FederatedDataset(dataset, lambda: next(users))
    backend = SimulatedBackend(federated, federated, postprocessors=[WeightByDatapoints()])
    rounds = len(plan.cohorts) + 1  # the leader ends it
    FederatedAveraging().run(
        NNAlgorithmParams(
            rounds, evaluation_frequency=rounds + 1, train_cohort_size=cohort, val_cohort_size=0
        ),
        backend,
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=plan.lr, local_batch_size=plan.batch),
        callbacks=[Led()],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main()

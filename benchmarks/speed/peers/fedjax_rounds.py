"""FedJAX: its federated averaging over the planned cohorts; clients shuffle by FedJAX's own draw.

For linear stacks with ReLU and for the two-convolution networks, in plain ``jax.lax`` operations.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks.speed.peers.planned import Planned
from benchmarks.speed.peers.threads import limit
from benchmarks.speed.turns import Turns

CONVOLUTIONS = {"mlp": 0, "cnn": 2, "lenet5": 2}


def main() -> None:
    """Serve turns: PLAN THREADS."""
    turns = Turns()
    limit(int(sys.argv[2]))
    import jax
    import jax.numpy as jnp

    if not hasattr(jax, "tree_map"):  # FedJAX 0.0.17 calls it by the name that later JAX has dropped
        jax.tree_map = jax.tree_util.tree_map
    import fedjax

    plan = Planned(sys.argv[1])
    name = plan.model["name"]
    if name not in CONVOLUTIONS:
        raise SystemExit(f"no model {name!r} for this peer")
    padding = 2 if name == "cnn" else 0
    inputs = plan.inputs
    arrays = list(plan.parameters.values())
    params: Any = [jnp.asarray(a.T if a.ndim == 2 else a) for a in arrays]

    def logits(p: Any, x: Any) -> Any:
        for place in range(0, 2 * CONVOLUTIONS[name], 2):
            x = jax.lax.conv_general_dilated(
                x, p[place], (1, 1), [(padding, padding)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
            )
            x = jax.nn.relu(x + p[place + 1][:, None, None])
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x = x.reshape(len(x), -1)
        for place in range(2 * CONVOLUTIONS[name], len(p), 2):
            x = x @ p[place] + p[place + 1]
            if place + 2 < len(p):
                x = jax.nn.relu(x)
        return x

    def loss(p: Any, batch: Any, rng: Any) -> Any:
        logs = jax.nn.log_softmax(logits(p, batch["x"]))
        return -jnp.take_along_axis(logs, batch["y"][:, None], axis=1).mean()

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.sgd(learning_rate=plan.lr),
        fedjax.optimizers.sgd(learning_rate=1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=plan.batch, num_epochs=1, seed=0),
    )
    state = algorithm.init(params)
    keys = jax.random.split(jax.random.PRNGKey(0), plan.cohorts.shape[1])
    datasets: dict[int, Any] = {}
    for client in {int(c) for c in plan.cohorts.ravel()}:
        rows = plan.owned(client)
        datasets[client] = fedjax.ClientDataset({"x": inputs[rows], "y": plan.targets[rows].astype(np.int32)})

    def one_round(index: int) -> None:
        nonlocal state
        cohort = plan.cohorts[index].tolist()
        clients = [(str(c).encode(), datasets[c], key) for c, key in zip(cohort, keys, strict=True)]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)

    turns.say(ready=True, version=jax.__version__)
    turns.serve(one_round)


if __name__ == "__main__":
    main()

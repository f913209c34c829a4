"""Plain JAX: ``jit(scan(vmap))``, no simulator: the local steps of a block of clients in one program.

Clients of a cohort are sorted by their number of steps and cut into blocks, each padded to its longest
client, in multiples of four so that few shapes are compiled. The compiled program gathers the batches,
scans over the steps and sums the weighted differences. For linear stacks with ReLU.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks.speed.peers.planned import Planned
from benchmarks.speed.peers.threads import limit
from benchmarks.speed.turns import Turns

BLOCK_BYTES = 8 << 20  # of stacked parameters, as for fedsim's stacks
ROUND_UP = 4


def main() -> None:
    """Serve turns: PLAN THREADS."""
    turns = Turns()
    limit(int(sys.argv[2]))
    import jax
    import jax.numpy as jnp

    plan = Planned(sys.argv[1])
    if plan.model["name"] != "mlp":
        raise SystemExit("plain JAX is written for the MLPs alone")
    inputs = jnp.asarray(plan.inputs.reshape(len(plan.inputs), -1))
    targets = jnp.asarray(plan.targets)
    names = list(plan.parameters)
    params: Any = [jnp.asarray(a.T if a.ndim == 2 else a) for a in plan.parameters.values()]
    size = sum(a.size for a in plan.parameters.values())
    block = max(1, BLOCK_BYTES // (4 * size))

    def loss(p: Any, rows: Any, weights: Any) -> Any:
        hidden = inputs[rows]
        for place in range(0, len(p), 2):
            hidden = hidden @ p[place] + p[place + 1]
            if place + 2 < len(p):
                hidden = jax.nn.relu(hidden)
        logs = jax.nn.log_softmax(hidden)
        losses = -jnp.take_along_axis(logs, targets[rows][:, None], axis=1)[:, 0]
        return (losses * weights).sum() / jnp.maximum(weights.sum(), 1)

    gradient = jax.vmap(jax.grad(loss))

    def step(p: Any, batch: Any) -> Any:
        g = gradient(p, *batch)
        return [a - plan.lr * b for a, b in zip(p, g, strict=True)], None

    @jax.jit
    def train(x: Any, rows: Any, weights: Any, examples: Any) -> Any:
        """Σ n_i (x_i - x); rows and weights [S, C, B], examples [C]."""
        p = [jnp.broadcast_to(a, (rows.shape[1], *a.shape)) for a in x]
        p, _ = jax.lax.scan(step, p, (rows, weights))
        return [jnp.tensordot(examples, b - a, axes=1) for a, b in zip(x, p, strict=True)]

    def packed(index: int) -> list[tuple[Any, Any, Any]]:
        counts = plan.counts[index]
        steps = -(-counts // plan.batch)
        order = np.argsort(-steps, kind="stable")
        found: list[tuple[Any, Any, Any]] = []
        for first in range(0, len(order), block):
            members = order[first : first + block]
            longest = int(steps[members[0]])
            padded = 1 if longest == 1 else -(-longest // ROUND_UP) * ROUND_UP
            width = padded * plan.batch
            rows: Any = np.zeros((len(members), width), np.int32)
            weights: Any = np.zeros((len(members), width), np.float32)
            for place, member in enumerate(members.tolist()):
                own = plan.rows(index, member)
                rows[place, : len(own)] = own
                weights[place, : len(own)] = 1
            shape = (len(members), padded, plan.batch)
            rows, weights = (np.moveaxis(a.reshape(shape), 1, 0) for a in (rows, weights))
            found.append((rows, weights, counts[members].astype(np.float32)))
        return found

    def one_round(index: int) -> None:
        nonlocal params
        total = [jnp.zeros_like(a) for a in params]
        for rows, weights, examples in packed(index):
            part = train(params, rows, weights, examples)
            total = [a + b for a, b in zip(total, part, strict=True)]
        everyone = float(plan.counts[index].sum())
        params = [a + b / everyone for a, b in zip(params, total, strict=True)]
        jax.block_until_ready(params)

    def save(path: str) -> None:
        found: dict[str, Any] = {n: np.asarray(a) for n, a in zip(names, params, strict=True)}
        np.savez(path, **{n: a.T if a.ndim == 2 else a for n, a in found.items()})

    turns.say(ready=True, version=jax.__version__)
    turns.serve(one_round, save)


if __name__ == "__main__":
    main()

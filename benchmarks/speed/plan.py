"""One workload as arrays: what every measured program reads, so that all do the same work.

Cohorts, batch order and starting parameters are those that fedsim draws itself; a program that follows
them ends at the same global model, and the difference can be printed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.speed.sequential import LOOPS
from fedsim import build
from fedsim.config import Config
from fedsim.data.batching import batch_positions, step_counts
from fedsim.flat import flat_of
from fedsim.grads import LOSSES
from fedsim.sampling import Free
from fedsim.simulation.run import Simulation

Ints = npt.NDArray[np.int64]


class Plan(NamedTuple):
    """What a round costs, and where the arrays lie.

    Args:
        path: of the arrays; config: resolved.
        examples: [R] in each planned round, all local passes counted; clients: of a cohort.
        flops: of one example, all forward and backward passes of a local step; parameters: of the model.
    """

    path: Path
    config: Config
    examples: list[int]
    clients: int
    flops: float
    parameters: int

    def gflop(self, round_index: int) -> float:
        """Arithmetic of one round in 1e9 operations."""
        return self.flops * self.examples[round_index] / 1e9


def cohorts(config: Config, population: int, cohort: int, rounds: int) -> Ints:
    """[R, m] the clients of each round as fedsim draws them where everybody is there."""
    sampler = build.build_sampler(config)
    everybody = Free(lambda ids, _: np.ones(len(ids), np.bool_))
    seed = config.run.seed
    return np.stack([sampler(seed, r, 0, population, cohort, everybody) for r in range(rounds)])


def batch_order(config: Config, sim: Simulation, round_index: int, ids: Ints) -> list[Ints]:
    """For each client of a cohort the rows of the data set in the order of its local steps."""
    data, spec = sim.data, config.client
    sizes = data.offsets[ids + 1] - data.offsets[ids]
    steps = step_counts(sizes, spec)
    # One by one: a matrix for the whole cohort is as wide as its largest client.
    found = []
    for client, size, count in zip(ids, sizes, steps, strict=True):
        one = np.array([client]), np.array([size]), np.array([count])
        positions = batch_positions(config.run.seed, round_index, one[0], one[1], spec, one[2])[0]
        taken = positions[positions >= 0]
        found.append(data.index[data.offsets[client] + taken])
    return found


def make_plan(config: Config, folder: Path, rounds: int) -> Plan:
    """Write ``plan.npz`` into `folder`.

    The arrays: ``inputs`` float32 [n, ...] and ``targets`` int64 [n] of the training set,
    ``test_inputs`` and ``test_targets``, ``cohorts`` [R, m], ``rows`` (rows of ``inputs`` in the order of
    use), ``counts`` [R, m] (rows of each client), ``index`` and ``offsets`` (who owns which rows),
    ``batch_size``, ``lr``, ``clients`` (registered), ``model`` (its name and shape as JSON), and the
    starting parameters as ``parameter/NAME``.
    """
    sim = Simulation(config, engine="loop")
    data, dataset = sim.data, sim.data.dataset
    batch = config.client.batch_size
    passes = -(-data.sizes // max(1, batch))
    if batch < 1 or (step_counts(data.sizes, config.client) > passes).any():
        raise SystemExit("the sequential loop takes a batch_size of at least 1 and at most one pass")
    drawn = cohorts(config, data.clients, sim.cohort, rounds)
    order = [batch_order(config, sim, r, drawn[r]) for r in range(rounds)]
    counts = np.array([[len(rows) for rows in each] for each in order], np.int64)
    dtype = torch.float32 if config.engine.dtype == "float32" else torch.float64
    inputs = dataset.transforms.train(
        dataset.train.inputs, torch.zeros(len(dataset.train), dtype=torch.int64)
    )
    arrays: dict[str, Any] = {
        "inputs": inputs.to(dtype).numpy(),
        "targets": dataset.train.targets.numpy(),
        "cohorts": drawn,
        "rows": np.concatenate([rows for each in order for rows in each]),
        "counts": counts,
        "index": data.index,
        "offsets": data.offsets,
        "batch_size": batch,
        "lr": config.client.lr,
        "clients": data.clients,
        "model": json.dumps({
            "name": config.model.name, "parameters": config.model.parameters,
            "input_shape": list(dataset.input_shape), "classes": dataset.classes,
        }),
    }  # fmt: skip
    if dataset.test is not None:
        arrays["test_inputs"] = dataset.transforms.evaluate(dataset.test.inputs).to(dtype).numpy()
        arrays["test_targets"] = dataset.test.targets.numpy()
    module = sim.module
    for name, value in module.state_dict().items():
        arrays[f"parameter/{name}"] = value.detach().numpy()
    path = folder / "plan.npz"
    np.savez(path, **arrays)
    gradients = LOOPS[config.strategy.name].gradients
    flops = (
        gradients
        * flops_of(module, inputs[:batch].to(dtype), dataset.train.targets[:batch], dataset.task)
        / batch
    )
    examples = [int(each.sum()) for each in counts]
    return Plan(path, config, examples, sim.cohort, flops, flat_of(module, sim.spec).numel())


def flops_of(module: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, task: str) -> float:
    """Operations of one forward and backward pass: products and convolutions, each multiply-add as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        LOSSES[task](module(inputs), targets).mean().backward()  # type: ignore[no-untyped-call]
    module.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())

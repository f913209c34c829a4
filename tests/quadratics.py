"""Federations whose clients minimise quadratics: the oracle for convergence, and for one step by hand.

F_i(x) = ½ (x - b_i)ᵀ A_i (x - b_i). A client's examples are copies of (A_i, b_i), so that its number of
examples n_i is free, every mini-batch gradient is exact, and nothing is drawn. The gradient function
reads (A_i, b_i) from the batch: both engines run it as they run a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedsim.buffers import no_buffers
from fedsim.data.dataset import Split, make_dataset
from fedsim.data.federated import FederatedData
from fedsim.data.transforms import identity
from fedsim.federation import Federation, RunState
from fedsim.flat import ParamSpec
from fedsim.local import LocalSpec
from fedsim.rows import RowStore
from fedsim.schedulers import Scheduler, sync
from fedsim.simulation.devices import instant
from fedsim.simulation.engine import SimulatedEngine
from fedsim.simulation.stacked import StackedTrainer
from fedsim.strategy import Strategy
from fedsim.training.clients import ClientData
from fedsim.training.loop import LoopTrainer
from fedsim.training.work import Trainer, Workplace
from fedsim.types import Aux, Batch, Ids, Population, WindowInfo
from fedsim.vector import Vector

Array = npt.NDArray[np.float64]
ENGINES = ("loop", "stacked")


@dataclass(frozen=True, slots=True, eq=False)
class Quadratics:
    """One objective per client.

    Args:
        A: [N, d, d] symmetric positive definite.
        b: [N, d] the optima.
        sizes: [N] examples of each client.
    """

    A: Array
    b: Array
    sizes: Ids

    def __len__(self) -> int:
        return len(self.b)

    def gradient(self, client: int, x: Array) -> Array:
        """∇F_i(x)."""
        return cast(Array, self.A[client] @ (x - self.b[client]))

    def optimum(self, weights: Sequence[float] | Array | None = None) -> Array:
        """Where Σ w_i F_i is least; the plain mean by default."""
        w = np.ones(len(self)) if weights is None else np.asarray(weights, float)
        hessian = np.einsum("i,ijk->jk", w, self.A)
        return cast(Array, np.linalg.solve(hessian, np.einsum("i,ijk,ik->j", w, self.A, self.b)))

    def descend(
        self,
        client: int,
        x: Array,
        *,
        steps: int,
        lr: float,
        extra: Callable[[Array], Array] = np.zeros_like,
    ) -> Array:
        """`steps` times x <- x - lr (∇F_i(x) + extra(x))."""
        for _ in range(steps):
            x = x - lr * (self.gradient(client, x) + extra(x))
        return x


def heterogeneous(
    *, clients: int = 6, dimensions: int = 4, seed: int = 0, sizes: Sequence[int] | None = None
) -> Quadratics:
    """Clients that differ in curvature (eigenvalues between 0.5 and 3) and in where their optimum lies."""
    rng = np.random.default_rng(seed)
    A = np.empty((clients, dimensions, dimensions))
    for i in range(clients):
        rotation, _ = np.linalg.qr(rng.normal(size=(dimensions, dimensions)))
        A[i] = rotation @ np.diag(rng.uniform(0.5, 3.0, dimensions)) @ rotation.T
        A[i] = (A[i] + A[i].T) / 2
    counts = np.ones(clients, np.int64) if sizes is None else np.asarray(sizes, np.int64)
    return Quadratics(A, rng.normal(scale=3.0, size=(clients, dimensions)), counts)


def diagonal(
    curvatures: Sequence[Sequence[float]], optima: Sequence[Sequence[float]], *, sizes: Sequence[int]
) -> Quadratics:
    """Coordinates that do not interact, for sums on paper."""
    A = np.stack([np.diag(np.asarray(c, float)) for c in curvatures])
    return Quadratics(A, np.asarray(optima, float), np.asarray(sizes, np.int64))


def quadratic_grad(x: Vector, batch: Batch) -> tuple[Vector, Aux]:
    """Mean over the batch of A (x - b), where each row of the inputs is A and b in turn."""
    point = x.tensors["x"]
    d = len(point)
    A, b = batch.inputs[:, : d * d].reshape(-1, d, d), batch.inputs[:, d * d :]
    pulls = torch.einsum("rjk,rk->rj", A, point - b)
    losses = 0.5 * ((point - b) * pulls).sum(1)
    rows = torch.clamp(batch.mask.sum(), min=1)
    gradient = (pulls * batch.mask[:, None]).sum(0) / rows
    return Vector({"x": gradient}), Aux((losses * batch.mask).sum() / rows, {}, batch.buffers)


def federate(
    problem: Quadratics,
    strategy: Strategy,
    *,
    engine: str = "loop",
    steps: int = 1,
    lr: float = 0.1,
    spec: LocalSpec | None = None,
    cohorts: Sequence[Sequence[int]] | None = None,
    limits: Mapping[int, int] | None = None,
    scheduler: Scheduler | None = None,
    seconds: Sequence[float] | None = None,
    rates: Sequence[float] | None = None,
    x0: Array | None = None,
    dtype: torch.dtype = torch.float64,
    block: int = 4,
) -> Federation:
    """A federation on the problem.

    Args:
        steps, lr: of plain local SGD on single examples, where no `spec` is given.
        cohorts: who takes part in round r: ``cohorts[r % len(cohorts)]``; everybody by default. An
            empty cohort is an empty window.
        limits: local steps of clients that manage fewer than they are asked for.
        scheduler: replaces synchronous rounds; the free clients with the lowest numbers are asked first.
        seconds, rates: [N] of a task of each client, and of its participation, for strategies that ask.
        x0: [d] the first model; zero by default.
        block: C of the stacked engine.
    """
    clients, d = problem.b.shape
    rows = np.concatenate([problem.A.reshape(clients, -1), problem.b], axis=1).repeat(problem.sizes, axis=0)
    dataset = make_dataset(
        "quadratics",
        "regression",
        train=Split(torch.from_numpy(rows), torch.zeros(len(rows))),
        test=None,
        transforms=identity(),
    )
    offsets = np.concatenate([[0], np.cumsum(problem.sizes)]).astype(np.int64)
    data = FederatedData(dataset, np.arange(len(rows), dtype=np.int64), offsets)
    layout = ParamSpec(("x",), ((d,),), dtype)
    place = Workplace(
        module=nn.Identity(),
        spec=layout,
        floating=None,
        integers=None,
        grad_fn=quadratic_grad,
        clients=ClientData(data, seed=0, dtype=dtype, device=torch.device("cpu")),
        seed=0,
    )
    trainer: Trainer = LoopTrainer(place) if engine == "loop" else StackedTrainer(place, block)
    start = torch.zeros(d, dtype=dtype) if x0 is None else torch.as_tensor(x0, dtype=dtype)
    slow = dict(limits or {})

    def limit(ids: Ids, asked: Ids, round_index: int) -> Ids:
        return np.array([min(s, slow.get(i, s)) for i, s in zip(ids.tolist(), asked.tolist(), strict=True)])

    def cohort(round_index: int, draw: int, count: int, busy: Ids) -> Ids:
        everybody = range(clients)
        chosen = everybody if cohorts is None else cohorts[round_index % len(cohorts)]
        free = np.array(sorted(set(chosen) - set(busy.tolist())), np.int64)
        return free if scheduler is None else free[:count]

    taken = np.zeros(clients) if seconds is None else np.asarray(seconds, float)
    devices = instant()._replace(limit=limit, seconds=lambda ids, asked, r: taken[ids])

    worker = SimulatedEngine(
        place,
        trainer,
        lambda task_spec: strategy.local(place.grad_fn, task_spec),
        devices=devices,
        store=RowStore(clients),
        one_by_one=scheduler is not None and scheduler.mode == "async",
    )
    return Federation(
        strategy,
        worker,
        scheduler or sync(cohort=clients, quorum=0),
        sample=cohort,
        spec=spec or LocalSpec(steps=steps, batch_size=1, lr=lr),
        state=RunState(
            0,
            0,
            0.0,
            0,
            strategy.init(
                start,
                layout,
                Population(
                    clients,
                    problem.sizes,
                    None if rates is None else np.asarray(rates, float),
                    None if seconds is None else taken,
                ),
            ),
            no_buffers(),
            (),
        ),
        rows=RowStore(clients),
        population=clients,
    )


def run(federation: Federation, rounds: int) -> Array:
    """The model after each round, [rounds, d].

    Raises:
        RunFailed: a round failed.
    """
    models = []
    for _ in range(rounds):
        outcome = federation.run_window()
        if outcome.error is not None:
            raise outcome.error
        models.append(federation.model.double().numpy().copy())
    return np.array(models)


def client_held(federation: Federation) -> Array:
    """[N, d] the first vector of the state that each client holds; zero where there is none."""
    engine = federation.engine
    assert isinstance(engine, SimulatedEngine)
    message = federation.strategy.broadcast(federation.state.strategy)
    algorithm = engine.algorithm(federation.spec)
    out = np.zeros((federation.population, len(federation.model)))
    for client in range(federation.population):
        state = engine.state_of(np.array([client]), message, algorithm)
        for leaf in pytree.tree_leaves(state)[:1]:
            out[client] = leaf.double().numpy()
    return out


def server_held(federation: Federation, name: str) -> Array:
    """[N, d] what the server holds for each client; zero for those that never took part."""
    rows = federation.rows
    out = np.zeros((federation.population, len(federation.model)))
    known = np.flatnonzero(rows.has(np.arange(federation.population))).astype(np.int64)
    if len(known):
        out[known] = rows.read(known)[name].double().numpy()
    return out


def window(clients: int) -> WindowInfo:
    """A closed window of a population of `clients`, for `apply` alone."""
    nobody = np.empty(0, np.int64)
    return WindowInfo(0, 0, nobody, clients, nobody, 0.0, 0.0, 0, 0, 0)


def mean_of(delta: Sequence[float] | Array) -> dict[str, Tensor]:
    """What `apply` receives of a window whose weighted mean delta is `delta`."""
    one = torch.ones((), dtype=torch.float64)
    return {"delta": torch.as_tensor(np.asarray(delta, float)), "weight": one, "count": one}

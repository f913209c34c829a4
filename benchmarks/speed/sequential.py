"""The plain loop that everything is measured against: one model, one client after the other.

Written as one would by hand in PyTorch with some care: one model object, ``load_state_dict`` for each
client, ``torch.optim.SGD``, batches as slices of tensors instead of a DataLoader, state dicts averaged while
they come. It knows nothing of fedsim's engines; the model alone is built by fedsim's registry.

As a program it is a child of the benchmark: ``python -m benchmarks.speed.sequential PLAN STRATEGY THREADS``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.turns import Turns
from fedsim.models.load import make_model

State = dict[str, Tensor]


class Sequential:
    """FedAvg, SCAFFOLD or FedSpeed by hand, over the arrays of a plan.

    Args:
        model: with the starting parameters in it.
        arrays: of `benchmarks.speed.plan`.
    """

    strategy = "fedavg"
    gradients = 1  # of each batch

    def __init__(self, model: nn.Module, arrays: dict[str, Any]) -> None:
        self.model = model.train()
        self.inputs = torch.from_numpy(arrays["inputs"])
        self.targets = torch.from_numpy(arrays["targets"])
        self.cohorts, self.counts = arrays["cohorts"], arrays["counts"]
        self.rows = torch.from_numpy(arrays["rows"])
        self.ends = np.concatenate([[0], np.cumsum(self.counts)])
        self.batch, self.lr = int(arrays["batch_size"]), float(arrays["lr"])
        self.clients = int(arrays["clients"])
        self.x: State = {name: value.clone() for name, value in model.state_dict().items()}

    def round(self, index: int) -> None:
        """One round: every client of the cohort in turn, then the average."""
        cohort, counts = self.cohorts[index], self.counts[index]
        total = counts.sum()
        mean = {name: torch.zeros_like(value) for name, value in self.x.items()}
        for place in range(len(cohort)):
            rows = self.rows_of(index, place)
            self.model.load_state_dict(self.x)
            self.train(rows)
            weight = float(counts[place] / total)
            for name, value in self.model.state_dict().items():
                mean[name].add_(value, alpha=weight)
        self.x = mean

    def rows_of(self, index: int, place: int) -> Tensor:
        """What a client of round `index` sees, in its order."""
        at = index * self.cohorts.shape[1] + place
        return self.rows[self.ends[at] : self.ends[at + 1]]

    def train(self, rows: Tensor) -> None:
        """Local steps of one client, from the parameters that the model holds."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr)
        for batch in torch.split(rows, self.batch):
            optimizer.zero_grad()
            self.loss(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def loss(self, batch: Tensor) -> Tensor:
        """Mean loss of the examples in these rows."""
        return F.cross_entropy(self.model(self.inputs[batch]), self.targets[batch])


class Scaffold(Sequential):
    """Karimireddy et al. 2020, Algorithm 1, option II; clients count equally."""

    strategy = "scaffold"

    def __init__(self, model: nn.Module, arrays: dict[str, Any]) -> None:
        super().__init__(model, arrays)
        self.names = [name for name, _ in model.named_parameters()]
        self.c = [torch.zeros_like(p) for p in model.parameters()]
        self.controls: dict[int, list[Tensor]] = {}

    def round(self, index: int) -> None:
        cohort = self.cohorts[index]
        moved = [torch.zeros_like(c) for c in self.c]
        changed = [torch.zeros_like(c) for c in self.c]
        start = [self.x[name] for name in self.names]
        for place, client in enumerate(cohort.tolist()):
            rows = self.rows_of(index, place)
            self.model.load_state_dict(self.x)
            before = self.controls.get(client) or [torch.zeros_like(c) for c in self.c]
            corrections = [c - own for c, own in zip(self.c, before, strict=True)]
            optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr)
            steps = 0
            for batch in torch.split(rows, self.batch):
                optimizer.zero_grad()
                self.loss(batch).backward()  # type: ignore[no-untyped-call]
                for parameter, correction in zip(self.model.parameters(), corrections, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(correction)
                optimizer.step()
                steps += 1
            after = []
            for place_of, parameter in enumerate(self.model.parameters()):
                delta = parameter.detach() - start[place_of]
                moved[place_of].add_(delta)
                # c_i+ = c_i - c + (x - y) / (K η)
                after.append(-corrections[place_of] - delta / (steps * self.lr))
                changed[place_of].add_(after[-1] - before[place_of])
            self.controls[client] = after
        for name, step in zip(self.names, moved, strict=True):
            self.x[name] = self.x[name] + step / len(cohort)
        for c, change in zip(self.c, changed, strict=True):
            c.add_(change, alpha=1 / self.clients)


class FedSpeed(Sequential):
    """Sun et al. 2023, Algorithm 1, with prox ℓ = 0.1, radius ρ = 0.1 and α = 1; clients count equally."""

    strategy = "fedspeed"
    gradients = 2
    prox, radius = 0.1, 0.1

    def __init__(self, model: nn.Module, arrays: dict[str, Any]) -> None:
        super().__init__(model, arrays)
        self.names = [name for name, _ in model.named_parameters()]
        self.dual = [torch.zeros_like(p) for p in model.parameters()]  # h̄, the mean over all clients
        self.duals: dict[int, list[Tensor]] = {}

    def round(self, index: int) -> None:
        cohort = self.cohorts[index]
        moved = [torch.zeros_like(h) for h in self.dual]
        start = [self.x[name] for name in self.names]
        for place, client in enumerate(cohort.tolist()):
            rows = self.rows_of(index, place)
            self.model.load_state_dict(self.x)
            own = self.duals.get(client) or [torch.zeros_like(h) for h in self.dual]
            pulls = [self.prox * (h - w) for h, w in zip(own, start, strict=True)]
            parameters = list(self.model.parameters())
            optimizer = torch.optim.SGD(parameters, lr=self.lr)
            for batch in torch.split(rows, self.batch):
                self._step(batch, parameters, pulls, optimizer)
            deltas = [p.detach() - w for p, w in zip(parameters, start, strict=True)]
            for total, delta in zip(moved, deltas, strict=True):
                total.add_(delta)
            self.duals[client] = [h + delta for h, delta in zip(own, deltas, strict=True)]
        for name, step, h in zip(self.names, moved, self.dual, strict=True):
            h.add_(step, alpha=1 / self.clients)
            self.x[name] = self.x[name] + step / len(cohort) + h

    def _step(
        self, batch: Tensor, parameters: list[nn.Parameter], pulls: list[Tensor], optimizer: torch.optim.SGD
    ) -> None:
        """x <- x - η (g(x + ρ g / ‖g‖) + ℓ x + ℓ (h_i - w))."""
        optimizer.zero_grad()
        self.loss(batch).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        climbs = [g * (self.radius / (norm + 1e-7)) for g in gradients]
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, climb in zip(parameters, climbs, strict=True):
                parameter.add_(climb)
        optimizer.zero_grad()
        self.loss(batch).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter, old, pull in zip(parameters, kept, pulls, strict=True):
                parameter.copy_(old)
                assert parameter.grad is not None
                parameter.grad.add_(old, alpha=self.prox).add_(pull)
        optimizer.step()


LOOPS: dict[str, type[Sequential]] = {loop.strategy: loop for loop in (Sequential, Scaffold, FedSpeed)}


def start(path: str | Path, strategy: str) -> Sequential:
    """The loop of a strategy over the plan at `path`, from its starting parameters."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(str(arrays["model"]))
    dtype = torch.from_numpy(arrays["inputs"][:1]).dtype
    model = make_model(about["name"], input_shape=tuple(about["input_shape"]), classes=about["classes"],
                       params=about["parameters"]).to(dtype)  # fmt: skip
    prefix = "parameter/"
    model.load_state_dict(
        {n.removeprefix(prefix): torch.from_numpy(a) for n, a in arrays.items() if n.startswith(prefix)}
    )
    return LOOPS[strategy](model, arrays)


def main() -> None:
    """Serve turns: PLAN STRATEGY THREADS."""
    turns = Turns()
    path, strategy, threads = sys.argv[1:4]
    torch.set_num_threads(int(threads))
    loop = start(path, strategy)

    def save(to: str) -> None:
        np.savez(to, **{name: value.numpy() for name, value in loop.x.items()})  # type: ignore[arg-type]

    turns.say(ready=True)
    turns.serve(loop.round, save)


if __name__ == "__main__":
    main()

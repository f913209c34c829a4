"""The fixed workloads, each as a fedsim configuration; they never change, so that numbers can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

ROUNDS_OF_A_RUN = 1_000_000  # a measurement stops when it has enough; no round is the last


class Workload(NamedTuple):
    """One workload.

    Args:
        name: such as W1; title: for people.
        tables: the configuration, without paths and engine.
        folder: of the data below ``--data``, None for data that come with a package.
        rounds: measured by default; turn: rounds in a row before another child has its turn.
    """

    name: str
    title: str
    tables: dict[str, dict[str, Any]]  # Any: whatever TOML holds
    folder: str | None
    rounds: int
    turn: int

    def config(self, data: Path | None) -> dict[str, Any]:
        """The configuration as nested mappings.

        Args:
            data: folder with one sub-folder for each data set.
        """
        found: dict[str, Any] = {table: dict(values) for table, values in self.tables.items()}
        if self.folder is not None:
            if data is None:
                raise SystemExit(f"{self.name} needs --data DIR, the folder that holds {self.folder}/")
            found["data"]["path"] = str((data / self.folder).resolve())
        found["run"] = {"seed": 1, "rounds": ROUNDS_OF_A_RUN, "name": f"speed-{self.name}"}
        found["evaluation"] = {"every": 10}
        return found


def _mnist(kind: dict[str, Any]) -> dict[str, Any]:
    return {"name": "mnist", "partition": {"clients": 1000, "seed": 0, **kind}}


# Without crops and flips: every simulator then sees the same pixels.
_CIFAR: dict[str, Any] = {
    "name": "cifar10",
    "crop": 0,
    "flip": False,
    "partition": {"kind": "dirichlet", "alpha": 0.6, "clients": 100, "min_examples": 10, "seed": 0},
}
_SKEWED: dict[str, Any] = {"kind": "dirichlet", "alpha": 0.3}
_TENS = {"epochs": 1, "batch_size": 10, "lr": 0.1}
_FIFTIES = {"epochs": 1, "batch_size": 50, "lr": 0.05}

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "W1",
            "MNIST, Dirichlet(0.3), 1,000 clients, 100 a round, MLP 784-200-10, batch 10",
            {"data": _mnist(_SKEWED), "model": {"name": "mlp", "hidden": [200]}, "client": _TENS,
             "round": {"sample": 100}},
            "mnist", 20, 5,
        ),
        Workload(
            "W1eq",
            "MNIST, 60 examples each, 1,000 clients, 100 a round, MLP 784-200-10, batch 10",
            {"data": _mnist({"kind": "iid"}), "model": {"name": "mlp", "hidden": [200]}, "client": _TENS,
             "round": {"sample": 100}},
            "mnist", 20, 5,
        ),
        Workload(
            "W2",
            "MNIST, Dirichlet(0.3), 1,000 clients, 20 a round, CNN 5x5 32-64 fc 512, batch 10",
            {"data": _mnist(_SKEWED), "model": {"name": "cnn"}, "client": _TENS, "round": {"sample": 20}},
            "mnist", 10, 2,
        ),
        Workload(
            "W3",
            "CIFAR-10, Dirichlet(0.6), 100 clients, 10 a round, ResNet-18 of width 16, batch 50",
            {"data": _CIFAR, "model": {"name": "resnet18", "width": 16, "groups": 4}, "client": _FIFTIES,
             "round": {"sample": 10}},
            "cifar10", 3, 1,
        ),
        Workload(
            "W3L",
            "CIFAR-10, Dirichlet(0.6), 100 clients, 10 a round, LeNet-5, batch 50",
            {"data": _CIFAR, "model": {"name": "lenet5"}, "client": _FIFTIES, "round": {"sample": 10}},
            "cifar10", 3, 1,
        ),
        Workload(
            "W4",
            "digits, 8 examples each, 10,000 clients, 1,000 a round, MLP 64-32-10, one step of 8",
            {"data": {"name": "digits",
                      "partition": {"kind": "fixed_size", "examples": 8, "clients": 10_000, "seed": 0}},
             "model": {"name": "mlp", "hidden": [32]},
             "client": {"steps": 1, "batch_size": 8, "lr": 0.1}, "round": {"sample": 1000}},
            None, 50, 10,
        ),
    )
}  # fmt: skip


def population(clients: int, cohort: int) -> Workload:
    """W4's model and local work with any number of registered clients."""
    base = WORKLOADS["W4"]
    partition = {**base.tables["data"]["partition"], "clients": clients}
    tables = {**base.tables, "data": {**base.tables["data"], "partition": partition}}
    tables["round"] = {"sample": cohort}
    title = f"digits, 8 examples each, {clients:,} clients, {cohort:,} a round, MLP 64-32-10, one step of 8"
    return base._replace(name=f"N{clients}", title=title, tables=tables)

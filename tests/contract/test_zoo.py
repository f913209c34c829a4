"""Every model of the zoo that can be stacked gives the same numbers in both engines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fedsim
from fedsim.data.dataset import Split, make_dataset
from fedsim.data.federated import FederatedData
from fedsim.data.transforms import identity

IMAGE, CHARACTERS = "image", "characters"
ZOO: list[tuple[str, str, tuple[int, ...], dict[str, Any]]] = [
    ("logistic", IMAGE, (1, 8, 8), {}),
    ("mlp", IMAGE, (1, 8, 8), {"hidden": [16]}),
    ("small_cnn", IMAGE, (1, 8, 8), {}),
    ("small_cnn", IMAGE, (1, 8, 8), {"norm": "group"}),
    ("lenet5_classic", IMAGE, (1, 28, 28), {}),
    ("resnet18", IMAGE, (3, 8, 8), {"width": 4, "groups": 2}),
    ("lstm", CHARACTERS, (7,), {"hidden": 8}),
]
LARGE = [("cnn", IMAGE, (1, 28, 28), {}), ("lenet5", IMAGE, (3, 32, 32), {})]


def ragged_clients(kind: str, shape: tuple[int, ...]) -> FederatedData:
    """Four clients with 1, 5, 8 and 3 examples: short last batches and unequal numbers of steps."""
    generator = torch.Generator().manual_seed(3)
    sizes = np.array([1, 5, 8, 3])
    n, classes = int(sizes.sum()), 6
    if kind == CHARACTERS:
        inputs = torch.randint(0, classes, (n, *shape), generator=generator)
        targets = torch.randint(0, classes, (n, *shape), generator=generator)
    else:
        inputs = torch.randn(n, *shape, generator=generator)
        targets = torch.randint(0, classes, (n,), generator=generator)
    task: Any = "next-token" if kind == CHARACTERS else "classification"
    dataset = make_dataset(
        kind, task, train=Split(inputs, targets), test=None, transforms=identity(), classes=classes
    )
    return FederatedData(dataset, np.arange(n, dtype=np.int64), np.concatenate([[0], np.cumsum(sizes)]))


def cases() -> list[Any]:
    small = [pytest.param(*case, id="-".join([case[0], *map(str, case[3].values())])) for case in ZOO]
    return small + [pytest.param(*case, id=case[0], marks=pytest.mark.slow) for case in LARGE]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
@pytest.mark.parametrize(("model", "kind", "shape", "parameters"), cases())
def test_both_engines_train_it_alike(
    model: str, kind: str, shape: tuple[int, ...], parameters: dict[str, Any], strategy: str
) -> None:
    ends, starts = [], []
    for engine in ("loop", "stacked"):
        sim = fedsim.Simulation(
            model=model,
            data=ragged_clients(kind, shape),
            strategy=strategy,
            client={"epochs": 1, "batch_size": 4, "lr": 0.05, "momentum": 0.5, "weight_decay": 1e-3},
            rounds=2,
            sample="all",
            engine=engine,
            sections={
                "model": parameters,
                "engine": {"dtype": "float64"},
                "evaluation": {"central": False, "clients": "never"},
            },
        )
        starts.append(sim.federation.model.clone())
        records = list(sim)
        assert [r["outcome"] for r in records[1:]] == ["ok", "ok"]
        ends.append(sim.federation.model)
    assert torch.equal(*starts)
    moved = (ends[0] - starts[0]).norm()
    assert moved > 0
    assert (ends[0] - ends[1]).norm() <= 1e-10 * moved

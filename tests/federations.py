"""Small federations for tests: a strategy, an engine and a model on random data, built by hand.

Nothing here goes through a configuration, so a test of the core fails for the core's reasons only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.buffers import Buffers
from fedsim.data.dataset import Split, make_dataset
from fedsim.data.federated import FederatedData
from fedsim.data.transforms import identity
from fedsim.errors import ConfigError
from fedsim.federation import Federation, RunState
from fedsim.flat import buffer_specs, flat_buffers, flat_of, spec_of
from fedsim.grads import LOSSES, model_grad
from fedsim.local import LocalSpec
from fedsim.personal import personalise
from fedsim.rows import RowStore
from fedsim.sampling import Free, uniform
from fedsim.schedulers import Scheduler, sync
from fedsim.simulation.devices import DeviceModel, instant
from fedsim.simulation.engine import SimulatedEngine
from fedsim.simulation.stacked import StackedTrainer
from fedsim.strategy import Strategy
from fedsim.training.clients import ClientData
from fedsim.training.loop import LoopTrainer
from fedsim.training.work import Trainer, Workplace
from fedsim.transform import Observer, UpdateTransform
from fedsim.types import Aux, Bools, GradFn, Ids, Population

CLASSES = 3
SEED = 7
# With batches of four: a single example, one short batch, a short last batch, full batches only.
SIZES = (13, 1, 8, 3, 7)
SPEC = LocalSpec(epochs=2, batch_size=4, lr=0.1, momentum=0.9, weight_decay=1e-3)


class Recurrent(nn.Module):
    """Characters [B, T] -> logits [B, K] from the last step of a small LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(inputs))
        logits: Tensor = self.head(hidden[:, -1])
        return logits


def accepted(strategy: Strategy, spec: LocalSpec) -> LocalSpec:
    """`spec`, as plain SGD without momentum where the strategy takes nothing else (FS-CFG-083)."""
    try:
        strategy.local(lambda x, batch: (x, Aux(batch.lr, {}, {})), spec)
    except ConfigError as refused:
        if refused.code != "FS-CFG-083":
            raise
        return replace(spec, momentum=0.0, optimizer="sgd")
    return spec


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, CLASSES),
    )


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "conv": conv,
    "lstm": Recurrent,
    "batch_norm": batch_norm,
}


def random_data(model: str = "mlp", *, sizes: Sequence[int] = SIZES, seed: int = 0) -> FederatedData:
    """Random examples for one of `MODELS`, `sizes[i]` of them at client i."""
    draw = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    if model == "lstm":
        inputs = torch.randint(0, 6, (n, 5), generator=draw)
    elif model == "conv":
        inputs = torch.randn(n, 1, 6, 6, generator=draw)
    else:
        inputs = torch.randn(n, 6, generator=draw)
    # Labels that the inputs decide, so that training has something to find.
    flat = inputs.flatten(1).float()
    targets = (flat @ torch.randn(flat.shape[1], CLASSES, generator=draw)).argmax(1)
    dataset = make_dataset(
        "random",
        "classification",
        train=Split(inputs, targets),
        test=None,
        transforms=identity(),
        classes=CLASSES,
    )
    index = np.random.default_rng(seed).permutation(n).astype(np.int64)
    return FederatedData(dataset, index, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


@dataclass(slots=True)
class Small:
    """A federation and the parts that tests look into."""

    federation: Federation
    engine: SimulatedEngine
    place: Workplace
    store: RowStore


def build(
    strategy: Strategy,
    *,
    engine: str = "loop",
    model: str | Callable[[], nn.Module] = "mlp",
    dtype: torch.dtype = torch.float64,
    spec: LocalSpec = SPEC,
    data: FederatedData | None = None,
    cohort: int | None = None,
    quorum: int = 1,
    deadline: float | None = None,
    overcommit: float = 1.0,
    scheduler: Scheduler | None = None,
    block: int = 3,
    devices: DeviceModel | None = None,
    available: Callable[[Ids, int], Bools] | None = None,
    transform: UpdateTransform | None = None,
    observers: Sequence[Observer] = (),
    grad: Callable[[GradFn], GradFn] | None = None,
    personal: tuple[str, ...] = (),
    trainer: Callable[[Workplace], Trainer] | None = None,
    folder: Path | None = None,
    seed: int = SEED,
) -> Small:
    """A federation over random data.

    Args:
        engine: ``loop`` or ``stacked``.
        model: a name in `MODELS` or a function that makes a module.
        cohort: clients a round, all of them where None.
        scheduler: replaces synchronous rounds.
        block: clients of a stacked block; smaller than the cohort, so that there are several.
        available: who is there, everyone where None.
        grad: wraps the gradient function.
        personal: prefixes of parameters that stay on the client.
        trainer: replaces the one that `engine` names.
        folder: where client and server rows are memory-mapped, None for memory.
        seed: of the run; the initial model is always the same.
    """
    spec = accepted(strategy, spec)
    name = model if isinstance(model, str) else "mlp"
    data = data or random_data(name)
    torch.manual_seed(0)
    module = (MODELS[model] if isinstance(model, str) else model)().to(dtype).train()
    layout = spec_of(module, personal=personal)
    floating, integers = buffer_specs(module)
    clients = ClientData(data, seed=seed, dtype=dtype, device=torch.device("cpu"))
    gradient = model_grad(module, LOSSES["classification"])
    place = Workplace(module, layout, floating, integers, grad(gradient) if grad else gradient, clients, seed)
    if trainer is not None:
        training: Trainer = trainer(place)
    else:
        training = LoopTrainer(place) if engine == "loop" else StackedTrainer(place, block)
    rates = data.sizes / data.sizes.max()  # of the data, so that relabelled clients keep theirs
    population = Population(data.clients, data.sizes, rates, 1.0 + data.sizes)
    first = flat_buffers(module, floating)
    counters = flat_buffers(module, integers)
    state = RunState(
        0,
        0,
        0.0,
        0,
        strategy.init(flat_of(module, layout), layout, population),
        Buffers(
            torch.empty(0) if first is None else first,
            torch.empty(0, dtype=torch.int64) if counters is None else counters,
        ),
        transform.init_server() if transform is not None and transform.init_server else (),
    )

    def algorithm(local: LocalSpec) -> Any:
        made = strategy.local(place.grad_fn, local)
        return personalise(made, layout.personal) if layout.personal else made

    store = RowStore(data.clients, None if folder is None else folder / "clients")
    simulated = SimulatedEngine(
        place,
        training,
        algorithm,
        devices=devices or instant(),
        store=store,
        transform=transform,
        one_by_one=scheduler is not None and scheduler.mode == "async",
    )
    sampler, there = uniform(), available or everybody

    def sample(window: int, draw: int, count: int, busy: Ids) -> Ids:
        return sampler(seed, window, draw, data.clients, count, Free(there, busy))

    federation = Federation(
        strategy,
        simulated,
        scheduler
        or sync(cohort=cohort or data.clients, quorum=quorum, deadline=deadline, overcommit=overcommit),
        sample=sample,
        spec=spec,
        state=state,
        rows=RowStore(data.clients, None if folder is None else folder / "server"),
        population=data.clients,
        transform=transform,
        observers=observers,
        seed=seed,
        personal_size=place.spec.personal_size,
    )
    return Small(federation, simulated, place, store)


def everybody(ids: Any, window: int) -> Any:
    """An availability under which every client can take part."""
    return np.ones(len(ids), bool)


def nobody(ids: Any, window: int) -> Any:
    """An availability under which no client can take part."""
    return np.zeros(len(ids), bool)

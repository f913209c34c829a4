"""Simulation: a federation of virtual clients in one process, one record a round.

for record in fedsim.Simulation(model=Net, data=data, strategy="fedavg", rounds=20):
    print(record["round"], record["accuracy"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import build
from fedsim.config import Config, config_from
from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData
from fedsim.evaluation import Evaluator
from fedsim.federated_run import FederatedRun
from fedsim.federation import Federation, RunState
from fedsim.flat import flat_of
from fedsim.keys import own_torch_generator
from fedsim.local import LocalSpec
from fedsim.opaque_client import OpaqueClient
from fedsim.outcome import Outcome
from fedsim.rows import RowStore
from fedsim.sampling import Free
from fedsim.simulation.choose import choose
from fedsim.simulation.clock import VirtualClock
from fedsim.simulation.engine import SimulatedEngine
from fedsim.simulation.participation import (
    build_availability,
    build_devices,
    build_membership,
    population_of,
)
from fedsim.simulation.trainers import make_crew, make_training
from fedsim.strategy import Strategy
from fedsim.training.place import start_buffers, workplace
from fedsim.training.work import client_message
from fedsim.transform import Observer, UpdateTransform
from fedsim.types import Bools, Ids


class Simulation(FederatedRun):
    """One run, iterated round by round; break whenever you like.

    Args:
        config: a whole configuration; the other arguments override it.
        model: registered name, ``nn.Module``, class or function returning one.
        data: registered name, `Dataset` or `FederatedData`.
        strategy: registered name or `Strategy`.
        client: `LocalSpec`, a mapping of its fields, or a function marked with `fedsim.opaque`.
        rounds, sample, seed, engine, device: as in ``[run]``, ``[round]`` and ``[engine]``.
        sections: further tables of the configuration, ``{"evaluation": {"every": 5}}``.
        transform: on the way of each update.
        observers: called with what a curious server sees.
        grad_fn: wraps the gradient function, (grad_fn) -> grad_fn; DP-SGD goes here.
        state_folder: of the files that hold client states; None keeps them in memory.

    Raises:
        ConfigError, DataError, ModelError: before anything is trained or written.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | None = None,
        *,
        model: Any = None,
        data: Any = None,
        strategy: str | Strategy | None = None,
        client: LocalSpec | Mapping[str, Any] | OpaqueClient | None = None,
        rounds: int | None = None,
        sample: int | float | str | None = None,
        seed: int | None = None,
        engine: str | None = None,
        device: str | None = None,
        sections: Mapping[str, Mapping[str, Any]] | None = None,
        transform: UpdateTransform | None = None,
        observers: Sequence[Observer] = (),
        grad_fn: Any = None,
        state_folder: Path | None = None,
    ) -> None:
        data = build.own_data(data)
        build.check_arguments(data=data, strategy=strategy, client=client)
        opaque = client if isinstance(client, OpaqueClient) else None
        overrides = build.overrides(
            {
                "run": {"rounds": rounds, "seed": seed},
                "round": {"sample": sample},
                "engine": {"name": engine, "device": device},
                "data": {"name": data if isinstance(data, str) else None},
                "model": {"name": model if isinstance(model, str) else None},
                "strategy": {"name": strategy if isinstance(strategy, str) else None},
            },
            client=None if isinstance(client, OpaqueClient) else client,
            sections=sections or {},
        )
        self.config = config_from(config, overrides)
        self.config = build.with_absolute_paths(self.config)
        objects = {"model": model, "data": data, "strategy": strategy, "client": opaque}
        objects |= {"transform": transform, "grad_fn": grad_fn}
        self.python_objects = sorted(
            name for name, value in objects.items() if value is not None and not isinstance(value, str)
        )
        self.opaque = opaque
        torch.set_num_threads(self.config.engine.threads)
        self.data: FederatedData = build.build_data(self.config, _given(data, (Dataset, FederatedData)))
        self.strategy = build.build_strategy(self.config, _given(strategy, (Strategy,)))
        self.scheduler, self.cohort = build.build_scheduler(self.config, self.data.clients, self.strategy)
        self.module: nn.Module = build.build_model(
            self.config, self.data, None if isinstance(model, str) else model
        )
        self.place = workplace(self.config, self.data, self.module, wrap=grad_fn)
        self.spec = self.place.spec
        build.check_local(self.config, self.strategy, self.place.grad_fn, opaque=opaque is not None)
        start = start_buffers(self.place)
        self.grad_fn = self.place.grad_fn
        choice = choose(
            self.config.engine,
            self.place,
            spec=self.config.client,
            algorithm=None if opaque is not None else self.algorithm(self.config.client),
            cohort=self.cohort,
            sums_only=self.strategy.traits.sums_only,
        )
        self.place, trainer = make_training(choice, self.place, self.config.engine, opaque)
        self.grad_fn = self.place.grad_fn
        self.engine_reason = choice.reason
        chosen = {"name": choice.name, "block": choice.block, "workers": choice.workers}
        self.config = config_from(self.config, {"engine": chosen})
        self.states = RowStore(self.data.clients, _below(state_folder, "clients"))
        self.rows = RowStore(self.data.clients, _below(state_folder, "server"))
        self._availability = build_availability(self.config, self.data)
        self._membership = build_membership(self.config, self.data)
        devices = build_devices(self.config, self.data)
        self._sampler = build.build_sampler(self.config)
        self.engine = SimulatedEngine(
            self.place,
            trainer,
            self.algorithm,
            devices=devices,
            store=self.states,
            transform=transform,
            one_by_one=self.scheduler.mode == "async",
            crew=make_crew(choice, self.config, self.python_objects),
            norms=self.config.output.clients,
        )
        population = population_of(
            self.config,
            self.data,
            strategy=self.strategy,
            availability=self._availability,
            devices=devices,
        )
        state = self.strategy.init(flat_of(self.module, self.spec), self.spec, population)
        transform_state = transform.init_server() if transform and transform.init_server else ()
        self.federation = Federation(
            self.strategy,
            self.engine,
            self.scheduler,
            sample=self._sample,
            spec=self.config.client,
            state=RunState(0, 0, 0.0, 0, state, start, transform_state),
            rows=self.rows,
            population=self.data.clients,
            transform=transform,
            observers=observers,
            seed=self.config.run.seed,
            personal_size=self.spec.personal_size,
            membership=self._membership,
        )
        self.evaluator = Evaluator(
            self.module,
            self.spec,
            self.place.floating,
            self.place.integers,
            self.data,
            batch_size=self.config.evaluation.batch_size,
            metrics=self.config.evaluation.metrics,
        )
        super().__init__()

    def evaluate_clients(self) -> dict[str, Any]:
        """Each client's accuracy and loss, with its own model where the algorithm has personal ones."""
        algorithm = self.algorithm(self.config.client)

        def personal(ids: Ids) -> Tensor:
            assert algorithm.personal is not None
            message = self.strategy.broadcast(self.federation.state.strategy)
            state = self.engine.state_of(ids, message, algorithm)
            x = algorithm.personal(client_message(message, self.spec), state)
            return self.spec.flatten(x).unsqueeze(0)

        return dict(
            self.evaluator.clients(
                self.federation.model,
                self.federation.state.buffers,
                cap=self.config.evaluation.client_cap,
                seed=self.config.run.seed,
                personal=None if algorithm.personal is None else personal,
            )
        )

    def _run_window(self) -> Outcome:
        # Random layers draw from torch's generator, seeded for each client; the user's is left alone.
        with own_torch_generator():
            return super()._run_window()

    def _sample(self, round_index: int, draw: int, count: int, busy: Ids) -> Ids:
        now = self.engine.now
        # A retry comes later: who is there has changed as it would by the next round.
        tick = self.scheduler.tick(round_index + draw, now)

        def there(ids: Ids, _: int) -> Bools:
            found = self._availability.available(ids, tick, now)
            found &= self._membership.joined(ids) <= round_index
            return found & (self._membership.left(ids) > round_index)

        clients = self.data.clients
        return self._sampler(
            self.config.run.seed, round_index, draw, clients, min(count, clients), Free(there, busy)
        )

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {
            "engine": self.config.engine.name,
            "engine_reason": self.engine_reason,
            "block": self.config.engine.block,
            "workers": self.config.engine.workers,
            "python_objects": self.python_objects,
        }

    @property
    def strategy_name(self) -> str:
        """The registered name, or ``custom`` for a strategy given as an object."""
        return "custom" if "strategy" in self.python_objects else self.config.strategy.name

    def keep_state_in(self, folder: Path) -> None:
        """Keep client states in files below `folder`; before the first round only."""
        self.states.folder, self.rows.folder = folder / "clients", folder / "server"

    def restore(self, run: RunState) -> None:
        """Continue after the round that this state was saved at."""
        self.federation.state = run
        self.started = True
        self.engine.clock = VirtualClock(run.clock)


def _given(value: Any, kinds: tuple[type, ...]) -> Any:
    return value if isinstance(value, kinds) else None


def _below(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name

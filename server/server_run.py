"""A run on a coordinator: the parts of a configuration around the engine of real clients."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from fedsim import build
from fedsim.bundle import TensorSpec
from fedsim.config import Config, config_from
from fedsim.errors import ConfigError
from fedsim.evaluation import Evaluator
from fedsim.federated_run import FederatedRun
from fedsim.federation import Federation, RunState
from fedsim.flat import flat_of
from fedsim.local import LocalSpec
from fedsim.rows import RowStore
from fedsim.sampling import Free
from fedsim.server.members import Members
from fedsim.server.remote import Counts, RemoteEngine
from fedsim.strategy import Strategy
from fedsim.training.answer import prepare_reported, reported
from fedsim.training.place import eager, start_buffers, workplace
from fedsim.types import Bools, Ids, Message, Population

DTYPES = {torch.float32: "F32", torch.float64: "F64"}


def server_config(config: Config) -> Config:
    """The configuration as a coordinator carries it out.

    Raises:
        ConfigError: FS-CFG-132, it describes clients that only a simulation has.
    """
    for table in ("availability", "devices", "membership"):
        if getattr(config, table).name is not None:
            raise ConfigError(
                f"[{table}] describes simulated clients",
                code="FS-CFG-132",
                where=f"[{table}] name = {getattr(config, table).name!r}",
                why="on a coordinator clients are there or not, fast or slow, by themselves",
                hint=f"remove the table [{table}], or run without --connect",
            )
    # A coordinator cannot evaluate on data that it does not have.
    return config_from(config, {"evaluation": {"clients": "never"}, "engine": {"name": "loop", "block": 1}})


class ServerRun(FederatedRun):
    """One run with real clients, iterated round by round.

    Args:
        config: from `server_config`.

    Raises:
        ConfigError, DataError, ModelError: before any client is asked.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        torch.set_num_threads(max(torch.get_num_threads(), config.engine.threads))
        self.data = build.build_data(config)
        self.strategy: Strategy = build.build_strategy(config)
        self.population = self.data.clients
        self.scheduler, self.cohort = build.build_scheduler(config, self.population, self.strategy)
        self.module = build.build_model(config, self.data)
        self.place = eager(workplace(config, self.data, self.module))
        self.spec = self.place.spec
        self.grad_fn = self.place.grad_fn
        prepare_reported(self.place)
        build.check_local(config, self.strategy, self.grad_fn, opaque=False)
        self._refuse_what_nobody_knows()
        self.rows = RowStore(self.population)
        self.counts = Counts(np.zeros(self.population, np.int64))
        self._sampler = build.build_sampler(config)
        self.evaluator = Evaluator(
            self.module,
            self.spec,
            self.place.floating,
            self.place.integers,
            self.data,
            batch_size=config.evaluation.batch_size,
            metrics=config.evaluation.metrics,
        )
        known = self.data.sizes if len(self.data.dataset.train) else None
        state = self.strategy.init(
            flat_of(self.module, self.spec), self.spec, Population(self.population, known)
        )
        self.start: RunState | None = RunState(0, 0, 0.0, 0, state, start_buffers(self.place), ())
        self.engine: RemoteEngine
        self.members: Members

    def join(self, engine: RemoteEngine, members: Members) -> None:
        """Take up the run with these clients, from its start."""
        self.engine, self.members = engine, members
        self.federation = Federation(
            self.strategy,
            engine,
            self.scheduler,
            sample=self._sample,
            spec=self.config.client,
            state=self.first_state,
            rows=self.rows,
            population=self.population,
            seed=self.config.run.seed,
            personal_size=self.spec.personal_size,
        )
        super().__init__()

    @property
    def first_state(self) -> RunState:
        """The state that the run begins with; there until `forget_start`."""
        assert self.start is not None
        return self.start

    def forget_start(self) -> None:
        """The run has been taken up: a model less is kept in memory."""
        self.start = None

    @property
    def synchronous(self) -> bool:
        return self.scheduler.mode == "sync"

    def layout(self, spec: LocalSpec, message: Message, lent: Any) -> tuple[TensorSpec, ...]:
        """What every answer must hold: see `wire.pack_update`."""
        sizes, scalars = reported(self.place, self.algorithm(spec), message, lent)
        dtype, size = DTYPES[self.spec.dtype], self.spec.size
        shared = size - self.spec.personal_size
        specs = [
            TensorSpec(f"vectors/{name}", dtype, (shared if n == size else n,)) for name, n in sizes.items()
        ]
        specs += [TensorSpec(f"scalars/{name}", "F64", ()) for name in scalars]
        for name, part in (("floating", self.place.floating), ("integers", self.place.integers)):
            if part is not None:
                kind = "I64" if name == "integers" else DTYPES[part.dtype]
                specs.append(TensorSpec(f"buffers/{name}", kind, (part.size,)))
        return tuple(specs)

    def _round(self, phases: dict[str, float]) -> dict[str, Any]:
        state = self.federation.state
        self.engine.open_window(state.round_index, state.failures)
        began = time.perf_counter()
        record = super()._round(phases)
        closed = self.engine.closed_at or time.perf_counter()
        phases["collect"] = closed - began
        phases["aggregate"] = max(0.0, began + phases.pop("train") - closed)
        return record

    def _sample(self, round_index: int, draw: int, count: int, busy: Ids) -> Ids:
        def there(ids: Ids, _: int) -> Bools:
            return self.members.there(ids)

        def fresh() -> Ids:
            self.members.enlist()
            most, free = min(count, self.population), Free(there, busy)
            return self._sampler(self.config.run.seed, round_index, draw, self.population, most, free)

        return self.engine.draw(fresh)

    def _refuse_what_nobody_knows(self) -> None:
        unknown = [n for n in ("rates", "durations") if n in self.strategy.traits.needs]
        if unknown:
            raise ConfigError(
                f"the strategy {self.config.strategy.name!r} needs the clients' {' and '.join(unknown)}",
                code="FS-CFG-133",
                where="[strategy] name",
                why="a simulation knows them from its models of the devices; a coordinator does not",
                hint="choose a strategy that learns how often clients take part, such as fedau",
            )

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {
            "engine": "remote",
            "engine_reason": "real clients train; they run the loop engine",
            "block": 1,
            "python_objects": [],
        }

"""One task of a coordinator, from the broadcast to the answer: the client half of a round.

What depends on the run alone (data, model, gradient, strategy) is made once and kept, so that a further
task costs little beside its training. The numbers are those of the simulation: the same functions, the
same random streams (seed of the run, round, client), one client at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import bundle, wire
from fedsim.build import build_model, build_strategy, check_local
from fedsim.client.data import Source, client_data, narrowed
from fedsim.client.job import Answer, Job
from fedsim.config import Config
from fedsim.data.batching import step_counts
from fedsim.errors import DataError, ModelError
from fedsim.keys import own_torch_generator
from fedsim.local import LocalAlgorithm, LocalSpec
from fedsim.pb import federation_pb2 as pb
from fedsim.personal import personalise
from fedsim.storage import unreadable
from fedsim.strategy import Strategy
from fedsim.training.answer import answer
from fedsim.training.loop import LoopTrainer
from fedsim.training.place import eager, workplace
from fedsim.training.work import Work, Workplace
from fedsim.types import Aux, Batch, Bools, GradFn, Ids
from fedsim.vector import Vector

INLINE = 1 << 20
"""An update of at most so many bytes is handed over in memory, a larger one in a file."""

KEPT_RUNS = 2
"""Runs whose data and models stay in memory."""

UPDATE_FILE, STATE_FILE = "update.safetensors", "state.safetensors"

OnStep = Callable[[int, int], None]  # (steps done, steps of the task); may raise to stop


@dataclass(slots=True)
class Steps:
    """Counts the batches of a task and tells whoever listens."""

    total: int = 0
    done: int = 0
    on_step: OnStep | None = None
    _last: Any = None

    def begin(self, total: int, on_step: OnStep | None) -> None:
        self.total, self.done, self.on_step, self._last = total, 0, on_step, None

    def watched(self, grad_fn: GradFn) -> GradFn:
        """`grad_fn` itself, with a word before each new batch."""

        def counted(x: Vector, batch: Batch) -> tuple[Vector, Aux]:
            # Some algorithms take several gradients in a step; a step's index is one tensor. Comparing
            # the values instead would make a GPU wait.
            if batch.index is not self._last:
                self._last = batch.index
                if self.on_step is not None:
                    self.on_step(min(self.done, self.total), self.total)
                self.done += 1
            return grad_fn(x, batch)

        return counted


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What the tasks of one run share on this machine.

    Args:
        schema: digest of the whole layout of vectors.
        place, trainer, strategy: as in the simulation's loop engine.
        steps: the counter that hangs in the gradient function.
    """

    config: Config
    schema: str
    place: Workplace
    trainer: LoopTrainer
    strategy: Strategy
    steps: Steps

    def algorithm(self, spec: LocalSpec) -> LocalAlgorithm:
        """The strategy's client half under this local training."""
        made = self.strategy.local(self.place.grad_fn, spec)
        return personalise(made, self.place.spec.personal) if self.place.spec.personal else made


class Trainee:
    """Does the tasks of one client, and remembers what runs have in common.

    Args:
        source: of the examples.
        device: resolved, see `fedsim.client.device.resolve`.
        threads: most threads of a tensor operation, 0 for what the run says.
    """

    def __init__(self, source: Source, *, device: str = "cpu", threads: int = 0) -> None:
        self.source = source
        self.device = device
        self.threads = threads
        self._benches: OrderedDict[bytes, Bench] = OrderedDict()

    def examples(self, config: bytes, client: int, population: int) -> int:
        """Number of this client's training examples in a run."""
        bench = self._bench(config, client, population)
        return int(bench.place.clients.sizes(np.array([client], np.int64))[0])

    def place_of(self, task: pb.Task) -> Workplace:
        """Where the clients of the task's run train here."""
        return self._bench(task.config, task.client, task.population).place

    def forget(self) -> None:
        """Drop everything that is remembered, to have the memory back."""
        self._benches.clear()

    def train(self, job: Job, on_step: OnStep | None = None) -> Answer:
        """Do one task.

        Args:
            on_step: told before each local step; what it raises ends the task.

        Raises:
            FedsimError: configuration, data, model or client state do not fit.
            ValueError: the task cannot be read.
        """
        began = time.perf_counter()
        task = pb.Task.FromString(job.task)
        bench = self._bench(task.config, task.client, task.population)
        if task.schema and task.schema != bench.schema:
            raise ModelError(
                "the model here has another layout than the coordinator's",
                code="FS-CLI-050",
                where=f"[model] name = {bench.config.model.name!r}",
                why=f"schema {bench.schema[:12]} here, {task.schema[:12]} there",
                hint="install the same version of the model's package on both sides",
            )
        work = self._work(bench, task, job)
        rows = _read_state(job.state, bench)

        def known(ids: Ids) -> tuple[Bools, Mapping[str, Tensor]]:
            return np.array([rows is not None]), rows or {}

        bench.steps.begin(int(work.steps[0]), on_step)
        if on_step is not None:  # a task may have been cancelled before its first step, or have none
            on_step(0, bench.steps.total)
        # Random layers draw from torch's own generator, seeded for this client and round.
        with own_torch_generator(_gpus(self.device)):
            found = answer(bench.place, bench.trainer, None, work, bench.algorithm(work.spec), known)
        trained = found.trained
        update = wire.pack_update(
            wire.Update(found.vectors, trained.scalars, trained.buffers, trained.int_buffers),
            bench.place.spec,
        )
        return Answer(
            _written(update, job.out / UPDATE_FILE),
            _write_state(found.kept, job.out / STATE_FILE, bench),
            int(bench.place.clients.sizes(work.ids)[0]),
            int(trained.steps[0]),
            float(trained.normaliser[0]),
            time.perf_counter() - began,
            {name: float(values[0]) for name, values in trained.metrics.items()},
        )

    def _bench(self, content: bytes, client: int, population: int) -> Bench:
        """What the tasks of a run share, made at the first of them."""
        key = hashlib.sha256(content).digest() + b"%d %d" % (client, population)
        bench = self._benches.get(key)
        if bench is None:
            while len(self._benches) >= KEPT_RUNS:
                self._benches.popitem(last=False)
            bench = self._benches[key] = self._made(content, client, population)
        self._benches.move_to_end(key)
        threads = bench.config.engine.threads
        threads = min(threads, self.threads) if self.threads else threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return bench

    def _made(self, content: bytes, client: int, population: int) -> Bench:
        config = wire.config_of(content)
        data = client_data(config, self.source, client, population)
        engine = config.engine.model_copy(update={"device": self.device, "name": "loop"})
        config = config.model_copy(update={"engine": engine})
        strategy = build_strategy(config)
        # All rows may be needed to see whether the model fits; training needs this client's alone.
        module = build_model(config, data)
        steps = Steps()
        place = eager(workplace(config, narrowed(data, client), module))
        place = replace(place, grad_fn=steps.watched(place.grad_fn))
        check_local(config, strategy, place.grad_fn, opaque=False)
        return Bench(config, place.spec.digest, place, LoopTrainer(place), strategy, steps)

    def _work(self, bench: Bench, task: pb.Task, job: Job) -> Work:
        ids = np.array([task.client], np.int64)
        spec = wire.local_of(task.local)
        limit = None if task.steps < 0 else np.array([task.steps], np.int64)
        steps = step_counts(bench.place.clients.sizes(ids), spec, limit)
        message, buffers = wire.unpack_message(_read(job.message, self.device))
        for name, vector in message.vectors.items():
            if vector.shape != (bench.place.spec.size,):
                raise ModelError(
                    f"the broadcast vector {name!r} does not fit the model",
                    code="FS-CLI-050",
                    why=f"{list(vector.shape)} values, the model has {bench.place.spec.size}",
                    hint="install the same version of the model's package on both sides",
                )
        lent = wire.unpack_lent({} if job.lent is None else _read(job.lent, self.device))
        rounds = np.array([task.round_index], np.int64)
        return Work(ids, steps, rounds, spec, message, lent, buffers)


def _read(content: bytes | Path, device: str) -> dict[str, Tensor]:
    tensors = bundle.decode_file(content) if isinstance(content, Path) else bundle.decode(content)
    # Scalars stay on the CPU, as they do where strategies make them.
    return {name: t.to(device) if t.ndim else t for name, t in tensors.items()}


def _written(tensors: Mapping[str, Tensor], path: Path) -> bytes | Path:
    """The bundle in memory, or in a file where it is large."""
    if sum(t.numel() * t.element_size() for t in tensors.values()) < INLINE:
        content = bundle.encode(tensors)
        if len(content) <= INLINE:
            return content
    path.parent.mkdir(parents=True, exist_ok=True)
    bundle.encode_to(path, tensors)
    return path


def _write_state(kept: Mapping[str, Tensor], path: Path, bench: Bench) -> Path | None:
    """What the client keeps, in a file that says for which model and strategy; None for nothing."""
    if not kept:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    bundle.encode_to(path, kept, _marks(bench))
    return path


def _read_state(path: Path | None, bench: Bench) -> dict[str, Tensor] | None:
    """The rows of a state file [1, *shape].

    Raises:
        DataError: FS-CLI-049, it belongs to another model or strategy.
        EnvironmentProblem: FS-ENV-024, it is not there.
    """
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            header = bundle.read_header(file, path.stat().st_size)
    except OSError as error:
        raise unreadable(error, path) from error
    marks = _marks(bench)
    if any(header.metadata.get(name) != value for name, value in marks.items()):
        raise DataError(
            "the state that this client kept belongs to another run",
            code="FS-CLI-049",
            where=str(path),
            why=f"written for {dict(header.metadata)}, the task needs {marks}",
            hint="the state folder was mixed up: restore it from a copy",
        )
    return bundle.decode_file(path)


def _marks(bench: Bench) -> dict[str, str]:
    return {
        "fedsim.kind": "state",
        "fedsim.schema": bench.schema,
        "fedsim.strategy": bench.config.strategy.name,
    }


def _gpus(device: str) -> list[int]:
    if not device.startswith("cuda"):
        return []
    return [torch.device(device).index or 0]

"""The examples of this client: its part of the run's own data set, its own files, or its own function.

All three end as the run's population in which only this client owns anything, so that training cannot
tell them apart.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim import registry
from fedsim.build import build_data
from fedsim.config import Config, config_from
from fedsim.data.by_name import read_examples
from fedsim.data.convert import collected
from fedsim.data.dataset import Dataset, Split, check_split, content_digest
from fedsim.data.described import DTYPES, Description, dataset_of
from fedsim.data.federated import FederatedData
from fedsim.data.partition_repair import hold_out
from fedsim.data.stated import stated_by
from fedsim.errors import ConfigError, DataError, FedsimError

GROUP = "data_functions"
"""Entry points ``fedsim.data_functions`` are data functions by name."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a data function is told.

    Args:
        data: the ``[data]`` table of the run, without its partition.
        description: what the run states of its examples; None where it states nothing.
        client: index of this client in the run; population: N.
        seed: of the run.
    """

    data: dict[str, Any]  # Any: whatever TOML holds
    description: Description | None
    client: int
    population: int
    seed: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where a client's examples come from; with neither, from the run's own data set.

    Args:
        path: file or folder of examples, fitted to the run by name.
        function: ``package.module:function`` or the name of an entry point ``fedsim.data_functions``.
        copy: where this machine keeps the run's own data set, as ``[data] path`` would say.
    """

    path: Path | None = None
    function: str | None = None
    copy: Path | None = None

    def __post_init__(self) -> None:
        if self.path is not None and self.function is not None:
            raise ConfigError(
                "examples come from files or from a function, not from both",
                code="FS-CLI-045",
                where="--data and --data-function",
                hint="remove one of them",
            )


def client_data(config: Config, source: Source, client: int, population: int) -> FederatedData:
    """The data of a run with the examples of one client; those of the others may be missing.

    Args:
        config: as it came with a task.

    Raises:
        DataError, ConfigError: what is wrong with the data, FS-CLI-040 … 048.
    """
    if not 0 <= client < population:
        raise DataError(
            f"client {client} is not one of {population}",
            code="FS-CLI-047",
            why="clients are numbered from 0",
            hint="the coordinator's task is malformed; compare fedsim --version on both sides",
        )
    refuse_paths(config)
    if source.path is not None or source.function is not None:
        return _alone(_local(config, source, client, population), config, client, population)
    if config.data.name == "described":
        raise DataError(
            "the run has no data set of its own",
            code="FS-CLI-047",
            where="[data] name = 'described'",
            why="every client brings its own examples, and this one was given none",
            hint="start the client with --data PATH or --data-function",
        )
    if source.copy is not None:
        config = config_from(config, {"data": {"path": str(source.copy)}})
    data = build_data(config)
    if data.clients != population:
        raise DataError(
            f"the run has {population} clients, its data are divided among {data.clients}",
            code="FS-CLI-047",
            where="[data.partition] clients",
            hint="coordinator and client must have the same data set; compare fedsim data show on both",
        )
    return data


def refuse_paths(config: Config) -> None:
    """A coordinator names plugins and numbers; files and code of this machine are not its business.

    Raises:
        ConfigError: FS-CLI-048, naming the key.
    """
    tables: dict[str, dict[str, Any]] = {
        "data": {"path": config.data.path, **config.data.parameters},
        "data.partition": config.data.partition.parameters,
        "model": {"target": config.model.target, "weights": config.model.weights, **config.model.parameters},
        "strategy": config.strategy.parameters,
    }
    for table, values in tables.items():
        for key, value in values.items():
            named = key in ("path", "target", "weights", "folder", "file") or key.endswith("_path")
            # The column that a table predicts is a `target` too, how a strategy weighs clients its
            # `weights`; the test set of a described data set is the coordinator's and is not read here.
            harmless = (table, key) in (("data", "target"), ("data", "test_path"), ("strategy", "weights"))
            if named and not harmless and value is not None:
                raise ConfigError(
                    "a task names a file or code on this machine",
                    code="FS-CLI-048",
                    where=f"[{table}] {key}",
                    why="that is for the client's owner to say",
                    hint="give local examples with --data; install models as plugins and name them",
                )


def _local(config: Config, source: Source, client: int, population: int) -> Dataset:
    parameters = config.data.parameters
    run = stated_by(config.data.name, parameters)
    if source.function is not None:
        data = {"name": config.data.name, **parameters}
        request = Request(data, run, client, population, config.run.seed)
        return _from_function(source.function, request)
    assert source.path is not None
    if run is None:
        raise DataError(
            f"the run does not say what examples of {config.data.name!r} look like",
            code="FS-CLI-040",
            where=f"[data] name = {config.data.name!r}",
            why="local files are fitted by names of classes and columns, shape and normalisation",
            hint="set [data] name = 'described' in the run, or use --data-function here",
        )
    return _with_examples(run, read_examples(source.path, run), config.data.name)


def _with_examples(run: Description, split: Split, name: str) -> Dataset:
    return replace(
        dataset_of(run), name=name, train=split, digest=content_digest(name, run.task, split, None, None)
    )


def _from_function(name: str, request: Request) -> Dataset:
    """What the user's function returns, held to what the run states."""
    where = f"--data-function {name}"
    function = _function(name, where)
    try:
        given = function(request)
        dataset = given if isinstance(given, Dataset) else None
        split = dataset.train if dataset is not None else collected(given, where)
    except FedsimError:
        raise
    # The function is the user's own and can fail in any way; the traceback is kept on this machine.
    except Exception as error:
        raise DataError(
            "the data function failed",
            code="FS-CLI-046",
            where=where,
            why=type(error).__name__,
            hint="the traceback is in the client's log",
        ) from error
    if split is None:
        raise DataError("the data function returned no examples", code="FS-CLI-046", where=where)
    run = request.description
    if run is None:
        if dataset is None:
            raise DataError(
                "the run does not say what its examples look like",
                code="FS-CLI-040",
                where=where,
                hint="return a fedsim.Dataset (fedsim.from_arrays), which says it",
            )
        return dataset
    _check(split, dataset, run, where)
    return _with_examples(run, split, str(request.data["name"]))


def _check(split: Split, dataset: Dataset | None, run: Description, where: str) -> None:
    """Refuse examples of another form than the run's."""
    inputs, targets = split.inputs, split.targets
    problem = None
    if tuple(inputs.shape[1:]) != run.input_shape:
        problem = f"examples are {list(inputs.shape[1:])}, the run has {list(run.input_shape)}"
    elif inputs.dtype != DTYPES[run.inputs]:
        problem = f"inputs are {inputs.dtype}, the run has {DTYPES[run.inputs]}"
    elif targets.is_floating_point() != (run.task == "regression"):
        problem = f"targets are {targets.dtype}, the task is {run.task}"
    elif tuple(targets.shape[1:]) != (run.input_shape if run.task == "next-token" else ()):
        problem = f"targets are {list(targets.shape)} for {len(inputs)} examples"
    elif dataset is not None and dataset.label_names and dataset.label_names != run.classes:
        problem = f"classes are {', '.join(dataset.label_names)}; the run has {', '.join(run.classes)}"
    if problem is not None:
        raise DataError(
            "the data function returned examples of another form than the run's",
            code="FS-CLI-044",
            where=where,
            why=problem,
            hint="the function is told the form: request.description",
        )
    check_split(split, len(run.classes) or None, where=where)


def _function(name: str, where: str) -> Callable[[Request], Any]:
    """A data function by its place in a module, or by the name of an entry point."""
    if ":" not in name:
        return registry.load(GROUP, name)
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise DataError(
            "the data function cannot be loaded",
            code="FS-CLI-046",
            where=where,
            why=f"{type(error).__name__}: {error}",
            hint="give package.module:function of a package installed in this environment",
        ) from error
    if not callable(found):
        raise DataError("the data function is not a function", code="FS-CLI-046", where=where)
    function: Callable[[Request], Any] = found
    return function


def _alone(dataset: Dataset, config: Config, client: int, population: int) -> FederatedData:
    """A population in which `client` owns every row, but for the share that the run keeps back."""
    rows = np.arange(len(dataset.train), dtype=np.int64)
    partition = config.data.partition
    parts = hold_out(
        rows,
        np.array([0, len(rows)], np.int64),
        fraction=config.evaluation.holdout,
        min_examples=partition.min_examples,
        rng=np.random.default_rng([partition.seed, client]),
    )
    return FederatedData(
        dataset,
        parts.index,
        _offsets(len(parts.index), client, population),
        parts.holdout_index,
        _offsets(len(parts.holdout_index), client, population),
        description="local examples",
    )


def _offsets(count: int, client: int, population: int) -> np.ndarray:
    """int64 [N + 1] where `client` owns all of `count` entries."""
    return np.where(np.arange(population + 1) > client, count, 0).astype(np.int64)


def narrowed(data: FederatedData, client: int) -> FederatedData:
    """The training rows of `client` alone, so that those of the others need no memory here."""
    rows = torch.from_numpy(data.rows(client).copy())
    train = Split(data.dataset.train.inputs[rows], data.dataset.train.targets[rows])
    count = len(rows)
    return FederatedData(
        replace(data.dataset, train=train, test=None),
        np.arange(count, dtype=np.int64),
        _offsets(count, client, data.clients),
        description=data.description,
    )

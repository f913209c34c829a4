"""From a configuration to the parts of a run: data, model, strategy, policies.

Everything that can be wrong is found here, before anything is written or trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.config import Config, config_from
from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData
from fedsim.data.own import from_datasets
from fedsim.errors import ConfigError, ModelError
from fedsim.keys import Purpose, own_torch_generator, seed_torch, torch_seed
from fedsim.local import LocalSpec
from fedsim.models import check_model, make_model
from fedsim.opaque_client import OpaqueClient
from fedsim.registry import load
from fedsim.sampling import Sampler, cohort_size
from fedsim.schedulers import Scheduler
from fedsim.schema import build
from fedsim.server_ema import with_server_ema
from fedsim.strategy import Strategy
from fedsim.types import GradFn

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def overrides(
    arguments: Mapping[str, Mapping[str, Any]],
    *,
    client: LocalSpec | Mapping[str, Any] | None,
    sections: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Tables of a configuration from the arguments of a call; arguments win over `sections`."""
    tables = {name: dict(table) for name, table in sections.items()}
    if client is not None:
        tables["client"] = asdict(client) if isinstance(client, LocalSpec) else dict(client)
    for name, values in arguments.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            tables[name] = tables.get(name, {}) | given
    return tables


def own_data(data: Any) -> Any:
    """A list of torch data sets as one client each; everything else as it is."""
    if isinstance(data, list | tuple) and data and all(hasattr(d, "__getitem__") for d in data):
        return from_datasets(list(data))
    return data


def check_arguments(*, data: Any, strategy: Any, client: Any) -> None:
    """Refuse an argument of a kind that a simulation cannot use, rather than take a default for it.

    Raises:
        ConfigError: naming the argument.
    """
    kinds: dict[str, tuple[Any, tuple[type, ...], str]] = {
        "data": (data, (str, Dataset, FederatedData), "a name, Dataset, FederatedData or list of Datasets"),
        "strategy": (strategy, (str, Strategy), "a name or what fedsim.make_strategy returns"),
        "client": (client, (LocalSpec, Mapping, OpaqueClient), "a LocalSpec, a mapping or @fedsim.opaque"),
    }
    for name, (value, types, wanted) in kinds.items():
        if value is not None and not isinstance(value, types):
            raise ConfigError(
                f"the argument `{name}` cannot be {type(value).__name__}",
                code="FS-CFG-075",
                where=f"Simulation({name}=…)",
                why=f"expected {wanted}",
                hint="see docs/README.md and the docstring of fedsim.Simulation",
            )


def with_absolute_paths(config: Config) -> Config:
    """The configuration with the paths of all files made absolute, so that a run can be resumed
    from anywhere."""
    changed: dict[str, dict[str, Any]] = {}
    paths: list[tuple[str, str, Any]] = [
        ("data", "path", config.data.path),
        ("model", "weights", config.model.weights),
        ("availability", "path", config.availability.parameters.get("path")),
        ("availability", "probability", config.availability.parameters.get("probability")),
        ("devices", "path", config.devices.parameters.get("path")),
        ("membership", "path", config.membership.parameters.get("path")),
    ]
    for table, key, path in paths:
        if isinstance(path, str) and (key, path) != ("probability", "labels"):
            changed.setdefault(table, {})[key] = str(Path(path).absolute())
    return config_from(config, changed) if changed else config


def build_data(config: Config, given: Dataset | FederatedData | None = None) -> FederatedData:
    """The partitioned data set: loaded by name, or the user's own."""
    if isinstance(given, FederatedData):
        return given
    dataset = given
    if dataset is None:
        parameters = dict(config.data.parameters)
        if config.data.path is not None:
            parameters["path"] = config.data.path
        dataset = build(
            load("datasets", config.data.name), parameters, where=f"[data] name = {config.data.name!r}"
        )
        assert isinstance(dataset, Dataset)
    partition = config.data.partition
    return dataset.split(
        partition.kind,
        clients=partition.clients,
        seed=partition.seed,
        min_examples=partition.min_examples,
        on_empty=partition.on_empty,
        holdout=config.evaluation.holdout,
        **partition.parameters,
    )


def build_model(config: Config, data: FederatedData, given: Any = None) -> nn.Module:
    """The model with its initial weights, drawn from the run's seed or read from a file.

    Args:
        given: an ``nn.Module``, a class or a function that returns one; None builds by name.
    """
    dataset = data.dataset
    if given is None and config.model.target is None:
        # A name is a plugin's and never a place in code, whoever wrote the configuration.
        load("models", config.model.name)
    with own_torch_generator():
        seed_torch(torch_seed(config.run.seed, Purpose.MODEL, 0))
        module = make_model(
            copy.deepcopy(given)  # a module of the user's own is left as it is
            if isinstance(given, nn.Module)
            else given
            if given is not None
            else config.model.target or config.model.name,
            input_shape=dataset.input_shape,
            classes=dataset.classes or 1,
            params={} if given is not None and not isinstance(given, str) else config.model.parameters,
        )
    module = module.to(torch_device(config), DTYPES[config.engine.dtype]).train()
    if config.model.weights is not None:
        read_weights(module, Path(config.model.weights))
    inputs = dataset.transforms.evaluate(dataset.train.inputs[:2])
    if inputs.is_floating_point():
        inputs = inputs.to(DTYPES[config.engine.dtype])
    check_model(
        module,
        inputs.to(torch_device(config)),
        targets=dataset.train.targets[:2],
        task=dataset.task,
        classes=dataset.classes,
    )
    return module


def read_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file of this module's own names.

    Raises:
        ModelError: the file is missing, damaged, or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = f"[model] weights = {str(path)!r}"
    hint = "give a .safetensors file that fedsim wrote, or that holds this model's state_dict"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            "the initial weights cannot be read",
            code="FS-MOD-034",
            where=where,
            why=str(error),
            hint=hint,
        ) from error
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(
            "the initial weights do not fit the model",
            code="FS-MOD-035",
            where=where,
            why=str(error),
            hint=hint,
        ) from error


def torch_device(config: Config) -> torch.device:
    """The device of this run.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    name = config.engine.device.split(",")[0].strip()  # of several, where this process has its tensors
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"there is no device {name!r}",
            code="FS-CFG-067",
            where="[engine] device",
            why=str(error).splitlines()[0],
            hint="use cpu, cuda or cuda:0",
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"the device {name!r} was asked for and this machine has no GPU that torch can use",
            code="FS-CFG-067",
            where="[engine] device",
            hint="use device = 'cpu' or 'auto'",
        )
    return device


def build_strategy(config: Config, given: Strategy | None = None) -> Strategy:
    """The strategy by name, or the user's own, reporting a moving average where one is asked for."""
    strategy = given if given is not None else _named_strategy(config)
    decay = config.evaluation.server_ema
    return with_server_ema(strategy, decay) if decay else strategy


def _named_strategy(config: Config) -> Strategy:
    strategy = build(
        load("strategies", config.strategy.name),
        config.strategy.parameters,
        where=f"[strategy] name = {config.strategy.name!r}",
    )
    if not isinstance(strategy, Strategy):
        raise ConfigError(
            f"the plugin {config.strategy.name!r} does not return a fedsim.Strategy",
            code="FS-CFG-068",
            where="[strategy] name",
            why=f"it returned {type(strategy).__name__}",
            hint="its factory must return fedsim.strategy.Strategy(...)",
        )
    return strategy


def build_scheduler(config: Config, population: int, strategy: Strategy) -> tuple[Scheduler, int]:
    """The scheduler and the number of clients asked for in a round.

    Raises:
        ConfigError: it does not fit the strategy, or keys of ``[round]`` do not fit it.
    """
    cohort = cohort_size(config.round.sample, population)
    quorum: int | float = 1 if config.round.quorum is None else config.round.quorum
    if isinstance(quorum, float) and not quorum.is_integer():
        quorum = math.ceil(quorum * cohort)
    scheduler: Scheduler = build(
        load("schedulers", config.scheduler.name),
        config.scheduler.parameters,
        where=f"[scheduler] name = {config.scheduler.name!r}",
        given={
            "cohort": cohort,
            "population": population,
            "quorum": int(quorum),
            "deadline": config.round.deadline,
            "overcommit": config.round.overcommit,
        },
    )
    if scheduler.mode not in strategy.traits.modes:
        modes = " or ".join(sorted(strategy.traits.modes))
        raise ConfigError(
            f"the strategy {config.strategy.name!r} cannot run under the scheduler {config.scheduler.name!r}",
            code="FS-CFG-069",
            where="[scheduler] name",
            why=f"the scheduler is {scheduler.mode}, the strategy is made for {modes}",
            hint=f"choose one of {_schedulers_of(strategy)}, or another strategy",
        )
    if "period" in strategy.traits.needs and scheduler.period_seconds is None:
        raise ConfigError(
            f"the strategy {config.strategy.name!r}, as it is configured, divides by the length of windows",
            code="FS-CFG-098",
            where="[scheduler] name",
            why=f"under {config.scheduler.name!r} a window ends when answers come, two of them at once "
            "after no time at all",
            hint="set [scheduler] name = 'window'; for fedfix also: rate = 'interval' without normalise_time",
        )
    if scheduler.mode == "async":
        _check_round_keys(config)
    return scheduler, cohort


def _schedulers_of(strategy: Strategy) -> str:
    """Built-in schedulers under which a strategy can run."""
    names = {"sync": ("sync",), "async": ("immediate", "buffer", "window")}
    return ", ".join(
        name for mode in ("sync", "async") if mode in strategy.traits.modes for name in names[mode]
    )


def _check_round_keys(config: Config) -> None:
    """What only a synchronous round has must not be set, or it would be ignored."""
    table = config.round
    given = {"quorum": table.quorum is not None, "deadline": table.deadline is not None}
    given["overcommit"] = table.overcommit != 1.0
    for key, is_set in given.items():
        if is_set:
            raise ConfigError(
                f"`round.{key}` has no meaning under the scheduler {config.scheduler.name!r}",
                code="FS-CFG-101",
                where=f"[round] {key}",
                why="only a synchronous round waits for a cohort",
                hint=f"remove {key}, or set [scheduler] name = 'sync'",
            )


def build_sampler(config: Config) -> Sampler:
    sampler: Sampler = build(
        load("samplers", config.sampler.name),
        config.sampler.parameters,
        where=f"[sampler] name = {config.sampler.name!r}",
    )
    return sampler


def check_local(config: Config, strategy: Strategy, grad_fn: GradFn, *, opaque: bool) -> None:
    """What a strategy asks of local training.

    Raises:
        ConfigError: an optimiser without a normaliser, an opaque client, or what the strategy itself
            refuses when it makes its client half.
    """
    if config.client.momentum and config.client.optimizer != "sgd":
        raise ConfigError(
            f"{config.client.optimizer} has no momentum parameter",
            code="FS-CFG-077",
            where=f"[client] momentum = {config.client.momentum:g}",
            why="it would be ignored",
            hint="leave momentum out, or use optimizer = 'sgd'",
        )
    strategy.local(grad_fn, config.client)
    if strategy.traits.needs_normaliser and config.client.optimizer != "sgd":
        raise ConfigError(
            f"the strategy {config.strategy.name!r} divides by the sum of local step lengths, which "
            f"{config.client.optimizer} does not have",
            code="FS-CFG-070",
            where="[client] optimizer",
            hint="use optimizer = 'sgd'",
        )
    if opaque and strategy.traits.needs_normaliser:
        raise ConfigError(
            f"the strategy {config.strategy.name!r} divides by the sum of local step lengths, which an "
            "opaque training function does not tell",
            code="FS-CFG-071",
            where="client",
            hint="use a strategy such as fedavg, or describe local training by a LocalSpec",
        )
    if strategy.traits.client_hooks and opaque:
        raise ConfigError(
            f"the strategy {config.strategy.name!r} changes the direction of local steps, which an "
            "opaque training function does not show",
            code="FS-CFG-071",
            where="client",
            hint="use a strategy such as fedavg, or describe local training by a LocalSpec",
        )

"""Between the core's types and what crosses the network: bundles of named tensors, and the task's JSON.

A message is sent as it is. Of an update only the shared entries are sent: the personal ones are zero by
construction (`fedsim.personal`), and what is not sent cannot leak.

    vectors/x [D]   scalars/mu []   buffers/floating [Db]   buffers/integers [Di]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim.buffers import Buffers
from fedsim.config import Config, config_from, to_dict
from fedsim.errors import ConfigError
from fedsim.flat import ParamSpec
from fedsim.local import LocalSpec
from fedsim.types import Message

MAJOR, MINOR = 1, 0
"""Of the protocol: another major is refused, the smaller minor is spoken."""

VECTORS, SCALARS, FLOATING, INTEGERS = "vectors/", "scalars/", "buffers/floating", "buffers/integers"

Tensors = Mapping[str, Tensor]


class Update(NamedTuple):
    """One client's answer, every tensor with a leading 1.

    Args:
        vectors: {name: [1, D]}; scalars: {name: [1]}.
        buffers, integers: [1, Db] and [1, Di], None without any.
    """

    vectors: Mapping[str, Tensor]
    scalars: Mapping[str, Tensor]
    buffers: Tensor | None = None
    integers: Tensor | None = None


def pack_message(message: Message, buffers: Buffers) -> dict[str, Tensor]:
    """The broadcast of one version by name."""
    tensors = {f"{VECTORS}{name}": values for name, values in message.vectors.items()}
    tensors |= {f"{SCALARS}{name}": value for name, value in message.scalars.items()}
    return tensors | _named_buffers(buffers.floating, buffers.integers)


def unpack_message(tensors: Tensors) -> tuple[Message, Buffers]:
    """What `pack_message` packed; buffers are empty where the model has none."""
    floating = tensors.get(FLOATING, torch.empty(0))
    integers = tensors.get(INTEGERS, torch.empty(0, dtype=torch.int64))
    return Message(_below(tensors, VECTORS), _below(tensors, SCALARS)), Buffers(floating, integers)


def pack_lent(lent: Any) -> dict[str, Tensor]:
    """The rows lent to one client, {name: [1, ...]}; {} of nothing."""
    return {} if isinstance(lent, tuple) else dict(lent)


def unpack_lent(tensors: Tensors) -> Any:
    """The rows as a task lends them: ``()`` of nothing."""
    return dict(tensors) or ()


def pack_update(update: Update, spec: ParamSpec) -> dict[str, Tensor]:
    """One client's answer by name, without its leading 1 and without personal entries."""
    shared = spec.shared_mask() if spec.personal else None
    tensors: dict[str, Tensor] = {}
    for name, rows in update.vectors.items():
        row = rows[0]
        whole = shared is None or len(row) != spec.size
        tensors[f"{VECTORS}{name}"] = row if whole else row[shared]
    tensors |= {f"{SCALARS}{name}": value[0] for name, value in update.scalars.items()}
    floating = None if update.buffers is None else update.buffers[0]
    return tensors | _named_buffers(floating, None if update.integers is None else update.integers[0])


def unpack_update(tensors: Tensors, spec: ParamSpec) -> Update:
    """What `pack_update` packed; personal entries are zero."""
    shared = spec.shared_mask() if spec.personal else None
    vectors: dict[str, Tensor] = {}
    for name, row in _below(tensors, VECTORS).items():
        if shared is not None and len(row) == spec.size - spec.personal_size:
            full = row.new_zeros(spec.size)
            full[shared] = row
            row = full
        vectors[name] = row.unsqueeze(0)
    scalars = {name: value.reshape(1) for name, value in _below(tensors, SCALARS).items()}
    floating, integers = (
        tensors[name].unsqueeze(0) if name in tensors else None for name in (FLOATING, INTEGERS)
    )
    return Update(vectors, scalars, floating, integers)


def client_config(config: Config) -> bytes:
    """JSON of what a client must know of a run: names of plugins and numbers, no path and no code.

    Raises:
        ConfigError: FS-CFG-130, the model is the caller's own Python object.
    """
    if config.model.target is not None:
        raise ConfigError(
            "a model of one's own cannot be sent to clients",
            code="FS-CFG-130",
            where=f"[model] target = {config.model.target!r}",
            why="no code crosses the network: clients build models by the names of installed plugins",
            hint="install the model as a plugin (entry point fedsim.models) on every client, and name it",
        )
    values = to_dict(config)
    data = {k: v for k, v in values["data"].items() if k != "path" and not k.endswith("_path")}
    model = {k: v for k, v in values["model"].items() if k != "weights"}
    engine = {key: values["engine"][key] for key in ("dtype", "threads")}
    tables = {
        "run": {"seed": config.run.seed},
        "data": data,
        "model": model,
        "client": values["client"],
        "strategy": values["strategy"],
        "engine": engine,
        "evaluation": {"holdout": config.evaluation.holdout},
    }
    return json.dumps(tables, sort_keys=True).encode()


def config_of(content: bytes) -> Config:
    """The configuration that `client_config` wrote; the rest has its defaults.

    Raises:
        ConfigError: it is not one that this version of fedsim understands.
    """
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ConfigError(
            "the configuration of a task cannot be read",
            code="FS-CFG-131",
            why=str(error),
            hint="coordinator and client must speak the same protocol; compare fedsim --version on both",
        ) from error
    return config_from(values, {})


@lru_cache(maxsize=64)  # all tasks of a round have the same
def local_json(spec: LocalSpec) -> bytes:
    """The local training of a round."""
    return json.dumps(asdict(spec), sort_keys=True).encode()


def local_of(content: bytes) -> LocalSpec:
    """What `local_json` wrote."""
    return LocalSpec(**json.loads(content))


def _named_buffers(floating: Tensor | None, integers: Tensor | None) -> dict[str, Tensor]:
    named = {FLOATING: floating, INTEGERS: integers}
    return {name: values for name, values in named.items() if values is not None and values.numel()}


def _below(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

"""The configuration of a run: read, merged, checked, written again.

    loaded = load_config(Path("fedsim.toml"), sets=["round.sample=20"])
    loaded.config.strategy.name, loaded.sources["round.sample"]

What each key means is in `fedsim.config_sections`; how layers win over each other is in
`fedsim.config_merge`; ``docs/configuration.md`` is for users.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from fedsim import registry
from fedsim.attribute_docs import attribute_docs
from fedsim.config_merge import (
    Layer,
    assignments,
    environment,
    flag_layer,
    merge,
    read_file,
    read_preset,
)
from fedsim.config_sections import TABLES, Config, Values, keys_of
from fedsim.errors import ConfigError, RegistryError
from fedsim.local import LocalSpec
from fedsim.schema import UNKNOWN, alternatives, check, describe, expected, shown, unknown_key, validate

__all__ = [
    "Config",
    "Loaded",
    "config_from",
    "digest",
    "from_dict",
    "json_schema",
    "load_config",
    "to_dict",
    "to_toml",
]


@dataclass(frozen=True, slots=True)
class PluginTable:
    """A table that names a plugin.

    Args:
        kind: group of the registry.
        key: which of its keys names the plugin.
        given: parameters that fedsim fills in by itself.
        passed: keys of the table itself that are passed on when they are set.
    """

    kind: str
    key: str
    given: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()


PLUGIN_TABLES: Mapping[str, PluginTable] = {
    "data": PluginTable("datasets", "name", passed=("path",)),
    "data.partition": PluginTable("partitioners", "kind"),
    "model": PluginTable("models", "name", given=("input_shape", "classes")),
    "sampler": PluginTable("samplers", "name"),
    "availability": PluginTable("availability", "name", given=("population", "label_shares")),
    "devices": PluginTable("devices", "name", given=("population",)),
    "membership": PluginTable("membership", "name", given=("population",)),
    "strategy": PluginTable("strategies", "name"),
    "scheduler": PluginTable(
        "schedulers", "name", given=("cohort", "population", "quorum", "deadline", "overcommit")
    ),
}
OWN_ENGINES = ("auto", "fused", "stacked", "flat", "loop")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and where it came from.

    Args:
        config: resolved, with every plugin's defaults written out.
        sources: dotted key -> origin, for every key; ``default`` where nobody set it.
        file: that was read, None without one.
        expected: the ``[expected]`` table of a preset or file, {} without one.
    """

    config: Config
    sources: dict[str, str]
    file: Path | None = None
    expected: Values = field(default_factory=dict)


def load_config(
    file: Path | None = None,
    *,
    preset: str | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, tuple[str, object]] | None = None,
) -> Loaded:
    """Defaults < preset < base of the file < file < environment < ``--set`` < explicit flags.

    Args:
        environ: variables ``FEDSIM__TABLE__KEY`` of it are read; usually ``os.environ``.
        sets: ``table.key=value``.
        flags: dotted key -> (flag, value), such as ``{"run.seed": ("--seed", 3)}``.

    Raises:
        ConfigError: with file, table and key.
        RegistryError: a plugin that is not there.
    """
    layers = [] if preset is None else [read_preset(preset)]
    layers += [] if file is None else read_file(file)
    expected_numbers: Values = {}
    for layer in layers:
        found = dict(layer.values).get("expected")
        expected_numbers = expected_numbers if found is None else dict(found)
    layers = [
        Layer(layer.origin, {k: v for k, v in layer.values.items() if k != "expected"}) for layer in layers
    ]
    layers += [environment(environ or {}), assignments(sets), flag_layer(flags or {})]
    merged, sources = merge(layers)
    config = resolve(_validated(merged, sources), sources)
    everything = {key: sources.get(key, "default") for key in dotted_keys(to_dict(config))}
    return Loaded(config, everything, file, expected_numbers)


def from_dict(values: Mapping[str, Any]) -> Config:
    """A configuration from nested mappings, as they would stand in a file.

    Raises:
        ConfigError: an unknown table or key, a wrong type, a value out of range.
    """
    return config_from(values, {})


def config_from(
    config: Config | Mapping[str, Any] | None, overrides: Mapping[str, Mapping[str, Any]]
) -> Config:
    """A configuration with some keys replaced; parameters of plugins are left to those who build them.

    Args:
        config: None for the defaults.
        overrides: table -> key -> value.

    Raises:
        ConfigError: as `from_dict`.
    """
    layers = []
    if config is not None:
        values = to_dict(config) if isinstance(config, Config) else config
        layers.append(Layer("configuration", values))
    layers.append(Layer("argument", overrides))
    merged, sources = merge(layers)
    return _validated(merged, sources)


def resolve(config: Config, sources: Mapping[str, str]) -> Config:
    """`config` with the parameters of every plugin checked and its defaults written out.

    Raises:
        ConfigError, RegistryError: naming file, table and key.
    """
    values = to_dict(config)
    for path, table in PLUGIN_TABLES.items():
        own = values
        for part in path.split("."):
            own = own.setdefault(part, {})
        name = own.get(table.key)
        if name is None or (path == "model" and "target" in own):
            continue
        keys = [k for k in keys_of(path) if k not in table.passed]
        parameters = {k: v for k, v in own.items() if k not in keys}
        try:
            factory = registry.load(table.kind, name)
            full = validate(factory, parameters, f"[{path}]", given=table.given)
        except ConfigError as error:
            raise _located(error, path, parameters, name, sources) from error
        own |= {k: v for k, v in full.items() if v is not None}
    _check_engine(config, sources)
    return _validated(values, sources)


def _located(
    error: ConfigError, path: str, parameters: Values, name: str, sources: Mapping[str, str]
) -> ConfigError:
    """The error of a plugin's table with the place where the offending key was written."""
    quoted = re.search(r"`(.*?)`", error.what)
    key = quoted[1] if quoted and quoted[1] in parameters else PLUGIN_TABLES[path].key
    place = sources.get(f"{path}.{key}") or sources.get(f"{path}.{PLUGIN_TABLES[path].key}", "default")
    located = type(error)(
        error.what,
        code=error.code,
        where=f"{place}: [{path}] {PLUGIN_TABLES[path].key} = {shown(name)}",
        why=error.why,
        hint=error.hint,
    )
    return located


def _check_engine(config: Config, sources: Mapping[str, str]) -> None:
    engine = config.engine
    others = registry.names("engines")
    if engine.name not in (*OWN_ENGINES, *others):
        raise RegistryError(
            f"no engine is called {engine.name!r}",
            where=f"{sources.get('engine.name', 'default')}: [engine] name = {shown(engine.name)}",
            why=f"known: {', '.join((*OWN_ENGINES, *others))}",
            hint="use auto",
        )
    if engine.name not in OWN_ENGINES:
        registry.load("engines", engine.name)


def _validated(values: Values, sources: Mapping[str, str]) -> Config:
    try:
        return check(Config, values)
    except ValidationError as error:
        raise _refusal(error, values, sources) from error


def _refusal(error: ValidationError, values: Values, sources: Mapping[str, str]) -> ConfigError:
    """pydantic's first mistake with the table, the key, and where it was written."""
    found = error.errors(include_url=False, include_context=False)
    first = next((e for e in found if e["type"] in UNKNOWN), found[0])
    location = [str(part) for part in first["loc"]]
    if not location:  # the text itself cannot be read, as bytes that are no UTF-8
        return ConfigError(
            "the configuration holds a text that cannot be written",
            code="FS-CFG-006",
            why=expected(first),
            hint="use UTF-8 in names and paths",
        )
    path = ".".join(location[:2]) if ".".join(location[:2]) in TABLES else location[0]
    rest = location[len(path.split(".")) :]
    own: Any = values
    for part in path.split("."):
        own = own.get(part, {})
    key = rest[0] if rest else None
    if key is None:  # a rule between keys; its message names them
        message = expected(first)
        key = next((k for k in own if k in message), None)
        place = sources.get(f"{path}.{key}", next(iter(sources.values()), "default"))
        return ConfigError(
            f"the table [{path}] does not fit",
            code="FS-CFG-006",
            where=f"{place}: [{path}]" + (f" {key} = {shown(own[key])}" if key else ""),
            why=message,
            hint=f"fedsim config explain {path}" + (f".{key}" if key else ""),
        )
    dotted = f"{path}.{key}"
    where = f"{sources.get(dotted, 'default')}: [{path}]"
    if first["type"] in UNKNOWN:
        return unknown_key(key, keys_of(path), where=where)
    same = [
        e for e in found if [str(p) for p in e["loc"]][: len(path.split(".")) + 1] == [*path.split("."), key]
    ]
    typed = all(e["type"].endswith(("_type", "_from_float")) or e["type"] == "literal_error" for e in same)
    return ConfigError(
        f"the value of `{dotted}` does not fit",
        code="FS-CFG-005" if typed else "FS-CFG-006",
        where=f"{where} {key} = {shown(own.get(key))}",
        why=alternatives(same),
        hint=f"fedsim config explain {dotted}",
    )


def to_dict(config: Config) -> Values:
    """Nested dictionaries as they would stand in a file; keys without a value are left out."""
    values: Values = _without_none(config.model_dump(mode="json"))
    if config.model.target is not None:
        values["model"].pop("name")
    return values


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def to_toml(config: Config) -> str:
    """The configuration as TOML that `load_config` reads back to the same."""
    return tomli_w.dumps({name: table for name, table in to_dict(config).items() if table})


def digest(config: Config) -> str:
    """SHA-256 (hex) of everything that decides a run's numbers: all but its name and what is written."""
    values = to_dict(config)
    values.pop("output")
    values["run"].pop("name", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def dotted_keys(values: Mapping[str, Any]) -> list[str]:
    """Every key below a table as ``table.key``."""
    keys: list[str] = []
    for name, table in values.items():
        for key in table:
            if f"{name}.{key}" in TABLES:
                keys += [f"{name}.{key}.{k}" for k in table[key]]
            else:
                keys.append(f"{name}.{key}")
    return keys


def json_schema() -> Values:
    """The JSON Schema of a configuration file, for completion in editors."""
    schema = Config.model_json_schema()
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fedsim configuration"}
    docs = {p.name: p.doc for p in describe(LocalSpec)}
    definitions = schema["$defs"]
    for key, entry in definitions["LocalSpec"]["properties"].items():
        entry["description"] = docs[key]
    definitions["LocalSpec"]["additionalProperties"] = False
    for section in TABLES.values():
        for key, doc in attribute_docs(section).items():
            definitions[section.__name__]["properties"][key]["description"] = doc
    for path, table in PLUGIN_TABLES.items():
        section = definitions[TABLES[path].__name__]
        section["properties"][table.key]["examples"] = registry.names(table.kind)
    schema["properties"] |= {
        "extends": {"type": "string", "description": "One file below this one, relative to it."},
        "expected": {"type": "object", "description": "What the run should reach; not part of the run."},
    }
    return schema

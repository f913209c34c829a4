"""Layers of a configuration and how a higher one wins over a lower one.

Lowest first: preset, base file (``extends``), file, environment, ``--set``, explicit flags. Defaults
lie below all of them, in the model itself. Naming another plugin in a higher layer drops the
parameters that lower layers gave to the plugin named before: they belong to that one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.config_sections import TABLES, PluginSection
from fedsim.errors import ConfigError
from fedsim.schema import shown, unknown_key

Values = dict[str, Any]  # Any: whatever TOML holds

ENVIRONMENT = "FEDSIM__"

# Which keys name the plugin of a table, and which keys outlive a change of plugin.
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "data": ("name",),
    "data.partition": ("kind",),
    "model": ("name", "target"),
    "sampler": ("name",),
    "availability": ("name",),
    "devices": ("name",),
    "strategy": ("name",),
    "scheduler": ("name",),
}
_KEPT: Mapping[str, tuple[str, ...]] = {
    "data": ("partition",),
    "data.partition": ("clients", "seed", "min_examples", "on_empty"),
}


class Layer(NamedTuple):
    """Values from one place.

    Args:
        origin: what `fedsim config show --sources` says of them.
        values: nested as in a file.
        origins: dotted key -> origin, where keys of one layer come from different places.
    """

    origin: str
    values: Mapping[str, Any]
    origins: Mapping[str, str] = {}


def merge(layers: Sequence[Layer]) -> tuple[Values, dict[str, str]]:
    """The layers over each other, the last one on top, and the origin of each dotted key.

    Raises:
        ConfigError: FS-CFG-004 an unknown table, FS-CFG-005 a value where a table belongs.
    """
    merged: Values = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for name, table in layer.values.items():
            if name not in TABLES or "." in name:
                known = [n for n in TABLES if "." not in n]
                raise _unknown_table(name, known, where=layer.origins.get(name, layer.origin))
            _lay(merged, sources, layer, name, table)
    return merged, sources


def _lay(merged: Values, sources: dict[str, str], layer: Layer, path: str, table: object) -> None:
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"[{path}] is a table",
            code="FS-CFG-005",
            where=layer.origins.get(path, layer.origin),
            why=f"{path} = {shown(table)}",
            hint=f"write its keys below a line [{path}]",
        )
    own: Values = merged
    for part in path.split("."):
        own = own.setdefault(part, {})
    choices = _CHOICES.get(path, ())
    if any(c in table and table[c] != own.get(c, _default(path, c)) for c in choices):
        for key in [k for k in own if k not in _KEPT.get(path, ())]:
            del own[key]
            sources.pop(f"{path}.{key}", None)
    for key, value in table.items():
        dotted = f"{path}.{key}"
        if dotted in TABLES:
            _lay(merged, sources, layer, dotted, value)
        else:
            own[key] = value
            sources[dotted] = layer.origins.get(dotted, layer.origin)


def _default(path: str, key: str) -> object:
    section = TABLES[path]
    assert issubclass(section, PluginSection)
    return section.model_fields[key].default


def _unknown_table(name: str, known: list[str], *, where: str) -> ConfigError:
    error = unknown_key(name, known, where=where)
    what = error.what.replace("unknown key", "unknown table").replace(f" in {where}", "")
    return ConfigError(
        what,
        code="FS-CFG-004",
        where=where,
        why=f"known tables: {', '.join(known)}",
        hint=error.hint,
    )


def preset_names() -> list[str]:
    """The presets that come with fedsim, sorted."""
    folder = resources.files("fedsim") / "presets"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """The file of a preset, comments included.

    Raises:
        ConfigError: FS-CFG-009, no such preset.
    """
    known = preset_names()
    if name not in known:
        raise ConfigError(
            f"there is no preset {name!r}",
            code="FS-CFG-009",
            where="--preset",
            why=f"known: {', '.join(known)}",
            hint="fedsim config show --preset NAME prints one",
        )
    return (resources.files("fedsim") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def read_preset(name: str) -> Layer:
    """A preset as a layer."""
    return Layer(f"preset {name}", parse(preset_text(name), where=f"preset {name}"))


def read_file(file: Path) -> list[Layer]:
    """A configuration file, below it the one file that it extends.

    Raises:
        ConfigError: FS-CFG-002 unreadable, FS-CFG-003 no TOML, FS-CFG-011 a base that has a base.
    """
    values = parse(_text(file), where=str(file))
    layers = [Layer(str(file), values)]
    base = values.pop("extends", None)
    if base is None:
        return layers
    if not isinstance(base, str):
        raise ConfigError(
            "extends names one file",
            code="FS-CFG-011",
            where=f"{file}: extends = {shown(base)}",
            hint='write extends = "base.toml"',
        )
    path = file.parent / base
    below = parse(_text(path), where=str(path))
    if "extends" in below:
        raise ConfigError(
            f"{base} extends a file itself",
            code="FS-CFG-011",
            where=f"{file}: extends = {shown(base)}",
            why="one file may lie below another, not more, so that a value is found in two places at most",
            hint="put the keys of both base files into one",
        )
    return [Layer(str(path), below), *layers]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8: {error}"
        raise ConfigError(
            f"the configuration {file.name!r} cannot be read",
            code="FS-CFG-002",
            where=str(file),
            why=reason or type(error).__name__,
            hint="give the path of a TOML file; fedsim config show > fedsim.toml writes one",
        ) from error


def parse(text: str, *, where: str) -> Values:
    """TOML as nested dictionaries.

    Raises:
        ConfigError: FS-CFG-003, with line and column.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            "the configuration is not valid TOML",
            code="FS-CFG-003",
            where=where,
            why=str(error),
            hint='texts need quotes: name = "mnist"',
        ) from error


def environment(environ: Mapping[str, str]) -> Layer:
    """``FEDSIM__ROUND__SAMPLE=20`` as ``[round] sample = 20``."""
    found = sorted((n, v) for n, v in environ.items() if n.startswith(ENVIRONMENT))
    pairs = [(n[len(ENVIRONMENT) :].lower().split("__"), v, f"environment {n}") for n, v in found]
    return _dotted("environment", pairs)


def assignments(sets: Sequence[str]) -> Layer:
    """``--set round.sample=20`` as ``[round] sample = 20``; the last one of a key wins.

    Raises:
        ConfigError: FS-CFG-010, it is no ``key=value``.
    """
    pairs = []
    for text in sets:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ConfigError(
                f"{text!r} is no assignment",
                code="FS-CFG-010",
                where=f"--set {text}",
                hint="write --set table.key=value, such as --set round.sample=20",
            )
        pairs.append((key.strip().split("."), value.strip(), f"--set {text}"))
    return _dotted("--set", pairs)


def _dotted(origin: str, pairs: Sequence[tuple[list[str], str, str]]) -> Layer:
    values: Values = {}
    origins: dict[str, str] = {}
    for parts, text, source in pairs:
        if len(parts) < 2 or not all(parts):
            raise ConfigError(
                f"{'.'.join(parts)!r} names no key of a table",
                code="FS-CFG-010",
                where=source,
                hint="write table.key, such as round.sample",
            )
        place = values
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(
                    f"{'.'.join(parts)!r} lies below a key that has a value", code="FS-CFG-010", where=source
                )
        place[parts[-1]] = scalar(text)
        origins |= {".".join(parts[: i + 1]): source for i in range(len(parts))}
    return Layer(origin, values, origins)


def scalar(text: str) -> Any:
    """A value as TOML would read it, or the text itself where it is no TOML value."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = found["value"]
    # Dates have no use here, and a second key behind a line break is no value.
    plain = isinstance(value, (bool, int, float, str, list, dict))
    return value if plain and len(found) == 1 else text


def flag_layer(flags: Mapping[str, tuple[str, object]]) -> Layer:
    """Explicit flags: dotted key -> (flag, value)."""
    values: Values = {}
    for key, (_, value) in flags.items():
        table, _, name = key.rpartition(".")
        place = values
        for part in table.split("."):
            place = place.setdefault(part, {})
        place[name] = value
    return Layer("flags", values, {key: flag for key, (flag, _) in flags.items()})

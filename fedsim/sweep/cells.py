"""The cells of a grid: one configuration, one name, one run folder each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fedsim import registry
from fedsim.build import build_scheduler, build_strategy, with_absolute_paths
from fedsim.config import PLUGIN_TABLES, Config, Loaded, config_from, digest, load_config, to_dict
from fedsim.config_merge import Layer, flag_layer, merge
from fedsim.errors import ConfigError, FedsimError
from fedsim.progress import target_of
from fedsim.runs.names import LONGEST, slug
from fedsim.schema import build
from fedsim.sweep.axes import VARIANT, Axis, Point

# Factories that only look at their parameters: calling them finds values out of range before a run does.
TRIED = ("data.partition", "sampler", "strategy")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep.

    Args:
        name: of its folder: the same whenever the point and the seed are the same.
        group: the name without the seed; cells of one group are repetitions.
        at: axis -> value.
        labels: axis -> label.
        config: resolved.
        digest: of the configuration.
    """

    name: str
    group: str
    at: Mapping[str, Any]
    labels: Mapping[str, str]
    seed: int
    config: Config
    digest: str


def cells_of(
    axes: Sequence[Axis],
    seeds: Sequence[int],
    *,
    base: Sequence[Layer],
    sets: Layer,
    seed_keys: Sequence[str],
    where: str,
) -> tuple[Cell, ...]:
    """Every cell, each configuration loaded and checked.

    The seeds are the slowest to change and the first axis, the variants, the fastest, so that whatever
    is done when a sweep stops can be compared.

    Args:
        base: layers of the configuration, the lowest first.
        sets: the layer above those of the axes.
        where: file, for messages.

    Raises:
        ConfigError, RegistryError: a configuration is wrong, with the cell named; FS-SWP-002, two
            cells are the same run.
    """
    cells: list[Cell] = []
    tried: set[str] = set()
    same: dict[str, Cell] = {}
    for seed, backwards in product(seeds, product(*(axis.points for axis in reversed(axes)))):
        points = backwards[::-1]
        cell = _cell(axes, points, seed, base=base, sets=sets, seed_keys=seed_keys, tried=tried)
        twin = same.setdefault(cell.digest, cell)
        if twin is not cell:
            raise ConfigError(
                f"{cell.name} and {twin.name} are the same run",
                code="FS-SWP-002",
                where=where,
                why="their configurations do not differ",
                hint="remove one of the two, or the key that makes them the same",
            )
        cells.append(cell)
    return tuple(cells)


def _cell(
    axes: Sequence[Axis],
    points: Sequence[Point],
    seed: int,
    *,
    base: Sequence[Layer],
    sets: Layer,
    seed_keys: Sequence[str],
    tried: set[str],
) -> Cell:
    labels = {axis.name: point.label for axis, point in zip(axes, points, strict=True)}
    group = _folder([label if name == VARIANT else f"{name}-{label}" for name, label in labels.items()])
    name = _folder([*([group] if labels else []), f"seed-{seed}"])
    own = {key: (f"seed {seed}", seed) for key in seed_keys}
    naming = Layer("sweep", {"run": {"name": group if labels else name}})
    layers = [*base, *(point.layer for point in points), sets, flag_layer(own), naming]
    try:
        loaded = _load(layers)
        _try_out(loaded, tried)
    except FedsimError as error:
        raise type(error)(
            error.what,
            code=error.code,
            where=", ".join(filter(None, (error.where, f"cell {name}"))),
            why=error.why,
            hint=error.hint,
        ) from error
    config = with_absolute_paths(loaded.config)
    at = {axis.name: point.value for axis, point in zip(axes, points, strict=True)}
    return Cell(name, group, at, labels, seed, config, digest(config))


def _load(layers: Iterable[Layer]) -> Loaded:
    """The layers as a configuration that knows where each key comes from."""
    merged, sources = merge(tuple(layers))
    flags: dict[str, tuple[str, object]] = {}
    for dotted, source in sources.items():
        value: Any = merged
        for part in dotted.split("."):
            value = value[part]
        flags[dotted] = (source, value)
    return load_config(flags=flags)


def _try_out(loaded: Loaded, tried: set[str]) -> None:
    """Call the factories that need no data, each set of parameters once.

    Raises:
        ConfigError: FS-CFG-006 a value is out of range, FS-CFG-069 strategy and scheduler do not go
            together, FS-CFG-073 the target is not understood.
    """
    config = loaded.config
    target_of(config)
    values = to_dict(config)
    for path in TRIED:
        table = PLUGIN_TABLES[path]
        own: Any = values
        section: Any = config
        for part in path.split("."):
            own, section = own[part], getattr(section, part)
        name = own.get(table.key)
        if name is None or not _first(tried, path, own):
            continue
        origin = loaded.sources.get(f"{path}.{table.key}", "default")
        build(registry.load(table.kind, name), section.parameters, where=f"{origin}: [{path}] {name}")
    clients = config.data.partition.clients
    together = [values[table] for table in ("scheduler", "round", "strategy")]
    if clients is not None and _first(tried, "scheduler", clients, *together):
        build_scheduler(config, clients, build_strategy(config))


def _first(tried: set[str], *parts: object) -> bool:
    """Whether these have not been tried before."""
    text = json.dumps(parts, sort_keys=True)
    new = text not in tried
    tried.add(text)
    return new


def _folder(parts: Sequence[str]) -> str:
    """A folder's name of these parts; where a letter was lost six digits keep it apart from others."""
    text = "_".join(parts)
    name = slug(text)
    if name == text:
        return name
    return f"{name[: LONGEST - 7]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def differing(cell: Cell, then: Config) -> dict[str, tuple[Any, Any]]:
    """Keys in which a run's configuration is another than the cell's: key -> (then, now).

    What an engine was chosen by itself, how many processes trained, the name and what is written do not
    count.
    """
    engine = cell.config.engine
    free: dict[str, Any] = {"workers": engine.workers}
    if engine.name == "auto":
        free |= {"name": engine.name, "block": engine.block}
    mine = to_dict(cell.config)
    theirs = to_dict(config_from(then, {"engine": free}))
    found = {}
    for table in dict.fromkeys([*mine, *theirs]):
        if table == "output":
            continue
        old, new = _flat(theirs.get(table, {}), table), _flat(mine.get(table, {}), table)
        for key in dict.fromkeys([*old, *new]):
            if key != "run.name" and old.get(key) != new.get(key):
                found[key] = (old.get(key), new.get(key))
    return found


def _flat(value: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        dotted = f"{path}.{key}"
        if isinstance(inner, Mapping):
            found |= _flat(inner, dotted)
        else:
            found[dotted] = inner
    return found

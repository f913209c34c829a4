"""Measure the engines on this machine and recommend one; a run never does this by itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from fedsim.config import Config, config_from
from fedsim.errors import ModelError
from fedsim.keys import own_torch_generator
from fedsim.simulation.run import Simulation

_BLOCKS = {"fused": (5, 10, 25, 100, 1024), "stacked": (4, 16, 64, 256, 1024)}


class Setting(NamedTuple):
    """One way to train: engine, clients of a block (None for one at a time), processes, threads."""

    engine: str
    block: int | None
    workers: int
    threads: int


class Measured(NamedTuple):
    """One setting: median, least and most seconds of a round, or why it cannot run."""

    engine: str
    block: int
    workers: int
    threads: int
    median: float
    least: float
    most: float
    refused: str = ""


def candidates(cohort: int, cores: int) -> list[Setting]:
    """What is worth trying for a cohort of this size: processes with one thread each, or threads."""
    crews = sorted({(1, 1), (min(cores, cohort), 1), (1, cores)})
    found = [Setting(engine, None, *crew) for engine in ("loop", "flat") for crew in crews]
    for engine, sizes in _BLOCKS.items():
        for block in sorted({min(cohort, size) for size in sizes}):
            found += [Setting(engine, block, w, t) for w, t in crews if w == 1 or block < cohort]
    return found


def measure(
    config: Config,
    *,
    rounds: int = 3,
    cores: int,
    given: dict[str, Any] | None = None,
    on_result: Callable[[Measured], None] = lambda m: None,
) -> list[Measured]:
    """Time every candidate, interleaved round by round, after one round that is left out.

    Args:
        rounds: timed rounds of each.
        given: model, data and strategy objects, as for `Simulation`.

    Returns:
        Fastest first; what cannot run comes last with its reason, an engine once.
    """
    running: list[tuple[Setting, Simulation, list[float]]] = []
    results: list[Measured] = []
    refused: set[str] = set()
    cohort = Simulation(config, **(given or {})).cohort
    for setting in candidates(cohort, cores):
        if setting.engine in refused:
            continue
        sections: dict[str, dict[str, Any]] = {
            "engine": {**setting._asdict(), "name": setting.engine},
            "run": {"rounds": rounds + 2},
            "evaluation": {"central": False, "clients": "never"},
        }
        del sections["engine"]["engine"]
        try:
            sim = Simulation(config_from(config, sections), **(given or {}))
        except ModelError as error:
            refused.add(setting.engine)
            results.append(_result(setting, [0.0], error.why or error.what))
            continue
        running.append((setting, sim, []))
    try:
        for number in range(rounds + 1):
            for setting, sim, seconds in running:
                _use(setting.threads)
                began = time.perf_counter()
                with own_torch_generator():
                    sim.federation.run_window()
                if number:
                    seconds.append(time.perf_counter() - began)
    finally:
        for _, sim, _ in running:
            sim.engine.close()
    for setting, _, seconds in running:
        result = _result(setting, seconds)
        results.append(result)
        on_result(result)
    return sorted(results, key=lambda m: (bool(m.refused), m.median))


def _result(setting: Setting, seconds: list[float], refused: str = "") -> Measured:
    named = setting._replace(block=setting.block or 1)
    return Measured(*named, statistics.median(seconds), min(seconds), max(seconds), refused)  # type: ignore[arg-type]


def _use(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)

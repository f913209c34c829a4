"""Measure the engines on this machine and recommend one; a run never does this by itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from fedsim.config import Config, config_from
from fedsim.errors import ModelError
from fedsim.simulation.run import Simulation


class Measured(NamedTuple):
    """One setting: median, least and most seconds of a round, or why it cannot run."""

    engine: str
    block: int
    threads: int
    median: float
    least: float
    most: float
    refused: str = ""


def candidates(config: Config, cohort: int, cores: int) -> list[tuple[str, int | None, int]]:
    """Engines, blocks and threads worth trying for a cohort of this size."""
    threads = sorted({1, cores})
    blocks = sorted({min(cohort, b) for b in (4, 16, 64, 256, 1024)})
    settings: list[tuple[str, int | None, int]] = [("loop", None, t) for t in threads]
    return settings + [("stacked", b, t) for b in blocks for t in threads]


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
        Fastest first; what cannot run comes last with its reason.
    """
    running: list[tuple[tuple[str, int, int], Simulation, list[float]]] = []
    results: list[Measured] = []
    cohort = Simulation(config, **(given or {})).cohort
    for engine, block, threads in candidates(config, cohort, cores):
        sections: dict[str, dict[str, Any]] = {
            "engine": {"name": engine, "block": block, "threads": threads},
            "run": {"rounds": rounds + 2},
            "evaluation": {"central": False, "clients": "never"},
        }
        try:
            sim = Simulation(config_from(config, sections), **(given or {}))
        except ModelError as error:
            results.append(Measured(engine, block or 1, threads, 0.0, 0.0, 0.0, error.why or error.what))
            continue
        running.append(((engine, sim.config.engine.block or 1, threads), sim, []))
    for number in range(rounds + 1):
        for (_, _, threads), sim, seconds in running:
            _use(threads)
            began = time.perf_counter()
            sim.federation.run_window()
            if number:
                seconds.append(time.perf_counter() - began)
    for setting, _, seconds in running:
        result = Measured(*setting, statistics.median(seconds), min(seconds), max(seconds))
        results.append(result)
        on_result(result)
    return sorted(results, key=lambda m: (bool(m.refused), m.median))


def _use(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)

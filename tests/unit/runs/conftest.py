"""Runs made of invented records, with the form that a simulation gives them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.runs.folder import RunFolder
from fedsim.runs.report import write_report

Record = dict[str, Any]
MakeRun = Callable[..., RunFolder]

CONFIG = """\
[run]
name = "digits"
seed = {seed}
rounds = 4

[data]
name = "digits"

[data.partition]
kind = "dirichlet"
alpha = {alpha}
seed = 0

[evaluation]
target = "accuracy >= 0.8"
"""


def invented(rounds: int = 4, *, shift: float = 0.0) -> list[Record]:
    """Records 0 … rounds: accuracy 0.1, 0.3, 0.5, … and a loss that halves."""
    result = []
    for k in range(rounds + 1):
        record: Record = {
            "round": k,
            "version": k,
            "outcome": "ok" if k else "start",
            "cohort": 3 if k else 0,
            "received": 3 if k else 0,
            "refused": 0,
            "late": 0,
            "lost": 0,
            "accuracy": min(0.99, 0.1 + 0.2 * k + shift),
            "loss": 2.0 / 2**k,
        }
        if k:
            record["train_loss"] = 1.9 / 2**k
        record |= {"bytes_down": 300 * bool(k), "bytes_up": 200 * bool(k), "clock_seconds": float(k)}
        record["time"] = {
            "seconds": 0.5,
            "phases": {"train": 0.4},
            "rss_mb": 300,
            "at": "2025-01-31T14:05:00Z",
        }
        result.append(record)
    return result


def some_clients(round_index: int) -> dict[str, list[Any]]:
    """Columns of three clients, the last of them refused."""
    return {
        "client": [0, 4, 7],
        "round": [round_index] * 3,
        "verdict": ["accepted", "accepted", "refused"],
        "reason": [None, None, "the update is not finite"],
        "norm": [0.5, 1.5, float("nan")],
        "examples": [10, 20, 30],
    }


@pytest.fixture
def records() -> list[Record]:
    return invented()


@pytest.fixture
def columns() -> Callable[[int], dict[str, list[Any]]]:
    return some_clients


def run_below(
    folder: Path,
    name: str = "digits",
    *,
    seed: int = 1,
    alpha: float = 0.3,
    rounds: int = 4,
    shift: float = 0.0,
    finished: bool = True,
) -> RunFolder:
    """A run of invented records below `folder`."""
    run = RunFolder.create(
        folder,
        name,
        config_text=CONFIG.format(seed=seed, alpha=alpha),
        facts={"clients": 9, "metrics": ["accuracy", "loss"], "partition": "dirichlet(alpha=0.3), seed 0"},
        command=["/usr/local/bin/fedsim", "run", "digits.toml"],
    )
    for record in invented(rounds, shift=shift):
        run.append_record(record)
        if record["round"]:
            run.append_clients(some_clients(record["round"]))
    if finished:
        final = {"accuracy": 0.9, "loss": 0.125}
        run.finish({"outcome": "ok", "rounds": rounds, "final": final, "best": {}, "seconds": 2.5})
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes runs below ``tmp_path/runs``."""
    return partial(run_below, tmp_path / "runs")


@pytest.fixture(scope="session")
def evaluated_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a run of 20 evaluated clients, drawn once for the tests that only read it."""
    run = run_below(tmp_path_factory.mktemp("page"))
    clients = {"client": np.arange(20), "accuracy": np.linspace(0.2, 1.0, 20)}
    return write_report(run, client_evaluation=clients).read_text(encoding="utf-8")

"""The sequential loop of the speed benchmark does what fedsim does, and the benchmark runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.config import Config, config_from
from fedsim.simulation.run import Simulation

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 2


def speed(name: str) -> Any:
    """``benchmarks.speed.NAME``: no package of the distribution, and others have one of its name."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"benchmarks.speed.{name}")
    finally:
        sys.path.remove(str(ROOT))


plan_of, report, runner, sequential, workloads = map(
    speed, ("plan", "report", "runner", "sequential", "workloads")
)


def tiny(strategy: str) -> Config:
    """W4 with few clients, unequal ones, several steps each and a short last batch, in float64."""
    return config_from(None, {
        "data": {"name": "digits", "partition": {"kind": "dirichlet", "alpha": 0.5, "clients": 60}},
        "model": {"name": "mlp", "hidden": [16]},
        "client": {"epochs": 1, "batch_size": 10, "lr": 0.1},
        "round": {"sample": 5},
        "run": {"rounds": ROUNDS},
        "strategy": {"name": strategy},
        "engine": {"name": "loop", "dtype": "float64"},
    })  # fmt: skip


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "fedspeed"])
def test_the_sequential_loop_ends_at_the_same_model(strategy: str, tmp_path: Path) -> None:
    config = tiny(strategy)
    plan = plan_of.make_plan(config, tmp_path, ROUNDS)
    loop = sequential.start(plan.path, strategy)
    sim = Simulation(config)
    begun = {name: value.clone() for name, value in loop.x.items()}
    for index in range(ROUNDS):
        sim.federation.run_window()
        loop.round(index)
    found = {name: value.numpy() for name, value in loop.x.items()}
    wanted = {name: value.numpy() for name, value in sim.model_tensors().items()}
    moved = report.difference(found, {name: value.numpy() for name, value in begun.items()})
    off = report.difference(found, wanted)
    assert moved is not None
    assert moved > 0.01
    assert off is not None
    # Pixels are normalised in float32 before either sees them; the rest is float64.
    assert off < 1e-6


def test_the_plan_counts_examples_and_arithmetic(tmp_path: Path) -> None:
    plan = plan_of.make_plan(tiny("fedavg"), tmp_path, ROUNDS)
    with np.load(plan.path) as arrays:
        sizes = np.diff(arrays["offsets"])[arrays["cohorts"]]
    assert plan.examples == sizes.sum(axis=1).tolist()
    # Forward and the weights' gradients of both layers, and the second layer's input gradient.
    assert plan.flops == 2 * (2 * 64 * 16 + 3 * 16 * 10)


def test_every_workload_is_a_configuration(tmp_path: Path) -> None:
    for workload in workloads.WORKLOADS.values():
        config = config_from(None, workload.config(tmp_path))
        assert config.client.epochs == 1
        assert config.output.clients, "default outputs are what is measured"


def seen(seconds: list[float]) -> Any:
    one = runner.Measured(
        runner.Program("fedsim auto", []), seconds=seconds, evaluated=[False] * len(seconds)
    )
    one.cpu, one.counted = sum(seconds), len(seconds)
    return one


def test_a_ratio_that_has_fallen_by_more_than_15_per_cent_is_told(tmp_path: Path) -> None:
    def programs(fedsim: float) -> dict[str, Any]:
        found = {name: report.numbers(seen([s] * 3), None, clients=10)
                 for name, s in (("Seq 1 thread", 1.0), ("fedsim auto", fedsim))}  # fmt: skip
        report.compare(found, "Seq 1 thread")
        return found

    committed = tmp_path / "speed.json"
    report.keep(committed, "W4/fedavg", {"programs": programs(0.1)})
    assert report.regressions("W4/fedavg", programs(0.115), committed) == []
    told = report.regressions("W4/fedavg", programs(0.12), committed)
    assert len(told) == 1
    assert "fedsim auto: 8.33 times the loop, was 10.00" in told[0]
    with pytest.raises(SystemExit):
        report.regressions("W1/fedavg", programs(0.1), committed)


@pytest.mark.slow
def test_one_round_of_w4_from_the_command_line(tmp_path: Path) -> None:
    words = ["--workload", "W4", "--rounds", "2", "--turn", "1", "--engine", "auto", "--seq-threads", "1",
             "--scratch", str(tmp_path), "--json", str(tmp_path / "out.json"), "--plot",
             str(tmp_path / "out.svg")]  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "out.json").read_text())["W4/fedavg"]["programs"]
    assert set(found) == {"Seq 1 thread", "fedsim auto"}
    assert found["fedsim auto"]["rounds"] == 2
    assert found["fedsim auto"]["difference"] < 1e-4
    assert found["fedsim auto"]["peak_mb"] > 0
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    assert not list(tmp_path.glob("fedsim-speed-*")), "nothing is left behind"
